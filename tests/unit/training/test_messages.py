import json
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from recognition.config import Config, Tracking
from recognition.runs.best import BestBackbone
from recognition.runs.folder import RunFolder
from recognition.tracking.tracker import Tracker
from recognition.training import messages


def settings(folder: Path, **changes: Any) -> Config:
    tree = {"data": {"path": "faces"}, "run": {"folder": str(folder)}} | changes
    return Config.model_validate_json(json.dumps(tree), context={"check_paths": False, "rendered": None})


def closing(config: Config, accuracies: dict[str, float], nonfinite: int = 0, start: int = 0) -> list[str]:
    folder = RunFolder(config.run.folder)
    with Tracker(
        folder.path,
        Tracking(),
        total_steps=3000,
        start_step=start,
        images_per_step=64,
        steps_per_epoch=1000.0,
        is_main=True,
    ) as tracker:
        return messages.closing(config, folder, tracker, accuracies, nonfinite=nonfinite)


@pytest.fixture(autouse=True)
def programs_on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(messages, "runnable", lambda program: program)


def test_a_run_without_sets_says_where_its_model_is_and_how_to_go_on(tmp_path: Path) -> None:
    folder = tmp_path / "my run"
    folder.mkdir()
    (folder / "model.onnx").write_bytes(b"")
    told = closing(settings(folder, training={"epochs": 3.0}), {})
    assert told == [
        "complete: 3,000 steps in 0:00:00",
        "model:",
        f"  {folder}/model.onnx",
        "evaluate it:",
        f"  recognition evaluate --model '{folder}' --pairs PAIRS",
        "go on: the same command, and",
        "  training.epochs=6 training.more_epochs=stretch",
        "curves:",
        f"  tensorboard --logdir '{folder}'",
    ]


def test_results_and_what_was_passed_over_are_told(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    BestBackbone(tmp_path).offer(nn.Linear(1, 1), step=2000, accuracy=0.99)
    lines = [json.dumps({"sample": sample, "rank": rank}) for rank, sample in enumerate((7, 9, 7))]
    folder.quarantine.write_text("\n".join([*lines, '{"sample": 1', "null", ""]))
    sets = {"evaluation": {"pairs": ["lfw.bin", "my set.bin"]}}
    told = closing(settings(tmp_path, **sets), {"lfw": 0.985, "my set": 0.9512}, nonfinite=4, start=1000)
    assert told[0].startswith("complete: 3,000 steps, 2,000 of them now in ")
    assert told[1:8] == [
        "accuracy on lfw: 98.50%",
        "accuracy on my set: 95.12%",
        "best mean accuracy: 99.00% at step 2,000",
        f"  {folder.best}",
        "images replaced as unusable: 2, listed in",
        f"  {folder.quarantine}",
        "not finite, so called off: 4 steps",
    ]
    assert f"  recognition evaluate --model {tmp_path} --pairs lfw.bin 'my set.bin'" in told
    assert "model:" not in told


@pytest.mark.parametrize("nonfinite", [0, 2])
def test_what_is_not_a_command_or_a_path_fits_forty_columns(tmp_path: Path, nonfinite: int) -> None:
    told = closing(settings(tmp_path), {"lfw": 0.985}, nonfinite)
    assert all(len(line) <= 40 for line in told if not line.startswith("  "))
