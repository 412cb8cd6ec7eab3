"""Embedder that runs an ONNX file, exported here or by others, by ONNX Runtime; torch is not needed."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime

from recognition.errors import UserError
from recognition.files.kinds import what_is
from recognition.tracking.terminal import escape

_TYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(double)": np.float64,
    "tensor(uint8)": np.uint8,
}


@dataclass(frozen=True)
class OnnxOptions:
    """Options for ONNX files by other programs, which lack our metadata; None: deduced from the file."""

    size: int | None = None
    """Height and width of the images, for a file with dynamic ones."""
    output: str | None = None
    """Name of the output that is the embedding."""
    mean: Sequence[float] | None = None
    """Mean subtracted from the levels 0 to 255: one number, or one for each channel in the network's order."""
    std: Sequence[float] | None = None
    """Divisor of the difference: one number, or one for each channel in the network's order."""
    bgr: bool | None = None
    """Order of the network's channels: true for blue, green, red."""


class OnnxEmbedder:
    """ONNX file behind the Embedder interface: uint8 RGB faces in, float32 embeddings out, not normalised.

    The file has one input, [N, 3, H, H] or [N, H, H, 3], of floats of any length or uint8. One of its outputs is [N, D]
    with D > 1, or [N, D, 1, 1]: the embedding. The normalisation of pixels is read from the metadata that
    `recognition.deploy.export` writes. A file without it is treated as InsightFace's: RGB and (x - 127.5) / 127.5, or
    RGB levels as they are if the graph begins with a subtraction and a multiplication (the rule of InsightFace's
    `arcface_onnx.py`) or takes uint8.
    """

    def __init__(self, path: Path | str, options: OnnxOptions | None = None) -> None:
        """Open the file at `path`, on all CPU cores, or on a GPU if ONNX Runtime has one.

        Raises UserError if the file is missing, damaged, or no embedder.
        """
        self.path = Path(path)
        self._shown = escape(str(path))
        self._options = options = options or OnnxOptions()
        if not self.path.is_file():
            raise UserError(f"{self._shown}: {'a folder, not an ONNX file' if self.path.is_dir() else 'no such file'}")
        try:
            self._session = _session(str(path))
        except Exception as error:  # ONNX Runtime's exceptions share no base class of their own
            raise UserError(f"{self._shown}: ONNX Runtime cannot load it: {_reason(self.path, error)}") from error
        self.metadata: dict[str, str] = dict(self._session.get_modelmeta().custom_metadata_map)
        """Metadata in the file."""
        self.notes: list[str] = []
        """Assumptions about the file, a sentence each."""
        self._name, self._type, self._fixed_batch, self._channels_last, self.image_size = self._input()
        mean, std = self._normalisation()
        self._mean, self._std = (np.asarray(values, np.float32).reshape(-1, 1, 1) for values in (mean, std))
        stored = self.metadata.get("input_color", "RGB") == "BGR"
        self._flip_channels = stored if options.bgr is None else options.bgr
        self._output, self.embedding_size = self._probe()

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Embed RGB images, uint8 [n, H, H, 3], as float32 [n, D], not normalised."""
        size = self.image_size
        if images.shape[1:] != (size, size, 3) or images.dtype != np.uint8:
            raise ValueError(f"{self.path} takes uint8 [n, {size}, {size}, 3], not {images.dtype} {list(images.shape)}")
        if self._flip_channels:
            images = images[..., ::-1]
        inputs = (images.transpose(0, 3, 1, 2).astype(np.float32) - self._mean) / self._std
        inputs = inputs.transpose(0, 2, 3, 1) if self._channels_last else inputs
        inputs = np.ascontiguousarray(inputs.astype(self._type))
        batch = self._fixed_batch or max(len(inputs), 1)
        if len(inputs) % batch:
            inputs = np.concatenate([inputs, np.zeros((-len(inputs) % batch, *inputs.shape[1:]), inputs.dtype)])
        outputs = [
            _flat(self._session.run([self._output], {self._name: inputs[start : start + batch]})[0])
            for start in range(0, len(inputs), batch)
        ]
        empty = np.zeros((0, self.embedding_size), np.float32)
        return np.concatenate([empty, *outputs])[: len(images)].astype(np.float32, copy=False)

    def _input(self) -> tuple[str, Any, int | None, bool, int]:
        """Return the input's name, type, fixed batch or None, whether channels come last, and image size."""
        inputs = self._session.get_inputs()
        shape = inputs[0].shape if len(inputs) == 1 and inputs[0].type in _TYPES else []
        match shape:
            case [batch, 3, height, width]:
                channels_last = False
            case [batch, height, width, 3]:
                channels_last = True
            case [batch, str() | None, str() | None as height, str() | None as width]:
                channels_last = False
            case _:
                height = width = -1
                channels_last = False
        fixed = {length for length in (height, width) if isinstance(length, int)}
        if len(fixed) > 1 or min(fixed, default=1) < 1:
            described = ", ".join(f"{item.name} {item.type} {item.shape}" for item in inputs)
            raise UserError(
                f"{self._shown}: not a face embedder: it takes {described or 'nothing'}, not one input "
                "[N, 3, H, H] or [N, H, H, 3] of floats or uint8"
            )
        asked = self._options.size
        size = fixed.pop() if fixed else asked or self._size_in_metadata()
        if size is None:
            raise UserError(
                f"{self._shown}: it takes images of any height and width ({inputs[0].name} {shape}): say the size "
                "that it was trained on, as --size 112"
            )
        if asked not in (None, size):
            raise UserError(
                f"{self._shown}: it takes images of {size} x {size} pixels only, not {asked}: leave --size out"
            )
        if channels_last:
            self.notes.append(f"channels come last, {shape}")
        if inputs[0].type != "tensor(float)":
            self.notes.append(f"the input is {np.dtype(_TYPES[inputs[0].type])}")
        fixed_batch = batch if isinstance(batch, int) and batch > 0 else None
        return inputs[0].name, _TYPES[inputs[0].type], fixed_batch, channels_last, int(size)

    def _size_in_metadata(self) -> int | None:
        text = self.metadata.get("input_size", "")
        return int(text) if text.isdecimal() else None

    def _normalisation(self) -> tuple[Sequence[float], Sequence[float]]:
        own_mean, own_std = self._default_normalisation()
        mean = [own_mean] if self._options.mean is None else self._options.mean
        std = [own_std] if self._options.std is None else self._options.std
        for values, name in ((mean, "mean"), (std, "std")):
            if len(values) not in (1, 3) or not np.isfinite(values).all():
                raise UserError(f"--{name} takes one number, or three, one for each channel, not {list(values)}")
        if not np.all(std):
            raise UserError(f"--std divides the levels, so it is not 0: {list(std)}")
        return mean, std

    def _default_normalisation(self) -> tuple[float, float]:
        if "input_mean" in self.metadata and "input_std" in self.metadata:
            try:
                return float(self.metadata["input_mean"]), float(self.metadata["input_std"])
            except ValueError:
                raise UserError(f"{self._shown}: input_mean and input_std in its metadata are not numbers") from None
        first = [node.name for node in onnx.load(self.path, load_external_data=False).graph.node[:8]]
        subtracts = any(name.startswith(("Sub", "_minus")) for name in first)
        multiplies = any(name.startswith(("Mul", "_mul")) for name in first)
        inside = (subtracts and multiplies) or self._type is np.uint8
        mean, std = (0.0, 1.0) if inside else (127.5, 127.5)
        if self._options.mean is None and self._options.std is None:
            levels = "the levels 0 to 255" if inside else "(x - 127.5) / 127.5"
            self.notes.append(
                f"the file does not say what it takes: RGB, {levels} (--mean, --std and --bgr change that)"
            )
        return mean, std

    def _probe(self) -> tuple[str, int]:
        """Find the output that is the embedding, and its D, by running black images."""
        names = [output.name for output in self._session.get_outputs()]
        batch = self._fixed_batch or 1
        shapes = dict(zip(names, self._run_black(batch), strict=True))
        described = ", ".join(f"{escape(name)} {list(shape)}" for name, shape in shapes.items())
        asked = self._options.output
        if asked is not None and asked not in shapes:
            raise UserError(f"{self._shown}: it has no output {escape(asked)}, but {described}")
        fitting = [
            name
            for name, shape in shapes.items()
            if len(shape) >= 2
            and shape[0] == batch
            and shape[1] > 1
            and set(shape[2:]) <= {1}
            and asked in (None, name)
        ]
        if not fitting:
            what = f"its output {asked}" if asked else "it"
            raise UserError(f"{self._shown}: not a face embedder: {what} gives {described}, not one output [N, D]")
        if len(fitting) > 1:
            raise UserError(
                f"{self._shown}: which of its outputs is the embedding? It gives {described}: say --output {fitting[0]}"
            )
        if len(names) > 1:
            self.notes.append(f"the embedding is output {escape(fitting[0])} of {described}")
        if self._fixed_batch is None and not self._takes_two(fitting[0]):
            self._fixed_batch = 1
            self.notes.append("it takes one image at a time, although its batch is said to be free")
        return fitting[0], int(shapes[fitting[0]][1])

    def _takes_two(self, name: str) -> bool:
        try:
            return bool(self._run_black(2, [name])[0][0] == 2)
        except UserError:
            return False

    def _run_black(self, batch: int, names: list[str] | None = None) -> list[tuple[int, ...]]:
        """Return the shapes of the outputs for black images."""
        size = self.image_size
        shape = (batch, size, size, 3) if self._channels_last else (batch, 3, size, size)
        try:
            outputs = self._session.run(names, {self._name: np.zeros(shape, self._type)})
        except Exception as error:  # see __init__
            raise UserError(
                f"{self._shown}: ONNX Runtime cannot run it on {list(shape)}: {_first_line(error)}; if it was made for "
                "images of another size, say --size"
            ) from error
        return [np.shape(output) for output in outputs]


def _flat(output: np.ndarray) -> np.ndarray:
    return output.reshape(output.shape[:2])


def _session(model: str) -> Any:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = (
        3  # InsightFace's files declare an output batch of 1, for which it would warn at each call
    )
    providers: list[Any] = ["CPUExecutionProvider"]
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        providers.insert(0, ("CUDAExecutionProvider", {"use_tf32": 0}))
    return onnxruntime.InferenceSession(model, options, providers=providers)


def _reason(path: Path, error: Exception) -> str:
    """Explain why a file cannot be loaded, and the way out."""
    kind = what_is(path)
    if kind not in ("an ONNX model", "binary, of no known kind"):
        return f"it is {kind}; give an ONNX file, exported or downloaded again"
    text, version = _first_line(error), onnxruntime.__version__
    if re.search(r"[Oo]pset \d+ is under development|[Uu]nsupported model IR version", text):
        return (
            f"it is newer than ONNX Runtime {version} reads ({text}); export it again with a lower opset, convert it "
            "with onnx.version_converter, or install a newer onnxruntime"
        )
    if re.search(
        r"not a registered function/op|No opset import for domain|Could not find an implementation|is not registered",
        text,
    ):
        return f"it uses an operator that ONNX Runtime {version} does not have ({text}); export it again without that"
    if re.search(r"external data|External data|model_path|\.data", text):
        return f"a file that holds its weights is missing beside it ({text}); copy that too"
    return f"{text}; export or download it again"


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    # Strip the code, the path and the line of ONNX Runtime's source at the beginning.
    pattern = r"^\[ONNXRuntimeError\] : \d+ : \w+ : (Load model from .*? failed:)?(/onnxruntime_src/.*?\) (?=[A-Z]))?"
    return escape(re.sub(pattern, "", lines[0])) if lines else type(error).__name__
