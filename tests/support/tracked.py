"""Trackers of small runs, and what they leave."""

import io
import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from recognition.config import Tracking
from recognition.tracking import clock
from recognition.tracking import tracker as tracker_module
from recognition.tracking.tracker import Tracker

RESULT = {
    "accuracy": 0.9912,
    "accuracy_std": 0.0031,
    "threshold": 1.53,
    "tar_at_far": {"1e-1": 0.998, "1e-3": 0.985, "1e-4": None},
    "pairs": 6000,
}


def tracker(folder: Path, **changes: Any) -> Tracker:
    settings: dict[str, Any] = {
        "total_steps": 25,
        "start_step": 0,
        "images_per_step": 64,
        "steps_per_epoch": 10.0,
        "is_main": True,
        "config": Tracking(every_steps=10, preview_images=4),
    } | changes
    return Tracker(folder, settings.pop("config"), **settings)


def run(folder: Path, first: int, last: int, **changes: Any) -> None:
    """Record steps `first` to `last`, whose loss is 100 / step."""
    with tracker(folder, start_step=first - 1, **changes) as track:
        for step in range(first, last + 1):
            track.log_step(step, {"loss": torch.tensor(100 / step), "lr": 0.1})


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def events(folder: Path) -> EventAccumulator:
    accumulator = EventAccumulator(
        str(folder), size_guidance={"scalars": 0, "images": 0, "histograms": 0, "tensors": 0}
    )
    accumulator.Reload()
    return accumulator


def scalars(folder: Path, tag: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in events(folder).Scalars(tag)]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def fake_time(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    for module in (tracker_module, clock):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now[0], time=time.time))
    return now
