"""What the measurements of a machine count, and what they leave behind."""

from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from recognition.benchmarks import machine
from recognition.errors import UserError

CPU = torch.device("cpu")


def test_products_count_two_operations_a_term(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(machine._SIDE, "cpu", 32)
    counts = []

    def count(work, device, budget):
        with FlopCounterMode(display=False) as counter:
            work()
        counts.append(counter.get_total_flops())
        return 0.5

    monkeypatch.setattr(machine, "_seconds", count)
    rates = machine.products(CPU, 0.0)
    assert list(rates) == ["float32", "bfloat16", "float16"]
    assert list(rates.values()) == [count / 0.5 for count in counts]


def test_convolutions_count_both_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_BATCH", 2)
    counts, layouts = [], []

    def count(work, device, budget):
        with FlopCounterMode(display=False) as counter:
            tensors = work()
        counts.append(counter.get_total_flops())
        images = tensors if isinstance(tensors, torch.Tensor) else tensors[0]
        layouts.append((str(images.dtype), images.is_contiguous(memory_format=torch.channels_last)))
        return 0.25

    monkeypatch.setattr(machine, "_seconds", count)
    found = machine.convolutions(CPU, 0.0)
    assert [rate for each in found for rate in (each.forward, each.backward)] == [count / 0.25 for count in counts]
    wanted = [(f"torch.{each.precision}", each.channels_last) for each in found for _ in range(2)]
    assert layouts == wanted
    assert {(each.precision, each.channels_last) for each in found} == {
        (precision, layout) for precision in ("float32", "bfloat16") for layout in (True, False)
    }


def test_a_disk_is_left_as_it_was(tmp_path: Path) -> None:
    found = machine.disk(tmp_path, 1 << 20)
    assert found.folder == str(tmp_path) and found.write > 0 and found.read > 0
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"missing: No such file or directory: .*--folder"):
        machine.disk(tmp_path / "missing", 1 << 20)
