"""What `auto` becomes on hardware that is not here: its answers to torch's questions stand in for it."""

from pathlib import Path
from typing import Any

import pytest
import torch

from recognition import config, hardware
from recognition.config import Config
from recognition.errors import UserError
from recognition.hardware import Hardware, Resolved

TINY = Path(__file__).resolve().parents[1] / "integration" / "tiny.toml"
CPU, GPU = torch.device("cpu"), torch.device("cuda")


class Machine:
    """Stands in for the processor and the card of this one."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self._patch = patch
        patch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
        patch.setattr(hardware, "_processor_name", lambda: "Processor")
        patch.setattr(torch.version, "hip", None)

    def processor(self, capability: str, onednn: bool, /, **capabilities: Any) -> None:
        """`onednn`: whether oneDNN says that it has bfloat16, which it says of every AVX-512."""
        self._patch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
        self._patch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: onednn)
        self._patch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)

    def card(self, name: str, *capability: int) -> None:
        self._patch.setattr(torch.cuda, "get_device_name", lambda device: name)
        self._patch.setattr(torch.cuda, "get_device_capability", lambda device: capability)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(monkeypatch)


def settings(*overrides: str) -> Config:
    return config.load(TINY, ["head.precision=auto", *overrides])


def resolve(settings: Config, device: torch.device, **options: Any) -> Resolved:
    return hardware.resolve(settings, hardware.detect(device), **options)


AVX2 = ("AVX2", False, {"avx2": True, "avx512_f": False, "avx512_bf16": False, "amx_bf16": False})
SKYLAKE = ("AVX512", True, {"avx2": True, "avx512_f": True, "avx512_bf16": False, "amx_bf16": False})
ZEN4 = ("AVX512", True, {"avx512_f": True, "avx512_bf16": True, "amx_bf16": False})
SAPPHIRE_RAPIDS = ("AVX512", True, {"avx512_f": True, "avx512_bf16": True, "amx_bf16": True})
GRAVITON2 = ("DEFAULT", False, {"neon": True, "bf16": False, "sve": False})
GRAVITON3 = ("SVE256", True, {"neon": True, "bf16": True, "sve_bf16": True, "sve_max_length": 256})
PROCESSORS: dict[str, tuple[tuple[str, bool, dict[str, Any]], str, str]] = {
    "AVX2": (AVX2, "float32", "AVX2"),
    "AVX-512 without bfloat16": (SKYLAKE, "float32", "AVX-512"),
    "AVX-512 with bfloat16": (ZEN4, "bfloat16", "AVX-512 with bfloat16"),
    "AMX": (SAPPHIRE_RAPIDS, "bfloat16", "AVX-512 with bfloat16"),
    "Arm without bfloat16": (GRAVITON2, "float32", "no vector units that torch uses"),
    "Arm with bfloat16": (GRAVITON3, "bfloat16", "SVE256 with bfloat16"),
}
CARDS = {
    "Pascal": (("Tesla P100", 6, 0), "float32"),
    "Volta": (("Tesla V100", 7, 0), "float16"),
    "Turing": (("Tesla T4", 7, 5), "float16"),
    "Ampere": (("NVIDIA A100", 8, 0), "bfloat16"),
    "Hopper": (("NVIDIA H100", 9, 0), "bfloat16"),
}


@pytest.mark.parametrize("name", PROCESSORS)
def test_processors(machine: Machine, name: str) -> None:
    (capability, onednn, capabilities), precision, units = PROCESSORS[name]
    machine.processor(capability, onednn, **capabilities)
    assert hardware.detect(CPU) == Hardware("cpu", "Processor", units, precision)  # type: ignore[arg-type]
    assert str(hardware.detect(CPU)) == f"Processor ({units})"
    resolved = resolve(settings(), CPU)
    assert (resolved.config.backbone.precision, resolved.config.head.precision) == (precision, precision)
    assert resolved.notes == ()
    assert hardware.product_type("auto", CPU) == hardware.DTYPES[precision]


@pytest.mark.parametrize("name", CARDS)
def test_cards(machine: Machine, name: str) -> None:
    card, precision = CARDS[name]
    machine.card(*card)
    assert hardware.detect(GPU) == Hardware("cuda", card[0], "compute capability {}.{}".format(*card[1:]), precision)  # type: ignore[arg-type]
    resolved = resolve(settings(), GPU)
    # The head has no products in float16.
    head = "float32" if precision == "float16" else precision
    assert (resolved.config.backbone.precision, resolved.config.head.precision) == (precision, head)
    assert resolved.notes == ()
    assert hardware.product_type("auto", GPU) == hardware.DTYPES[head]


@pytest.mark.parametrize("native", [True, False])
def test_cards_of_amd(machine: Machine, monkeypatch: pytest.MonkeyPatch, native: bool) -> None:
    machine.card("AMD Instinct", 9, 4)
    monkeypatch.setattr(torch.version, "hip", "7.0")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native or including_emulation)
    assert hardware.detect(GPU) == Hardware("cuda", "AMD Instinct", "ROCm", "bfloat16" if native else "float16")


def test_apples_gpu(machine: Machine) -> None:
    assert hardware.detect(torch.device("mps")) == Hardware("mps", "Processor", "Metal", "float32")


@pytest.mark.parametrize(
    ("cap", "native"),
    [
        ("AVX2", False),
        ("avx2", False),
        ("AVX2_VNNI", False),
        ("AVX512_CORE", False),
        ("AVX512_CORE_VNNI", False),
        ("AVX512_CORE_BF16", True),
        ("AVX512_CORE_FP16", True),
        ("AVX512_CORE_AMX", True),
        ("AVX10_1_512", True),
        ("ALL", True),
        ("DEFAULT", True),
    ],
)
def test_a_capped_onednn_computes_in_float32(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, cap: str, native: bool
) -> None:
    machine.processor(*SAPPHIRE_RAPIDS[:2], **SAPPHIRE_RAPIDS[2])
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", cap)
    assert hardware.detect(CPU).precision == ("bfloat16" if native else "float32")


def test_nothing_is_left_to_be_decided(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine.processor(*AVX2[:2], **AVX2[2])
    monkeypatch.setattr(hardware, "cores", lambda: 7)
    resolved = resolve(settings(), CPU, local_world=2)
    assert resolved.config.training.threads == 3
    facts = resolved.to_json()
    assert facts["head.chunk"] == hardware.head_chunk("cpu") != hardware.head_chunk("cuda")
    assert facts["device"] == "Processor (AVX2)"
    assert not {"auto", 0, None} & {value for value in facts.values() if not isinstance(value, bool)}
    assert resolve(resolved.config, CPU).config == resolved.config
    # More processes than cores have a thread each all the same.
    assert resolve(settings(), CPU, local_world=8).config.training.threads == 1


def test_what_is_asked_for_stays(machine: Machine) -> None:
    machine.processor(*ZEN4[:2], **ZEN4[2])
    asked = {
        "backbone.precision": "float32",
        "backbone.channels_last": False,
        "backbone.compile": False,
        "head.precision": "float32",
        "head.chunk": 77,
        "training.threads": 5,
    }
    resolved = resolve(settings(*(f"{name}={str(value).lower()}" for name, value in asked.items())), CPU)
    assert asked.items() <= resolved.to_json().items()
    assert resolved.notes == ()


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_a_precision_that_is_emulated_is_said_to_be(machine: Machine, precision: str) -> None:
    machine.processor(*AVX2[:2], **AVX2[2])
    resolved = resolve(settings(f"backbone.precision={precision}"), CPU)
    assert resolved.config.backbone.precision == precision
    [note] = resolved.notes
    assert note.startswith(f"backbone.precision: Processor (AVX2) has no units for {precision}")
    assert "float32" in note


def test_a_run_keeps_its_precision_on_other_hardware(machine: Machine) -> None:
    machine.processor(*ZEN4[:2], **ZEN4[2])
    before = resolve(settings(), CPU).to_json()
    assert (before["backbone.precision"], before["head.precision"]) == ("bfloat16", "bfloat16")
    assert resolve(settings(), CPU, before=before).notes == ()
    machine.processor(*AVX2[:2], **AVX2[2])
    resolved = resolve(settings(), CPU, before=before)
    assert (resolved.config.backbone.precision, resolved.config.head.precision) == ("bfloat16", "bfloat16")
    for name, note in zip(("backbone.precision", "head.precision"), resolved.notes, strict=True):
        assert note.startswith(f"{name}: the run goes on in bfloat16, as it began; Processor (AVX2) would take float32")
        assert f"{name}=float32" in note
    # On what decides alike nothing is said, and on the way back the run is what it was.
    machine.processor(*ZEN4[:2], **ZEN4[2])
    assert resolve(settings(), CPU, before=resolved.to_json()).notes == ()


def test_a_run_changes_its_precision_when_it_is_asked_to(machine: Machine) -> None:
    machine.processor(*ZEN4[:2], **ZEN4[2])
    before = resolve(settings(), CPU).to_json()
    resolved = resolve(settings("backbone.precision=float32"), CPU, before=before)
    assert (resolved.config.backbone.precision, resolved.config.head.precision) == ("float32", "bfloat16")
    assert resolved.notes == ("backbone.precision: the run began in bfloat16 and goes on in float32",)


@pytest.mark.parametrize("name", ["Pascal", "Volta", "Turing"])
@pytest.mark.parametrize("setting", ["backbone.precision", "head.precision"])
@pytest.mark.parametrize("kept", [True, False], ids=["of the run", "asked for"])
def test_bfloat16_on_a_card_without_it_is_refused_with_the_way_out(
    machine: Machine, name: str, setting: str, kept: bool
) -> None:
    card, precision = CARDS[name]
    machine.card(*card)
    way_out = "float32" if setting == "head.precision" else precision
    before = {setting: "bfloat16"} if kept else None
    asked = [] if kept else [f"{setting}=bfloat16"]
    with pytest.raises(UserError, match=rf"{setting} is bfloat16, which {card[0]} .* cannot compute") as refusal:
        resolve(settings(*asked), GPU, before=before)
    assert f"{setting}={way_out}" in str(refusal.value)
    resolved = resolve(settings(f"{setting}={way_out}"), GPU, before=before)
    assert resolved.to_json()[setting] == way_out
    assert resolved.notes == ((f"{setting}: the run began in bfloat16 and goes on in {way_out}",) if kept else ())


def test_a_run_in_float16_goes_on_in_float16_on_a_newer_card(machine: Machine) -> None:
    machine.card("Tesla V100", 7, 0)
    before = resolve(settings(), GPU).to_json()
    machine.card("NVIDIA A100", 8, 0)
    resolved = resolve(settings(), GPU, before=before)
    assert (resolved.config.backbone.precision, resolved.config.head.precision) == ("float16", "float32")
    assert len(resolved.notes) == 2


@pytest.mark.parametrize(
    ("names", "precision"),
    [
        (["Ampere", "Hopper"], "bfloat16"),
        (["Ampere", "Volta"], "float16"),
        (["Turing", "Volta"], "float16"),
        (["Hopper", "Pascal"], "float32"),
        (["Pascal", "Volta"], "float32"),
    ],
)
def test_different_cards_compute_in_what_all_of_them_have(machine: Machine, names: list[str], precision: str) -> None:
    found = []
    for name in names:
        machine.card(*CARDS[name][0])
        found.append(hardware.detect(GPU))
    for order in (found, found[::-1]):
        together = hardware.weakest(order)
        assert (together.device, together.precision) == ("cuda", precision)
        assert all(each.name in str(together) and each.units in str(together) for each in found)
    assert hardware.weakest(found[:1] * 3) == found[0]


def test_different_processors_compute_in_what_all_of_them_have(machine: Machine) -> None:
    found = []
    for capability, onednn, capabilities in (ZEN4, AVX2):
        machine.processor(capability, onednn, **capabilities)
        found.append(hardware.detect(CPU))
    assert hardware.weakest(found) == Hardware("cpu", "Processor", "AVX-512 with bfloat16 and AVX2", "float32")


@pytest.mark.parametrize(
    ("there", "asked", "chosen"),
    [
        ({"nvidia", "nvidia.dali"}, "auto", "dali"),
        ({"nvidia", "nvidia.dali"}, "torchvision", "torchvision"),
        ({"nvidia"}, "auto", "torchvision"),
        (set(), "auto", "torchvision"),
    ],
)
def test_the_loader_is_dali_where_it_is_installed(
    monkeypatch: pytest.MonkeyPatch, there: set[str], asked: str, chosen: str
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name if name in there else None)
    assert hardware.loader(asked) == chosen
    if chosen == "torchvision" and asked == "auto":
        with pytest.raises(UserError, match=r"not installed.*data\.loader=torchvision"):
            hardware.loader("dali")
