"""The planner's arithmetic."""

import importlib.util
import json
import time
from pathlib import Path
from types import ModuleType

import pytest
import torch

from recognition import config
from recognition.benchmarks.memory import PeakMemory
from recognition.models.backbone import Backbone
from recognition.planning.backbone import backbone_cost
from recognition.planning.head import HeadPlan

TOOL = Path(__file__).resolve().parents[3] / "tools" / "plan.py"


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    specification = importlib.util.spec_from_file_location("plan_tool", TOOL)
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def plan(classes: int = 1_000_000, ranks: int = 2, batch: int = 64, device: str = "cuda", **settings) -> HeadPlan:
    optimizer = settings.pop("optimizer", config.SGD())
    return HeadPlan(config.Head(**settings), classes, ranks, batch, device=device, optimizer=optimizer)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        # Bytes of a class with 512 numbers and its norm.
        ({}, 4100),
        ({"row_format": "split"}, 4100),
        ({"row_format": "bfloat16"}, 2052),
        ({"optimizer": config.AdamW()}, 6152),
        ({"inactive_rows": "lazy"}, 4104),
        ({"subcenters": 3}, 12300),
        ({"loss": config.Softmax()}, 4108),
    ],
)
def test_state_of_a_class(settings, expected) -> None:
    assert plan(classes=1_000_000, ranks=8, **settings).state_bytes == 125_000 * expected
    # The first ranks have the most.
    assert plan(classes=9, ranks=8, **settings).state_bytes == 2 * expected


def test_other_parts() -> None:
    assert plan(center=config.Center()).memory["centres"] == 500_000 * 512 * 4
    small, large = plan(sample_rate=0.01), plan(sample_rate=0.1)
    assert large.state_bytes == small.state_bytes
    assert large.memory["sampling"] - small.memory["sampling"] == 8 * 45_000
    # Logits are those of a chunk, so that more classes do not make them larger.
    assert plan(classes=10**9).memory["workspace"] == plan().memory["workspace"]
    workspace = plan(batch=128, device="cpu", chunk=100, precision="float32").memory["workspace"]
    assert workspace == 256 * 100 * 12


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        # Read for the logits; read and written, with each moment.
        ({"precision": "float32"}, 4 + 2 * 4 + 2 * 4),
        ({"precision": "float32", "row_format": "split"}, 4 + 2 * 4 + 2 * 4),
        ({"row_format": "split"}, 2 + 2 * 4 + 2 * 4),
        ({"row_format": "bfloat16"}, 2 + 2 * 2 + 2 * 2),
        ({"precision": "float32", "optimizer": config.AdamW()}, 4 + 3 * 2 * 4),
    ],
)
def test_traffic_of_a_class(settings, expected) -> None:
    assert plan(**settings).traffic == 500_000 * 512 * expected
    assert plan(sample_rate=0.1, **settings).traffic == 50_000 * 512 * expected


def test_operations_and_wire() -> None:
    assert plan().flops == 8 * 128 * 500_000 * 512
    assert plan(sample_rate=0.1).flops == 8 * 128 * 50_000 * 512
    # The batch's own classes take part whatever the rate.
    assert plan(sample_rate=0.0).active_rows == 64
    assert plan(classes=3, sample_rate=0.5).active_rows == 2
    assert not sum(plan(ranks=1).wire.values())
    wire = plan(ranks=8, batch=1024).wire
    assert wire["all-gather of embeddings"] == 7 * 1024 * 512 * 2
    assert wire["reduce-scatter of gradients"] == 7 * 1024 * 512 * 4
    assert plan(precision="float32").wire["all-gather of embeddings"] == 64 * 512 * 4


def test_counts_a_backbone_as_it_is() -> None:
    settings = config.Backbone(name="resnet10t", image_size=32, embedding_size=24, precision="bfloat16")
    cost = backbone_cost(settings)
    backbone = Backbone(settings)
    assert cost.parameters == sum(parameter.numel() for parameter in backbone.parameters())
    cached_exp: dict[int, int] = {}
    own = {parameter.data_ptr() for parameter in backbone.parameters()}
    flops = 0

    def count(module: torch.nn.Conv2d | torch.nn.Linear, _, output: torch.Tensor) -> None:
        nonlocal flops
        flops += 2 * output.numel() * module.weight[0].numel()

    for module in backbone.modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
            module.register_forward_hook(count)

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.data_ptr() not in own:
            cached_exp[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            scale_and_bias.append(tensor)
        return tensor

    scale_and_bias: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        embeddings = backbone(torch.zeros(8, 3, 32, 32))
    assert cost.forward_flops * 8 == flops
    # What a layer keeps is counted by its kind, and some keep a little more, such as means and masks.
    assert cost.copied_bytes + cost.activation_bytes * 8 == pytest.approx(sum(cached_exp.values()), rel=0.15)
    assert embeddings.shape == (8, 24)


GIVEN = ["--gpus", "8", "--gpu-memory", "80", "--backbone", "mobilefacenet", "--json"]


def run(tool: ModuleType, capsys, *arguments: str) -> tuple[int, str, dict]:
    status = tool.main([*GIVEN, *arguments])
    text = capsys.readouterr().out
    return status, text, json.loads(text.splitlines()[-1])


def test_a_run_that_fits(tool: ModuleType, capsys) -> None:
    status, text, found = run(tool, capsys, "--classes", "10000000")
    assert status == 0
    assert "it fits" in text
    assert found["fits"] and not found["nearest"]
    assert found["memory_bytes"] == sum(found["memory"].values())
    assert found["memory"]["head: class weights"] == 1_250_000 * 2048
    assert found["floor_seconds"] == pytest.approx(sum(found["floor"].values()))
    # 8 B n D operations at 790 TFLOP/s.
    assert found["floor"]["head"] == pytest.approx(8 * 1024 * 1_250_000 * 512 / 790e12)
    assert found["images_per_second"] == pytest.approx(0.4 * 1024 / found["floor_seconds"])
    slower = run(tool, capsys, "--classes", "10000000", "--tflops", "79", "--efficiency", "1")[2]
    assert slower["floor"]["backbone"] == pytest.approx(10 * found["floor"]["backbone"])


def test_the_backbones_gradient_hides_behind_its_backward_pass(tool: ModuleType, capsys) -> None:
    sent = 2 * 4 * backbone_cost(config.Backbone(name="mobilefacenet")).parameters * 7 // 8
    found = run(tool, capsys, "--classes", "1000", "--link", "0.001")[2]
    assert found["wire"]["all-reduce of the backbone's gradient"] == sent
    beyond = sent / 1e6 - found["floor"]["backbone"] * 2 / 3
    assert found["floor"]["gradient, beyond the backward pass"] == pytest.approx(beyond, rel=1e-9)
    assert found["floor"]["head's collectives"] == pytest.approx((found["wire_bytes"] - sent) / 1e6)
    assert not run(tool, capsys, "--classes", "1000")[2]["floor"]["gradient, beyond the backward pass"]


@pytest.mark.parametrize("classes", ["100000000", "1000000000"])
def test_what_fits_instead(tool: ModuleType, capsys, classes: str) -> None:
    status, text, found = run(tool, capsys, "--classes", classes, "--gpu-memory", "40")
    assert status == 0
    assert "it does not fit" in text
    changes = [each["change"] for each in found["nearest"]]
    assert (
        changes
        == {
            "100000000": ["--row-format bfloat16", "--gpus 16"],
            "1000000000": ["--gpus 128", "--row-format bfloat16 --gpus 64"],
        }[classes]
    )
    for each in found["nearest"]:
        again = run(tool, capsys, "--classes", classes, "--gpu-memory", "40", *each["change"].split())[2]
        assert again["fits"]
        assert again["memory_bytes"] == each["memory_bytes"]
        # One machine fewer would not do.
        if "--gpus" in each["change"]:
            fewer = [*each["change"].split()[:-1], str(int(each["change"].split()[-1]) - 8)]
            assert not run(tool, capsys, "--classes", classes, "--gpu-memory", "40", *fewer)[2]["fits"]


def test_a_smaller_batch_may_fit(tool: ModuleType, capsys) -> None:
    arguments = ["--classes", "1000", "--gpu-memory", "8", "--batch"]
    found = run(tool, capsys, *arguments, "4096")[2]
    change = found["nearest"][0]["change"]
    assert change.startswith("--batch ")
    batch = int(change.split()[1])
    assert run(tool, capsys, *arguments, str(batch))[2]["fits"]
    assert not run(tool, capsys, *arguments, str(batch + 1))[2]["fits"]


def test_nothing_may_fit(tool: ModuleType, capsys) -> None:
    _, text, found = run(tool, capsys, "--classes", "1000", "--gpu-memory", "1")
    assert not found["nearest"]
    assert "nothing near" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--backbone", "mobilefacenets"], "did you mean mobilefacenet"),
        (["--sample-rate", "2"], "--sample-rate: "),
    ],
)
def test_mistakes_are_told(tool: ModuleType, capsys, arguments: list[str], message: str) -> None:
    assert tool.main([*GIVEN, "--classes", "100", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--gpus", "0"], ["--gpu-memory", "nan"], ["--batch", "1.5"]])
def test_what_is_no_number_is_refused(tool: ModuleType, capsys, arguments: list[str]) -> None:
    assert tool.main([*GIVEN, "--classes", "100", *arguments]) == 2
    assert "is not a" in capsys.readouterr().err


@pytest.mark.parametrize("sampled", [False, True])
def test_peak_memory_sees_what_is_freed_again(sampled: bool, monkeypatch, tmp_path) -> None:
    if sampled:
        # As where a process may not reset its maximum.
        monkeypatch.setattr("recognition.benchmarks.memory._CLEAR", tmp_path)
    size = 64_000_000
    before = torch.ones(3 * size, dtype=torch.uint8)
    del before
    memory = PeakMemory(torch.device("cpu"))
    scale_and_bias = torch.ones(size, dtype=torch.uint8)
    other = scale_and_bias + 1
    time.sleep(0.05)
    del scale_and_bias, other
    # Beside 128 MB, what the interpreter and its threads take meanwhile.
    assert memory.peak() == pytest.approx(2 * size, rel=0.1)
