"""An exported embedder, run by ONNX Runtime."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime

from recognition.config import UserError


class OnnxEmbedder:
    """An ONNX file behind the Embedder interface: uint8 RGB faces in, float32 embeddings out, not normalised.

    The file has one input, float32 [N, 3, H, H] with H fixed, and one output, [N, D]. How pixels are normalised is read
    from the metadata that `recognition.deploy.onnx` writes. A file without it is taken for InsightFace's own: RGB and
    (x - 127.5) / 127.5, or nothing where the graph begins with its own subtraction and multiplication (the rule of
    InsightFace's `arcface_onnx.py`).
    """

    def __init__(self, path: Path | str, threads: int = 0) -> None:
        """Open the file at `path` for `threads` CPU threads (0: all cores), or for a GPU if ONNX Runtime has one.

        Raises UserError where the file is missing, corrupt, or no embedder.
        """
        self.path = Path(path)
        if not self.path.is_file():
            raise UserError(f"{path}: no such file")
        try:
            self._session = _session(str(path), threads)
        except Exception as error:  # ONNX Runtime's exceptions share no base class of their own
            raise UserError(f"{path}: ONNX Runtime cannot load it ({error}); export or download it again") from error
        self._name, self._fixed_batch, self.image_size = self._input()
        self.facts: dict[str, str] = dict(self._session.get_modelmeta().custom_metadata_map)
        """The file's metadata."""
        mean, std = self._normalisation()
        self._mean, self._std = np.float32(mean), np.float32(std)
        self._flip_channels = self.facts.get("input_color", "RGB") == "BGR"
        self.embedding_size = self._probe()

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Embeddings, float32 [n, D], of images, uint8 [n, H, H, 3] RGB."""
        size = self.image_size
        if images.shape[1:] != (size, size, 3) or images.dtype != np.uint8:
            raise ValueError(f"{self.path} takes uint8 [n, {size}, {size}, 3], not {images.dtype} {list(images.shape)}")
        if self._flip_channels:
            images = images[..., ::-1]
        inputs = np.ascontiguousarray((images.transpose(0, 3, 1, 2).astype(np.float32) - self._mean) / self._std)
        batch = self._fixed_batch or max(len(inputs), 1)
        if len(inputs) % batch:
            inputs = np.concatenate([inputs, np.zeros((-len(inputs) % batch, *inputs.shape[1:]), np.float32)])
        outputs = [
            self._session.run(None, {self._name: inputs[start : start + batch]})[0]
            for start in range(0, len(inputs), batch)
        ]
        return np.concatenate(outputs or [np.zeros((0, self.embedding_size), np.float32)])[: len(images)]

    def _input(self) -> tuple[str, int | None, int]:
        """Name, batch if it is fixed, and image size."""
        inputs = self._session.get_inputs()
        shape = inputs[0].shape if inputs else []
        match shape:
            case [batch, 3, int(height), int(width)] if height == width and len(inputs) == 1:
                if inputs[0].type == "tensor(float)":
                    return inputs[0].name, batch if isinstance(batch, int) else None, height
        described = ", ".join(f"{item.name} {item.type} {item.shape}" for item in inputs)
        raise UserError(
            f"{self.path}: not a face embedder: it takes {described or 'nothing'}, not one input float32 [N, 3, H, H]"
        )

    def _normalisation(self) -> tuple[float, float]:
        if "input_mean" in self.facts and "input_std" in self.facts:
            try:
                return float(self.facts["input_mean"]), float(self.facts["input_std"])
            except ValueError:
                raise UserError(f"{self.path}: input_mean and input_std in its metadata are not numbers") from None
        first = [node.name for node in onnx.load(self.path, load_external_data=False).graph.node[:8]]
        subtracts = any(name.startswith(("Sub", "_minus")) for name in first)
        multiplies = any(name.startswith(("Mul", "_mul")) for name in first)
        return (0.0, 1.0) if subtracts and multiplies else (127.5, 127.5)

    def _probe(self) -> int:
        """D, from a run on black images."""
        black = np.zeros((self._fixed_batch or 1, 3, self.image_size, self.image_size), np.float32)
        outputs = self._session.run(None, {self._name: black})
        if len(outputs) != 1 or outputs[0].ndim != 2 or len(outputs[0]) != len(black):
            described = ", ".join(str(list(np.shape(output))) for output in outputs)
            raise UserError(f"{self.path}: not a face embedder: it gives {described}, not one output [N, D]")
        return int(outputs[0].shape[1])


def _session(model: str | bytes, threads: int) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3  # InsightFace's own files declare an output batch of 1, warned about at each call
    providers: list[Any] = ["CPUExecutionProvider"]
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        providers.insert(0, ("CUDAExecutionProvider", {"use_tf32": 0}))
    return onnxruntime.InferenceSession(model, options, providers=providers)
