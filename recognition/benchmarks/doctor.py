"""Description of a machine, the values of `auto` settings on it, and findings on unusual measurements."""

import importlib.metadata
import os
import platform
from dataclasses import dataclass

import torch

from recognition import hardware
from recognition.benchmarks.machine import Measurements

PACKAGES = {
    "torch": "nothing works without it",
    "torchvision": "nothing works without it",
    "timm": "nothing works without it",
    "nvidia-dali": "Pillow and torchvision make the batches",
    "onnxruntime": "ONNX files cannot be verified",
    "triton": "the head is PyTorch's, slower on a GPU",
}
"""Packages of the project, each with the consequence if it is missing."""
CAPS = (
    "ATEN_CPU_CAPABILITY",
    "ONEDNN_MAX_CPU_ISA",
    "MKL_ENABLE_INSTRUCTIONS",
    "OMP_NUM_THREADS",
    "CUDA_VISIBLE_DEVICES",
)
"""Environment variables that limit the machine."""
_SLOW_DISK = 100e6
_NOTABLE = 1.2


@dataclass(frozen=True)
class Default:
    """Value of a setting that was `auto`, and the reason for it."""

    name: str
    value: str | bool | int
    reason: str


def defaults(resolved: hardware.Resolved, ranks: int) -> list[Default]:
    """Return the values of the `auto` settings, with reasons, if `ranks` processes share the machine."""
    facts, found = resolved.to_json(), resolved.hardware
    units = {
        "float32": f"{found.units}: shorter types are emulated",
        "float16": f"{found.units}: units for it, none for bfloat16",
        "bfloat16": f"{found.units}: units for it",
    }
    gain = "a CPU gained a fifth at most, after minutes" if found.device == "cpu" else "not measured: try true"
    reasons = {
        "backbone.precision": units[found.precision],
        "backbone.channels_last": "up to twice as fast for convolutions; ViTs hardly care",
        "backbone.compile": gain,
        "head.precision": "the head has no products in float16"
        if found.precision == "float16"
        else units[found.precision],
        "head.chunk": "classes whose logits stay near a core" if found.device == "cpu" else "classes at a time",
        "training.threads": f"{hardware.cores()} cores over {ranks} process{'es' if ranks > 1 else ''}",
        "data.loader": "DALI is installed" if facts["data.loader"] == "dali" else "DALI is not installed",
    }
    return [Default(name, facts[name], reason) for name, reason in reasons.items()]


def verdicts(resolved: hardware.Resolved, measured: Measurements, ranks: int) -> list[str]:
    """Return findings: what is unusual about this machine, and the remedy."""
    return [
        *_on_precision(resolved, measured),
        *_on_layout(resolved, measured),
        *_on_software(resolved, measured),
        *_on_machine(measured, ranks),
    ]


def packages() -> dict[str, str | None]:
    """Return the versions of the project's packages; None for one that is not installed."""
    found: dict[str, str | None] = dict.fromkeys(PACKAGES)
    for distribution in importlib.metadata.distributions():
        name = str(distribution.metadata["Name"]).lower()
        for wanted in PACKAGES:
            # The names of DALI's and ONNX Runtime's packages end in their CUDA version.
            if name == wanted or (name.startswith(f"{wanted}-") and wanted in ("nvidia-dali", "onnxruntime")):
                found[wanted] = distribution.version
    return found


def system(device: torch.device) -> dict[str, str]:
    """Describe operating system, processor, GPU, cores, memory, and environment variables that limit them."""
    found = {
        "system": f"{platform.system()} {platform.release()}, {platform.machine()}",
        "Python": platform.python_version(),
        "processor": str(hardware.detect(torch.device("cpu"))),
        "cores": str(hardware.cores()),
    }
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        found["memory"] = f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 1e9:.1f} GB"
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
        found["card"] = f"{hardware.detect(device)}, {memory / 1e9:.1f} GB"
        found["cards"] = str(torch.cuda.device_count())
    caps = [f"{name}={os.environ[name]}" for name in CAPS if name in os.environ]
    return found | {"capped by": " ".join(caps) or "nothing"}


def _on_precision(resolved: hardware.Resolved, measured: Measurements) -> list[str]:
    """Compare the precisions, each in its faster layout."""
    fastest: dict[str, float] = {}
    for each in measured.convolutions:
        fastest[each.precision] = min(each.seconds, fastest.get(each.precision, each.seconds))
    auto = resolved.hardware.precision
    found = []
    for precision, seconds in fastest.items():
        ratio = seconds / fastest[auto]
        if precision != auto and ratio < 1 / _NOTABLE:
            found.append(
                f"{precision} is {1 / ratio:.1f}x faster here than {auto}, which auto takes: "
                f"try backbone.precision={precision}"
            )
        elif precision == "bfloat16" and auto == "float32" and ratio > _NOTABLE:
            found.append(f"bfloat16 is emulated here: {ratio:.1f}x slower than float32; auto is float32")
        elif precision == "float32" and ratio > _NOTABLE:
            found.append(f"{auto} is {ratio:.1f}x faster than float32 in convolutions; auto is {auto}")
    return found


def _on_layout(resolved: hardware.Resolved, measured: Measurements) -> list[str]:
    chosen = resolved.config.backbone
    seconds = {each.channels_last: each.seconds for each in measured.convolutions if each.precision == chosen.precision}
    if not seconds:
        return []
    ratio = seconds[bool(chosen.channels_last)] / seconds[not chosen.channels_last]
    if ratio < _NOTABLE:
        return []
    return [
        f"channels_last is {str(chosen.channels_last).lower()}, and a convolution is {ratio:.1f}x faster the other way "
        "here: see what recognition benchmark training --grid says of your backbone"
    ]


def _on_software(resolved: hardware.Resolved, measured: Measurements) -> list[str]:
    found = [
        f"{name}={os.environ[name]} may hold the processor back: unset it where that is not meant"
        for name in CAPS[:3]
        if name in os.environ
    ]
    lacking = hardware.compile_lacks(resolved.hardware.device)
    if lacking is not None:
        found.append(f"torch.compile lacks {lacking}: backbone.compile=true cannot be had")
    if resolved.config.data.loader == "torchvision":
        found.append(
            f"DALI is not installed: Pillow decodes, {measured.decoding['Pillow']:,.0f} faces a second and thread"
        )
    return found


def _on_machine(measured: Measurements, ranks: int) -> list[str]:
    found = []
    if measured.load > hardware.cores() / 2:
        found.append(
            f"other work keeps {hardware.cores()} cores busy (load {measured.load:.1f}): the rates are lower than they "
            "could be"
        )
    if ranks > hardware.cores():
        found.append(f"{ranks} processes share {hardware.cores()} cores: start fewer")
    if measured.disk.read < _SLOW_DISK:
        found.append(
            f"{measured.disk.folder} is read at {measured.disk.read / 1e6:.0f} MB/s: keep the data on a faster disk"
        )
    return found
