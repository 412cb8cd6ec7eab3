"""The hardware of a process, and the values that `auto` settings have on it.

This is the one place where hardware decides a default. A run resolves its settings once, shows them, and records them
in its checkpoints and in the card of its ONNX file. The measurements behind the choices are in docs/measurements.
"""

import importlib.util
import os
import platform
import shlex
import shutil
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from recognition.config import Backbone, Config
from recognition.errors import UserError

Precision = Literal["float32", "bfloat16", "float16"]

DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
"""torch's types by the names that settings give them."""

_AMPERE, _VOLTA = (8, 0), (7, 0)
_CHUNK = {"cpu": 1024, "cuda": 8192}
# Hardware with units for one of these also computes in those before it.
_WEAKEST_FIRST = ("float32", "float16", "bfloat16")
_HAVE_BFLOAT16 = ("BF16", "FP16", "AMX", "AVX10", "ALL", "DEFAULT")


@dataclass(frozen=True)
class Hardware:
    """A processor or a GPU."""

    device: str
    """torch's type of it: `cpu`, `cuda` or `mps`."""
    name: str
    """The name that it reports."""
    units: str
    """Instruction set or compute capability."""
    precision: Precision
    """The fastest type whose matrix products and convolutions have units of their own, float32 if no other has."""

    def __str__(self) -> str:
        return f"{self.name} ({self.units})"


@dataclass(frozen=True)
class Resolved:
    """Settings with every `auto` replaced, and the reasons for their values."""

    config: Config
    hardware: Hardware
    notes: tuple[str, ...] = ()
    """Messages for the user, a sentence each."""

    def __str__(self) -> str:
        backbone = self.config.backbone
        layout = "channels-last" if backbone.channels_last else "contiguous"
        compiled = "compiled" if backbone.compile else "not compiled"
        return (
            f"backbone in {backbone.precision}, {layout}, {compiled}; head in {self.config.head.precision}; "
            f"images by {self.config.data.loader}"
        )

    def to_json(self) -> dict[str, Any]:
        """Return the values that checkpoints and the card record, by setting, and the device."""
        backbone, head = self.config.backbone, self.config.head
        return {
            "device": str(self.hardware),
            "backbone.precision": backbone.precision,
            "backbone.channels_last": backbone.channels_last,
            "backbone.compile": backbone.compile,
            "head.precision": head.precision,
            "head.chunk": head.chunk or head_chunk(self.hardware.device),
            "training.threads": self.config.training.threads,
            "data.loader": self.config.data.loader,
        }


def detect(device: torch.device) -> Hardware:
    """Detect the hardware of `device`."""
    if device.type == "cuda":
        return _gpu(device)
    if device.type == "mps":
        return Hardware("mps", _processor_name(), "Metal", "float32")
    units = {"DEFAULT": "no vector units that torch uses", "AVX512": "AVX-512"}
    capability = torch.backends.cpu.get_cpu_capability()
    native = _has_bfloat16()
    label = units.get(capability, capability) + (" with bfloat16" if native else "")
    return Hardware("cpu", _processor_name(), label, "bfloat16" if native else "float32")


def weakest(found: Sequence[Hardware]) -> Hardware:
    """Describe several machines as one, with the weakest one's precision, so that all ranks compute in the same."""
    precision = min((each.precision for each in found), key=_WEAKEST_FIRST.index)
    names, units = (sorted({getattr(each, field) for each in found}) for field in ("name", "units"))
    return Hardware(found[0].device, " and ".join(names), " and ".join(units), precision)


def resolve(
    config: Config, hardware: Hardware, *, local_world: int = 1, before: Mapping[str, Any] | None = None
) -> Resolved:
    """Replace every `auto` of `config` by what suits `hardware`, whose cores `local_world` processes share.

    `before`: the `to_json` of the run's checkpoint, if it goes on from one, whose precisions stay where nothing else is
    asked for. Raises UserError where `hardware` cannot compute in the precision that is asked for or stays.
    """
    before, notes = before or {}, []
    backbone, head = config.backbone, config.head
    for name, asked in (("backbone.precision", backbone.precision), ("head.precision", head.precision)):
        kept, best = before.get(name), best_precision(name, hardware)
        if asked == "auto" and kept not in (None, best):
            _refuse_unable(name, kept, hardware)
            notes.append(
                f"{name}: the run goes on in {kept}, as it began; {hardware} would take {best} ({name}={best} does so)"
            )
        elif asked != "auto" and kept not in (None, asked):
            notes.append(f"{name}: the run began in {kept} and goes on in {asked}")
        chosen = asked if asked != "auto" else kept or best
        _refuse_unable(name, chosen, hardware)
        if hardware.device == "cpu" and asked != "auto" and chosen not in ("float32", best):
            notes.append(f"{name}: {hardware} has no units for {chosen} and emulates it; {best} may be much faster")
        if name == "backbone.precision":
            backbone = backbone.model_copy(update={"precision": chosen})
        else:
            head = head.model_copy(update={"precision": chosen})
    backbone = resolve_backbone(backbone, hardware)
    lacking = compile_lacks(hardware.device) if backbone.compile else None
    if lacking is not None:
        raise UserError(
            f"backbone.compile is true, and torch.compile lacks {lacking}: install it, or set backbone.compile=false"
        )
    training = config.training.model_copy(update={"threads": threads(config.training.threads, local_world)})
    data = config.data.model_copy(update={"loader": loader(config.data.loader)})
    resolved = config.model_copy(update={"backbone": backbone, "head": head, "training": training, "data": data})
    return Resolved(resolved, hardware, tuple(notes))


def resolve_backbone(backbone: Backbone, hardware: Hardware) -> Backbone:
    """Replace every `auto` of the backbone's settings by what suits `hardware`."""
    precision = hardware.precision if backbone.precision == "auto" else backbone.precision
    return backbone.model_copy(
        update={
            "precision": precision,
            "channels_last": True if backbone.channels_last == "auto" else backbone.channels_last,
            "compile": False if backbone.compile == "auto" else backbone.compile,
        }
    )


def best_precision(name: str, hardware: Hardware) -> str:
    """Return the precision that `auto` means for the setting `name`; the head has no products in float16."""
    if name == "head.precision" and hardware.precision == "float16":
        return "float32"
    return hardware.precision


def compile_lacks(device: str) -> str | None:
    """Name the tool that torch.compile lacks on this machine for torch's device type `device`; None: it can compile."""
    if device == "cuda":
        return None if importlib.util.find_spec("triton") else "Triton (pip install triton)"
    # Its kernels for a processor are C++ with Python's headers; which compiler it takes is its own rule.
    compiler = shlex.split(os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++"))
    if not compiler or shutil.which(compiler[0]) is None:
        return f"the C++ compiler {' '.join(compiler)}"
    headers = Path(sysconfig.get_paths()["include"])
    return None if (headers / "Python.h").exists() else f"Python's headers in {headers} (python3-dev)"


def product_type(precision: str, device: torch.device) -> torch.dtype:
    """Return the type of the operands of the head's matrix products."""
    return DTYPES[best_precision("head.precision", detect(device)) if precision == "auto" else precision]


def head_chunk(device_type: str) -> int:
    """Return the number of classes whose logits exist at a time; on a CPU few enough to stay in a core's cache."""
    return _CHUNK.get(device_type, _CHUNK["cpu"])


def loader(asked: str) -> str:
    """Return which library makes the batches: `dali`, or `torchvision` where DALI is not installed.

    Raises UserError where DALI is asked for and is not there.
    """
    there = importlib.util.find_spec("nvidia") is not None and importlib.util.find_spec("nvidia.dali") is not None
    if asked == "dali" and not there:
        raise UserError(
            "data.loader is dali, which is not installed: it exists for Linux on x86-64 "
            "(pip install nvidia-dali-cuda130); data.loader=torchvision does without it"
        )
    if asked == "auto":
        return "dali" if there else "torchvision"
    return asked


def threads(asked: int, local_world: int) -> int:
    """Return the CPU threads of each of `local_world` processes: `asked`, or an even share of the cores if it is 0."""
    return asked or max(1, cores() // local_world)


def cores() -> int:
    """Return the number of processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _gpu(device: torch.device) -> Hardware:
    name = torch.cuda.get_device_name(device)
    if torch.version.hip is not None:
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return Hardware("cuda", name, "ROCm", "bfloat16" if native else "float16")
    capability = torch.cuda.get_device_capability(device)
    precision: Precision = "bfloat16" if capability >= _AMPERE else "float16" if capability >= _VOLTA else "float32"
    return Hardware("cuda", name, "compute capability {}.{}".format(*capability), precision)


def _has_bfloat16() -> bool:
    """Return whether the processor has units for bfloat16 that oneDNN uses.

    oneDNN's own answer counts AVX-512 without such units too; torch's list of capabilities does not obey
    ONEDNN_MAX_CPU_ISA, which caps oneDNN: all three are asked.
    """
    cap = os.environ.get("ONEDNN_MAX_CPU_ISA", "ALL").upper()
    if not torch.backends.mkldnn.is_available() or not any(name in cap for name in _HAVE_BFLOAT16):
        return False  # torch for macOS comes without oneDNN
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    if hasattr(torch.cpu, "get_capabilities"):
        return any(has and name.endswith("bf16") for name, has in torch.cpu.get_capabilities().items())
    # Older releases of torch cannot tell of Arm.
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def _refuse_unable(name: str, precision: str | None, hardware: Hardware) -> None:
    """Raise UserError where a card cannot compute in `precision` at all; processors emulate what they lack."""
    if hardware.device == "cuda" and precision == "bfloat16" and hardware.precision != "bfloat16":
        instead = best_precision(name, hardware)
        raise UserError(
            f"{name} is bfloat16, which {hardware} cannot compute: set {name}={instead}, in which a run that began in "
            "bfloat16 goes on too"
        )


def _processor_name() -> str:
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
