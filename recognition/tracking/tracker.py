"""The record of a run: TensorBoard, `metrics.jsonl`, `log.txt` and the terminal. Only the main rank writes files."""

import contextlib
import json
import logging
import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
import torch.distributed as dist
from rich.console import RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text
from torch import Tensor

from recognition.config import Config, Tracking
from recognition.errors import UserError
from recognition.files.atomic import write_text
from recognition.tracking import logs, terminal
from recognition.tracking.clock import Clock, Eta
from recognition.tracking.events import Events
from recognition.tracking.logs import Appender

logger = logging.getLogger(__name__)

PLAIN_SECONDS = 15.0
"""Time between two progress lines in `log.txt`, and on a standard error that is not a terminal."""
_BAR = 16


class Tracker:
    """Records a run in its folder and shows its progress on standard error; a context manager.

    A step, here, is the number of updates done so far: the first to be recorded is `start_step + 1`, the last
    `total_steps`. Records that an interrupted run left beyond `start_step` are dropped, from `metrics.jsonl`
    by rewriting it and from TensorBoard by its purge mark, so that no step stands there twice.

    On a terminal the progress is one live line; elsewhere it is a plain log line every `PLAIN_SECONDS`, without control
    characters. Other ranks write no file, and only warnings to standard error, marked with their rank.
    `every`: steps between two verifications and two checkpoints, as `Clock` takes them for the remaining time.
    Raises UserError if the folder cannot be written; what cannot be written later is left out, with one warning a file.
    """

    def __init__(
        self,
        run_folder: Path,
        config: Tracking,
        *,
        total_steps: int,
        start_step: int,
        images_per_step: int,
        steps_per_epoch: float,
        is_main: bool,
        every: Mapping[str, Sequence[int]] | None = None,
    ) -> None:
        self.config, self.is_main = config, is_main
        self.total_steps, self.start_step = total_steps, start_step
        self.images_per_step, self.steps_per_epoch = images_per_step, steps_per_epoch
        self.clock = Clock(total_steps, every)
        self._plain_at = -math.inf
        self._shown: set[str] = set()
        self._estimated = False
        self._step, self._line = start_step, ""
        self._numbers: dict[str, float] = {}
        self._eta: Eta | None = None
        self._settings: dict[str, Any] = {}
        self._live = contextlib.ExitStack()
        self._logs = contextlib.ExitStack()
        self._closed = False
        with contextlib.ExitStack() as stack:
            log = stack.enter_context(logs.setup_logging(0 if is_main else _rank() or 1))
            if is_main:
                try:
                    run_folder.mkdir(parents=True, exist_ok=True)
                    _drop_records_after(start_step, run_folder / "metrics.jsonl")
                    self._metrics = Appender(run_folder / "metrics.jsonl")
                    self._events = Events(run_folder, start_step + 1)
                    log.write_to(run_folder / "log.txt")
                except OSError as error:
                    raise UserError(f"run.folder: {run_folder} cannot be written: {error}") from error
            self._logs = stack.pop_all()

    def log_step(self, step: int, values: Mapping[str, float | Tensor]) -> None:
        """Log that `step` updates are done; to be called after each one, for the live line.

        `values` (`loss`, `lr`, ...; tensors are scalars) are recorded every `config.every_steps` steps and at the first
        and the last step. Only then are tensors read, so only then does the host wait for the device. To them come
        `images_per_second`, `data_seconds` (the main rank's wait for data per step since the last record) and
        `memory_gib`.
        """
        if not self.is_main or self._closed:
            return
        self._step = step
        is_last = step >= self.total_steps
        if is_last or step == self.start_step + 1 or step % self.config.every_steps == 0:
            self._record(step, {name: float(value) for name, value in values.items()}, is_last)

    def _record(self, step: int, numbers: dict[str, float], is_last: bool) -> None:
        rate = self.clock.rate(step)
        if rate is not None:
            numbers["images_per_second"] = rate * self.images_per_step
        data_seconds = self.clock.data_seconds(step, self.start_step)
        if data_seconds is not None:
            numbers["data_seconds"] = data_seconds
        numbers["memory_gib"] = peak_memory() / 2**30
        self._write(step, numbers)
        self._events.scalars({f"train/{name}": number for name, number in numbers.items()}, step)
        eta = None if rate is None else self.clock.eta(step, rate)
        if eta is not None and not self._estimated and not is_last:
            self._estimated = True
            speed = f"{numbers['images_per_second']:,.1f} img/s"
            logger.info("at %s, as the first steps go, training takes %s on this machine", speed, eta.about())
        if not self._line:
            self._live.enter_context(terminal.row(self._row))
        self._numbers, self._eta = numbers, eta
        self._line = "  ".join(text for _, text in self._parts()[1:])
        if is_last or time.monotonic() - self._plain_at >= PLAIN_SECONDS:
            self._plain_at = time.monotonic()
            logger.info("step %s/%s  %s", f"{step:,}", f"{self.total_steps:,}", self._line, extra={"is_progress": True})

    def log_config(self, config: Config) -> None:
        """Show the resolved settings in TensorBoard, and keep them for `log_results`."""
        if self.is_main and not self._closed:
            self._settings = dict(_leaves(config.model_dump(mode="json")))
            self._events.text("configuration", config.to_toml(), self.start_step)

    def log_results(self, accuracies: Mapping[str, float]) -> None:
        """Record the settings with the final accuracy of each set, for TensorBoard's table of runs."""
        if self.is_main and not self._closed:
            metrics = {f"verification/{name}/accuracy": accuracy for name, accuracy in accuracies.items()}
            self._events.hyperparameters(self._settings, metrics, self.total_steps)

    def log_images(self, tag: str, images: Tensor, step: int) -> None:
        """Show the first `config.preview_images` of a batch, once per tag: later calls do nothing.

        `images`: [n, 3, H, W], float in [-1, 1] or uint8.
        """
        if not self.is_main or self._closed or self.start_step or tag in self._shown or not self.config.preview_images:
            return
        self._shown.add(tag)
        images = images[: self.config.preview_images].detach()
        if images.dtype != torch.uint8:
            images = (images.float() * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)
        self._events.images(tag, images, step)

    def log_verification(
        self,
        step: int,
        name: str,
        result: Mapping[str, Any],
        scores: tuple[np.ndarray, np.ndarray] | None = None,
    ) -> None:
        """Record the results of a set after `step` updates, as `Verification.to_json` gives them.

        `scores`: cosines of the genuine and of the impostor pairs.
        """
        if not self.is_main or self._closed:
            return
        self._write(step, {"verification": name, **result})
        rates = result["tar_at_far"]
        scalars = {key: result[key] for key in ("accuracy", "threshold")}
        scalars |= {f"tar_at_far_{far}": rate for far, rate in rates.items() if rate is not None}
        self._events.scalars({f"verification/{name}/{key}": number for key, number in scalars.items()}, step)
        for kind, cosines in zip(("genuine", "impostor"), scores or (), strict=False):
            self._events.cosines(f"scores/{name}/{kind}", cosines, step)
        shown = ", ".join(f"{far}: {'n/a' if rate is None else f'{rate:.2%}'}" for far, rate in rates.items())
        logger.info(
            "%s",
            f"step {step:,}  {name}: accuracy {result['accuracy']:.2%} +- {result['accuracy_std']:.2%} "
            f"on {result['pairs']:,} pairs; TAR@FAR {shown}",
        )

    def note(self, text: str) -> None:
        """Log a line."""
        if self.is_main:
            logger.info("%s", text)

    def block(self, lines: Sequence[str]) -> None:
        """Log lines that belong together, below the live line, which ends; on a terminal without times."""
        if self.is_main:
            self._end_live_line()
            for line in lines:
                logger.info("%s", line, extra={"is_block": True})

    def warn(self, text: str) -> None:
        """Log a warning."""
        if self.is_main:
            logger.warning("%s", text)

    @contextmanager
    def pause(self, kind: str) -> Iterator[None]:
        """Count the time in here, in `verification` or `saving`, for the ETA but not for img/s. Not nested."""
        with self.clock.pause(kind):
            yield

    @contextmanager
    def saving(self, step: int) -> Iterator[None]:
        """Count the time in here as a pause, and record it as that of the checkpoint after `step` updates."""
        with self.clock.pause("saving"):
            yield
        if self.is_main and not self._closed:
            seconds = self.clock.last_pause("saving")
            self._write(step, {"checkpoint_seconds": round(seconds, 3)})
            self._events.scalars({"checkpoint/seconds": seconds}, step)

    def close(self) -> None:
        """Finish the files and the live line, which stays as it was last; a second call does nothing."""
        if self._closed:
            return
        self._closed = True
        self._end_live_line()
        self._logs.close()
        if self.is_main:
            self._events.close()
            self._metrics.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _write(self, step: int, values: Mapping[str, Any]) -> None:
        record = {"step": step, "epoch": round(step / self.steps_per_epoch, 6), "time": round(time.time(), 3)}
        self._metrics.write((json.dumps(_for_json(record | dict(values)), allow_nan=False) + "\n").encode())

    def _parts(self) -> list[tuple[int, str]]:
        """Return the texts of the progress with their ranks: a narrow terminal drops those of the highest first."""
        numbers = self._numbers
        forms = {"loss": (2, "loss {:.4f}"), "lr": (5, "lr {:.3g}"), "images_per_second": (3, "{:,.1f} img/s")}
        return [
            (0, f"step {self._step:,}/{self.total_steps:,}"),
            (4, f"epoch {self._step / self.steps_per_epoch:.2f}"),
            *((rank, form.format(numbers[name])) for name, (rank, form) in forms.items() if name in numbers),
            *([] if self._eta is None else [(1, str(self._eta))]),
        ]

    def _end_live_line(self) -> None:
        self._live.close()
        if self._line and terminal.is_terminal():
            self._eta = None
            terminal.write(self._text(terminal.width()))
        self._line = ""

    def _text(self, width: int) -> str:
        return terminal.fit(self._parts(), width)

    def _row(self, width: int) -> RenderableType:
        text = self._text(width)
        grid = Table.grid(padding=(0, 2, 0, 0))
        cells: list[RenderableType] = [Text(text, no_wrap=True, overflow="ellipsis")]
        if width >= len(text) + 2 + _BAR:
            cells.append(ProgressBar(self.total_steps, self._step, _BAR))
        grid.add_row(*cells)
        return grid


def peak_memory() -> int:
    """Return this process's peak memory in bytes: torch's allocations on its GPU, or resident memory without one.

    0 where the system does not say.
    """
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    try:
        import resource
    except ModuleNotFoundError:
        # On Windows.
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _for_json(value: Any) -> Any:
    """Convert to standard JSON values: NaN and infinity become null, undecodable bytes of a name their escapes."""
    if isinstance(value, dict):
        return {_for_json(key): _for_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_for_json(item) for item in value]
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _leaves(tree: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        name = f"{path}.{key}" if path else key
        if isinstance(value, dict) and value:
            yield from _leaves(value, name)
        else:
            yield name, value


def _drop_records_after(step: int, path: Path) -> None:
    """Rewrite a `metrics.jsonl` without the records beyond `step` and without a line that a crash cut short."""
    if not path.exists():
        return
    old = path.read_text(encoding="utf-8", errors="replace").split("\n")
    write_text(path, "".join(f"{line}\n" for line in old if _is_record_up_to(step, line)))


def _is_record_up_to(step: int, line: str) -> bool:
    try:
        record = json.loads(line)
    except json.JSONDecodeError:
        return False
    return isinstance(record, dict) and isinstance(record.get("step"), int) and record["step"] <= step
