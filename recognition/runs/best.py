"""The backbone with the best verification of a run: one safetensors file, with its step and accuracy in its metadata.

best.safetensors    the backbone's state dict; metadata `step` and `accuracy`, the mean over the sets, as JSON
best.pt, best.json  the files of earlier versions, which can still be read
"""

import json
import logging
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from recognition.errors import UserError
from recognition.files.atomic import replacing
from recognition.runs import faults

log = logging.getLogger(__name__)

BEST = "best.safetensors"
_OLD, _OLD_RECORD = "best.pt", "best.json"


class BestBackbone:
    """Keeps the backbone with the best verification so far in a run's folder.

    If writing fails, the backbone is kept in memory and written later, as a full disk should not end a run.
    """

    def __init__(self, run: Path) -> None:
        self.run = run
        self._waiting: tuple[dict[str, Tensor], dict[str, float]] | None = None

    def accuracy(self) -> float:
        """Return the accuracy of the best backbone so far; 0 where there is none."""
        record = read_record(self.run) if self._waiting is None else self._waiting[1]
        return float(record.get("accuracy", 0.0))

    def offer(self, backbone: nn.Module, step: int, accuracy: float) -> None:
        """Keep the backbone's state dict if `accuracy`, the mean over the sets, beats the best so far."""
        if accuracy > self.accuracy():
            # A copy, as training goes on; contiguous, as safetensors wants it.
            state = {
                name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
                for name, tensor in backbone.state_dict().items()
            }
            self._waiting = state, {"step": step, "accuracy": accuracy}
        self.write()

    def write(self) -> None:
        """Write a backbone that has not been written yet; warn where that fails."""
        if self._waiting is None:
            return
        state, record = self._waiting
        path = self.run / BEST
        metadata = {"format": "pt"} | {name: json.dumps(value) for name, value in record.items()}
        try:
            faults.reach("best backbone", step=int(record["step"]), path=path)
            with replacing(path) as temporary:
                # Not by `save_file`, whose files nobody else may read.
                temporary.write_bytes(save(state, metadata))
            for old in (_OLD, _OLD_RECORD):
                (self.run / old).unlink(missing_ok=True)
        except OSError as error:
            log.warning("%s cannot be written (%s): it is tried again at the next checkpoint", path, error)
        else:
            self._waiting = None


def find_best(run: Path) -> Path | None:
    """Return the file of the best backbone of a run, or None where it has none."""
    return next((run / name for name in (BEST, _OLD) if (run / name).exists()), None)


def read_record(run: Path) -> dict[str, Any]:
    """Read `step` and `accuracy` of the best backbone; empty where there is none or it cannot be read."""
    path = find_best(run)
    try:
        if path is None:
            return {}
        found = _read_metadata(path) if path.name == BEST else json.loads((run / _OLD_RECORD).read_text("utf-8"))
        return found if isinstance(found, dict) else {}
    except (OSError, ValueError, SafetensorError):
        return {}


def read_best(run: Path) -> tuple[Path, dict[str, Tensor], dict[str, Any]]:
    """Read the best backbone: its file, its state dict on the CPU, and its step and accuracy.

    Raises UserError where there is none or it cannot be read, with the way out.
    """
    path = find_best(run)
    old = path is not None and path.name == _OLD
    if path is None or (old and not (run / _OLD_RECORD).exists()):
        raise UserError(
            f"{run} has no {BEST if path is None else _OLD_RECORD}, which a run keeps that verifies "
            "(evaluation.pairs); --which last takes its newest checkpoint"
        )
    try:
        if old:
            state = torch.load(path, map_location="cpu", weights_only=True)
            return path, state, dict(json.loads((run / _OLD_RECORD).read_text(encoding="utf-8")))
        with safe_open(path, "pt") as file:
            return path, {name: file.get_tensor(name) for name in file.keys()}, _read_metadata(path)  # noqa: SIM118
    except Exception as error:  # a damaged file may raise any exception
        damaged = f"{path} or {_OLD_RECORD} is" if old else f"{path} is"
        raise UserError(
            f"{damaged} damaged ({type(error).__name__}); --which last takes the newest checkpoint"
        ) from None


def _read_metadata(path: Path) -> dict[str, Any]:
    with safe_open(path, "pt") as file:
        found = file.metadata() or {}
    return {name: json.loads(found[name]) for name in ("step", "accuracy")}
