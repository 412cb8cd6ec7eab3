"""Export of a backbone to one ONNX file that reproduces its embeddings."""

import copy
import hashlib
import inspect
import json
import logging
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from torch import nn

from recognition import config, progress
from recognition.config import UserError

MAX_BYTES = 2_000_000_000
"""A protobuf message, so an ONNX file without external data, cannot pass 2 GiB."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Parity:
    """How far ONNX Runtime's embeddings are from the backbone's, at worst."""

    max_difference: float
    """Largest |difference| of a value, relative to the embedding's norm."""
    min_cosine: float
    """Smallest cosine."""


def export(backbone: nn.Module, path: Path | str, facts: Mapping[str, Any], settings: config.Export) -> Parity:
    """Write `backbone` to the ONNX file `path`, with a card beside it, and say how well ONNX Runtime reproduces it.

    `backbone` has `image_size` and `embedding_size`, and maps float32 [N, 3, H, H] in [-1, 1] to [N, D]; it turns off
    autocast when it is called with `float32=True`, if it has that keyword. It is left as it is: a copy in eval mode on
    the CPU, in float32, is exported. The file has the input `data` [N, 3, H, H], RGB, already (x - 127.5) / 127.5, and
    the output `embedding` [N, D], with N free. The conditions of InsightFace's loader (`model_zoo.py`,
    `arcface_onnx.py`) are met: H fixed, one output, no early node that it takes for normalisation.

    The file's metadata holds the preprocessing, `facts` (JSON values) and the parity, measured at batches of 1 and 5.
    The card, `path` with the suffix .json, holds the same as JSON, and the file's size and SHA-256.

    Raises UserError where the network cannot be exported or is too large for one file, and where the parity is beyond
    the tolerances in `settings`; `path` is then not touched.
    """
    path = Path(path)
    frozen = _Frozen(backbone)
    card = _card(frozen, facts)
    bytes_held = sum(tensor.numel() * tensor.element_size() for tensor in frozen.state_dict().values())
    if bytes_held > MAX_BYTES:
        raise UserError(
            f"{path}: the backbone's {bytes_held:,} bytes do not fit into one ONNX file, whose limit is 2 GiB; "
            "choose a smaller backbone or set export.enabled=false"
        )
    with progress.working("converting the backbone to ONNX"):
        model = _to_onnx(frozen, settings.opset)
    with progress.working("checking the ONNX file"):
        parity = _parity(frozen, model)
    if not (parity.max_difference <= settings.max_difference and parity.min_cosine >= settings.min_cosine):
        raise UserError(
            f"{path}: not written, for ONNX Runtime does not reproduce the backbone: largest relative difference "
            f"{parity.max_difference:.2e} (export.max_difference {settings.max_difference:.2e}), smallest cosine "
            f"{parity.min_cosine:.6f} (export.min_cosine {settings.min_cosine}); try another export.opset, or widen "
            "these limits"
        )
    card["parity"] = asdict(parity)
    onnx.helper.set_model_props(
        model, {name: value if isinstance(value, str) else json.dumps(value) for name, value in card.items()}
    )
    content = model.SerializeToString()
    card |= {"opset": settings.opset, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    _write(path, content)
    _write(path.with_suffix(".json"), (json.dumps(card, indent=2) + "\n").encode())
    _log.info("wrote %s: difference at most %.2e, cosine at least %.6f", path, parity.max_difference, parity.min_cosine)
    return parity


class _Frozen(nn.Module):
    """A copy of a backbone as it is deployed: on the CPU, in eval mode, in float32."""

    def __init__(self, backbone: Any) -> None:
        super().__init__()
        self.backbone = copy.deepcopy(backbone).cpu().float().requires_grad_(False)
        self.keywords = {"float32": True} if "float32" in inspect.signature(backbone.forward).parameters else {}
        self.image_size: int = backbone.image_size
        self.embedding_size: int = backbone.embedding_size
        self.eval()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.backbone(images, **self.keywords)


def _to_onnx(backbone: _Frozen, opset: int) -> onnx.ModelProto:
    example = torch.zeros(2, 3, backbone.image_size, backbone.image_size)
    try:
        program = torch.onnx.export(
            backbone,
            (example,),
            dynamo=True,
            opset_version=opset,
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            input_names=["data"],
            output_names=["embedding"],
            verbose=False,
        )
    except torch.onnx.errors.OnnxExporterError as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"the backbone cannot be exported to ONNX: {reason}") from error
    assert program is not None
    model: onnx.ModelProto = program.model_proto
    graph = model.graph
    for item in (*graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
        del item.metadata_props[:]  # stack traces, with the folders of the machine that trained
        item.doc_string = ""
    for node in graph.node:
        if node.name.startswith(("Sub", "_minus", "Mul", "_mul")):
            node.name = f"node_{node.name}"
    found = next(item.version for item in model.opset_import if not item.domain)
    if found != opset:
        raise UserError(f"the backbone cannot be written at opset {opset}, but at {found}: set export.opset={found}")
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise UserError(f"the backbone cannot be exported to ONNX: {error}") from error
    return model


def _parity(backbone: _Frozen, model: onnx.ModelProto) -> Parity:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's exceptions share no base class of their own
        raise UserError(f"the backbone cannot be exported: ONNX Runtime refuses the file ({error})") from error
    generator = np.random.default_rng(0)
    differences, cosines = [], []
    for batch in (1, 5):
        images = generator.uniform(-1, 1, (batch, 3, backbone.image_size, backbone.image_size)).astype(np.float32)
        with torch.inference_mode():
            expected = backbone(torch.from_numpy(images)).double().numpy()
        (found,) = session.run(["embedding"], {"data": images})
        if not found.shape == expected.shape == (batch, backbone.embedding_size):
            raise UserError(
                f"the backbone cannot be exported to ONNX: for {batch} images it gives {list(expected.shape)}, "
                f"the export {list(found.shape)}, not {[batch, backbone.embedding_size]}"
            )
        found = found.astype(np.float64)
        norms = np.maximum(np.linalg.norm(expected, axis=1), np.finfo(np.float32).tiny)
        differences.append(np.abs(found - expected).max(axis=1) / norms)
        cosines.append((found * expected).sum(axis=1) / norms / np.linalg.norm(found, axis=1).clip(min=1e-30))
    return Parity(float(np.concatenate(differences).max()), float(np.concatenate(cosines).min()))


def _card(backbone: _Frozen, facts: Mapping[str, Any]) -> dict[str, Any]:
    own = {
        "input_color": "RGB",
        "input_layout": "NCHW",
        "input_mean": 127.5,
        "input_std": 127.5,
        "input_size": backbone.image_size,
        "alignment": "arcface_dst",
        "embedding_size": backbone.embedding_size,
    }
    clash = sorted((own.keys() | {"parity"}) & facts.keys())
    if clash:
        raise ValueError(f"the facts {clash} are the export's own")
    return own | dict(facts)


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
