"""Export of a backbone to one ONNX file that reproduces its embeddings."""

import contextlib
import copy
import hashlib
import importlib
import inspect
import io
import json
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from recognition import config
from recognition.errors import UserError
from recognition.files.atomic import replacing, write_text
from recognition.tracking import progress

if TYPE_CHECKING:  # a training that exports nothing does without these packages
    import onnx

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
OWN_OPSET = 18
"""Opset that torch's exporter writes; a file at another one is converted, which fails for some networks."""
OLDER_BELOW = 17
"""Bound below which torch's older exporter, which traces, has to write the file."""
MAX_BYTES = 2_000_000_000
"""Limit of the backbone's size: a protobuf message, so an ONNX file without external data, has at most 2 GiB."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Parity:
    """Largest differences between ONNX Runtime's embeddings and the backbone's."""

    max_difference: float
    """Largest absolute difference of a value, relative to the embedding's norm."""
    min_cosine: float
    """Smallest cosine."""


def export_onnx(backbone: nn.Module, path: Path | str, metadata: Mapping[str, Any], settings: config.Export) -> Parity:
    """Write `backbone` to the ONNX file `path` with a card beside it; return how closely ONNX Runtime reproduces it.

    `backbone` has `image_size` and `embedding_size`, and maps float32 [N, 3, H, H] in [-1, 1] to [N, D]; it turns off
    autocast when it is called with `float32=True`, if it has that keyword. It is not changed: a copy is exported, in
    eval mode on the CPU, in float32. The file has the input `data` [N, 3, H, H], RGB, already (x - 127.5) / 127.5, and
    the output `embedding` [N, D], with N free. The file meets the conditions of InsightFace's loader
    (`model_zoo.py`, `arcface_onnx.py`): H fixed, one output, no early node that it would take for normalisation.

    The metadata in the file holds the preprocessing, `metadata` (JSON values) and the parity, measured at batches of 1
    and 5. The card, at `card_path(path)`, holds the same as JSON, and the file's size and SHA-256.

    Raises UserError if a package is missing, the card would replace a file that is no card, the network cannot be
    exported or is too large for one file, or the parity is beyond the tolerances in `settings`; `path` is then left
    alone.
    """
    _require_packages()
    import onnx

    path = Path(path)
    _refuse_to_replace(card_path(path))
    frozen = _Frozen(backbone)
    card = _card(frozen, metadata)
    bytes_held = sum(tensor.numel() * tensor.element_size() for tensor in frozen.state_dict().values())
    if bytes_held > MAX_BYTES:
        raise UserError(
            f"{path}: the backbone's {bytes_held:,} bytes do not fit into one ONNX file, whose limit is 2 GiB; "
            "choose a smaller backbone or set export.enabled=false"
        )
    with progress.task("converting the backbone to ONNX"):
        model = _to_onnx(frozen, settings.opset)
    with progress.task("checking the ONNX file"):
        parity = _parity(frozen, model)
    if not (parity.max_difference <= settings.max_difference and parity.min_cosine >= settings.min_cosine):
        raise UserError(
            f"{path}: not written, for ONNX Runtime does not reproduce the backbone: largest relative difference "
            f"{parity.max_difference:.2e} (export.max_difference {settings.max_difference:.2e}), smallest cosine "
            f"{parity.min_cosine:.6f} (export.min_cosine {settings.min_cosine}); try another export.opset, or widen "
            "these limits (--opset of recognition export; the limits stand in the run's config.toml)"
        )
    card["parity"] = asdict(parity)
    onnx.helper.set_model_props(
        model, {name: value if isinstance(value, str) else json.dumps(value) for name, value in card.items()}
    )
    content = model.SerializeToString()
    card |= {"opset": settings.opset, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_bytes(content)
    write_text(card_path(path), json.dumps(card, indent=2) + "\n")
    _log.info("wrote %s: difference at most %.2e, cosine at least %.6f", path, parity.max_difference, parity.min_cosine)
    return parity


def card_path(path: Path) -> Path:
    """Return the path of an ONNX file's card beside it: `x.json` for `x.onnx`, `x.y.json` for any other `x.y`."""
    return path.with_suffix(".json") if path.suffix == ".onnx" else path.with_name(f"{path.name}.json")


def _refuse_to_replace(card: Path) -> None:
    """Raise UserError if there is a file in the card's place that is no card."""
    if not card.exists():
        return
    try:
        tree = json.loads(card.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        tree = None
    if not isinstance(tree, dict) or not {"input_layout", "sha256"} <= tree.keys():
        raise UserError(f"{card} is in the place of the export's card, and is none: move it, or give another output")


class _Frozen(nn.Module):
    """Copy of a backbone as it is deployed: on the CPU, in eval mode, in float32."""

    def __init__(self, backbone: Any) -> None:
        super().__init__()
        self.backbone = copy.deepcopy(backbone).cpu().float().requires_grad_(False)
        self.keywords = {"float32": True} if "float32" in inspect.signature(backbone.forward).parameters else {}
        self.image_size: int = backbone.image_size
        self.embedding_size: int = backbone.embedding_size
        self.eval()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.backbone(images, **self.keywords)


def check_export(backbone: nn.Module, settings: config.Export) -> None:
    """Check before a training that `backbone` can be exported as `settings` say.

    The packages are imported; at an opset other than the exporter's own, an export is tried. Raises UserError.
    """
    _require_packages()
    if settings.opset != OWN_OPSET:
        frozen = _Frozen(backbone)
        _parity(frozen, _to_onnx(frozen, settings.opset))


def _require_packages() -> None:
    for name in PACKAGES:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise UserError(
                f"the export to ONNX needs the package {name}, which cannot be imported ({error}): pip install {name}, "
                "or set export.enabled=false"
            ) from None


def _to_onnx(backbone: _Frozen, opset: int) -> "onnx.ModelProto":
    """Convert the backbone to a checked model at `opset`. Raises UserError, naming the lowest opset that works."""
    try:
        return _written(backbone, opset)
    except _Unexportable as error:
        for other in (*range(opset + 1, OWN_OPSET), OWN_OPSET):
            with contextlib.suppress(_Unexportable):
                _written(backbone, other)
                raise UserError(
                    f"the backbone cannot be exported to ONNX at opset {opset}: {error}; set export.opset={other} "
                    "(--opset of recognition export)"
                ) from None
        raise UserError(f"the backbone cannot be exported to ONNX: {error}") from None


class _Unexportable(Exception):
    """Error for a network that cannot be written at an opset."""


def _written(backbone: _Frozen, opset: int) -> "onnx.ModelProto":
    import onnx

    try:
        model = _traced(backbone, opset) if opset < OLDER_BELOW else _exported(backbone, opset)
    except Exception as error:  # each exporter has its own exceptions, and lets the network's pass
        raise _Unexportable(_first_line(error)) from error
    graph = model.graph
    for item in (*graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
        del item.metadata_props[:]  # stack traces, with the folders of the machine that trained
        item.doc_string = ""
    for node in graph.node:
        if node.name.startswith(("Sub", "_minus", "Mul", "_mul")):
            node.name = f"node_{node.name}"
    found = next(item.version for item in model.opset_import if not item.domain)
    if found != opset:
        raise _Unexportable(f"it could not be converted from opset {found}")
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise _Unexportable(_first_line(error)) from error
    return model


def _exported(backbone: _Frozen, opset: int) -> "onnx.ModelProto":
    program = torch.onnx.export(
        backbone,
        (_example(backbone),),
        dynamo=True,
        opset_version=opset,
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        input_names=["data"],
        output_names=["embedding"],
        verbose=False,
    )
    assert program is not None
    model: onnx.ModelProto = program.model_proto
    return model


def _traced(backbone: _Frozen, opset: int) -> "onnx.ModelProto":
    """Convert by torch's older exporter, to the oldest file format with `opset`, which old readers need."""
    import onnx

    for module in backbone.modules():
        if hasattr(module, "fused_attn"):  # timm's attention, which that exporter cannot write before opset 14
            setattr(module, "fused_attn", False)  # noqa: B010  # a module's attribute, for mypy, is another module
    content = io.BytesIO()
    with warnings.catch_warnings(), _silence():
        warnings.simplefilter("ignore")  # it warns at each call that it is deprecated
        torch.onnx.export(
            backbone,
            (_example(backbone),),
            content,  # type: ignore[arg-type]  # that exporter takes open files
            dynamo=False,
            opset_version=opset,
            dynamic_axes={"data": {0: "batch"}, "embedding": {0: "batch"}},
            input_names=["data"],
            output_names=["embedding"],
            verbose=False,
        )
    model = onnx.load_from_string(content.getvalue())
    model.ir_version = onnx.helper.find_min_ir_version_for(model.opset_import)
    return model


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Silence standard output, to which the older exporter's C++ prints the whole graph when it fails."""
    sys.stdout.flush()
    kept, nothing = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nothing, 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nothing)


def _example(backbone: _Frozen) -> torch.Tensor:
    return torch.zeros(2, 3, backbone.image_size, backbone.image_size)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _parity(backbone: _Frozen, model: "onnx.ModelProto") -> Parity:
    """Compare ONNX Runtime's embeddings of random images with the backbone's. Raises UserError if it cannot run."""
    import onnxruntime

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


def _card(backbone: _Frozen, metadata: Mapping[str, Any]) -> dict[str, Any]:
    own = {
        "input_color": "RGB",
        "input_layout": "NCHW",
        "input_mean": 127.5,
        "input_std": 127.5,
        "input_size": backbone.image_size,
        "alignment": "arcface_dst",
        "embedding_size": backbone.embedding_size,
    }
    clash = sorted((own.keys() | {"parity"}) & metadata.keys())
    if clash:
        raise ValueError(f"the metadata {clash} are the export's own")
    return own | dict(metadata)
