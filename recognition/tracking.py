"""What a run tells: TensorBoard, `metrics.jsonl`, `log.txt` and the terminal. Only the main rank writes files."""

import json
import logging
import math
import os
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from recognition.config import Tracking, UserError

logger = logging.getLogger(__name__)

PLAIN_SECONDS = 15.0
"""Time between two progress lines in `log.txt`, and on a standard error that is not a terminal."""
WINDOW = 20
"""Records over which the throughput is measured."""


class Tracker:
    """Records a run in its folder and shows its progress on standard error; a context manager.

    A step, here, is the number of updates done so far: the first to be recorded is `start_step + 1`, the last
    `total_steps`. Records that an interrupted run left beyond `start_step` are dropped, from `metrics.jsonl`
    by rewriting it and from TensorBoard by its purge mark, so that no step stands there twice.

    On a terminal the progress is one live line; elsewhere it is a plain log line every `PLAIN_SECONDS`, without control
    characters. Other ranks write no file, and only warnings to standard error, marked with their rank.
    Raises UserError if the folder cannot be written.
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
    ) -> None:
        self.config, self.is_main = config, is_main
        self.total_steps, self.start_step = total_steps, start_step
        self.images_per_step, self.steps_per_epoch = images_per_step, steps_per_epoch
        self._clock = Clock()
        self._plain_at = -math.inf
        self._shown: set[str] = set()
        self._estimated = False
        self._progress: Progress | None = None
        self._handlers: list[logging.Handler] = []
        self._closed = False
        if not is_main:
            self._attach(logging.StreamHandler(sys.stderr), f"[rank {_rank()}] %(levelname)s %(name)s: %(message)s")
            return
        try:
            run_folder.mkdir(parents=True, exist_ok=True)
            _drop_records_after(start_step, run_folder / "metrics.jsonl")
            self._metrics = (run_folder / "metrics.jsonl").open("a", encoding="utf-8", buffering=1)
            self._writer = SummaryWriter(str(run_folder), purge_step=start_step + 1, flush_secs=10)
            log_file = logging.FileHandler(run_folder / "log.txt", encoding="utf-8")
        except OSError as error:
            raise UserError(f"run.folder: {run_folder} cannot be written: {error}") from error
        self._attach(log_file, "%(asctime)s %(levelname)s %(name)s: %(message)s")
        if sys.stderr.isatty() and os.environ.get("TERM", "dumb") != "dumb":
            self._progress = _live_line(total_steps, start_step)
            self._attach(_LiveHandler(self._progress.console), "%(asctime)s %(levelname)s %(message)s")
        else:
            self._attach(logging.StreamHandler(sys.stderr), "%(asctime)s %(levelname)s %(message)s")
        self._package_level = logging.getLogger("recognition").level
        logging.getLogger("recognition").setLevel(logging.INFO)

    def log_step(self, step: int, values: Mapping[str, float | Tensor]) -> None:
        """Tell that `step` updates are done; best called after each one, for the live line's sake.

        `values` (`loss`, `lr`, ...; tensors are scalars) are recorded every `config.every_steps` steps and at the first
        and the last step. Only then are tensors read, so only then does the host wait for the device.
        """
        if not self.is_main or self._closed:
            return
        is_last = step >= self.total_steps
        if is_last or step == self.start_step + 1 or step % self.config.every_steps == 0:
            self._record(step, {name: float(value) for name, value in values.items()}, is_last)
        elif self._progress is not None:
            self._progress.update(self._progress.task_ids[0], completed=step)

    def _record(self, step: int, numbers: dict[str, float], is_last: bool) -> None:
        rate = self._clock.rate(step)
        if rate is not None:
            numbers["images_per_second"] = rate * self.images_per_step
        numbers["memory_gib"] = peak_memory() / 2**30
        self._write(step, numbers)
        for name, number in numbers.items():
            self._writer.add_scalar(f"train/{name}", number, step)
        eta = None if rate is None else (self.total_steps - step) / rate
        if eta is not None and not self._estimated and not is_last:
            self._estimated = True
            speed = f"{numbers['images_per_second']:,.1f} img/s"
            logger.info("at %s, as the first steps go, training takes %s on this machine", speed, _about(eta))
        line = _line(step / self.steps_per_epoch, numbers, eta)
        if self._progress is not None:
            self._progress.start()
            self._progress.update(self._progress.task_ids[0], completed=step, line=line)
        if is_last or time.monotonic() - self._plain_at >= PLAIN_SECONDS:
            self._plain_at = time.monotonic()
            logger.info("step %s/%s  %s", f"{step:,}", f"{self.total_steps:,}", line, extra={"is_progress": True})

    def images(self, tag: str, images: Tensor, step: int) -> None:
        """Show the first `config.images` of a batch, once per tag: later calls and those of a resumed run do nothing.

        `images`: [n, 3, H, W], float in [-1, 1] or uint8.
        """
        if not self.is_main or self._closed or self.start_step or tag in self._shown or not self.config.images:
            return
        self._shown.add(tag)
        images = images[: self.config.images].detach()
        if images.dtype != torch.uint8:
            images = (images.float() * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)
        self._writer.add_images(tag, images.cpu(), step)

    def verification(self, step: int, name: str, result: Mapping[str, Any]) -> None:
        """Record a set's numbers after `step` updates: those of a `Verification`, as its `to_json` gives them."""
        if not self.is_main or self._closed:
            return
        self._write(step, {"verification": name, **result})
        rates = result["tar_at_far"]
        scalars = {key: result[key] for key in ("accuracy", "threshold")}
        scalars |= {f"tar_at_far_{far}": rate for far, rate in rates.items() if rate is not None}
        for key, number in scalars.items():
            self._writer.add_scalar(f"verification/{name}/{key}", number, step)
        shown = ", ".join(f"{far}: {'n/a' if rate is None else f'{rate:.2%}'}" for far, rate in rates.items())
        logger.info(
            f"step {step:,}  {name}: accuracy {result['accuracy']:.2%} +- {result['accuracy_std']:.2%} "
            f"on {result['pairs']:,} pairs; TAR@FAR {shown}"
        )

    def note(self, text: str) -> None:
        """A line for the reader, in the log and on the terminal."""
        if self.is_main:
            logger.info("%s", text)

    def warn(self, text: str) -> None:
        """A line that the reader should not miss."""
        if self.is_main:
            logger.warning("%s", text)

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Time spent in here, verifying or saving, counts neither for img/s nor for the ETA. Not to be nested."""
        start = time.monotonic()
        try:
            yield
        finally:
            self._clock.lost += time.monotonic() - start

    def close(self) -> None:
        """Finish the files and the live line; a second call does nothing."""
        if self._closed:
            return
        self._closed = True
        if self._progress is not None:
            self._progress.stop()
        if self.is_main:
            self._writer.close()
            self._metrics.close()
            logging.getLogger("recognition").setLevel(self._package_level)
        for handler in self._handlers:
            logging.getLogger().removeHandler(handler)
            handler.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _attach(self, handler: logging.Handler, form: str) -> None:
        handler.setFormatter(logging.Formatter(form, datefmt="%Y-%m-%d %H:%M:%S"))
        handler.setLevel(logging.INFO if self.is_main else logging.WARNING)
        logging.getLogger().addHandler(handler)
        self._handlers.append(handler)

    def _write(self, step: int, values: Mapping[str, Any]) -> None:
        record = {"step": step, "epoch": round(step / self.steps_per_epoch, 6), "time": round(time.time(), 3)}
        self._metrics.write(json.dumps(_without_nan(record | dict(values)), allow_nan=False) + "\n")


class Clock:
    """Steps per second over the last records, `lost` seconds of pauses not counted."""

    def __init__(self) -> None:
        self.lost = 0.0
        self._marks: deque[tuple[int, float]] = deque(maxlen=WINDOW + 1)

    def rate(self, step: int) -> float | None:
        """Steps per second up to `step`, which was just done.

        None for the first: it paid for starting, compiling and filling queues, so the window begins after it.
        """
        self._marks.append((step, time.monotonic() - self.lost))
        (first, start), (last, now) = self._marks[0], self._marks[-1]
        return (last - first) / (now - start) if last > first and now > start else None


def peak_memory() -> int:
    """Peak memory of this process in bytes: what torch has allocated on its GPU, or resident memory without one.

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


class _LiveHandler(logging.Handler):
    """Prints above the live line, all but the progress that the live line shows itself."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self.console = console

    def emit(self, record: logging.LogRecord) -> None:
        if not getattr(record, "is_progress", False):
            self.console.print(self.format(record), markup=False, highlight=False, soft_wrap=True)


def _live_line(total_steps: int, start_step: int) -> Progress:
    progress = Progress(
        TextColumn("step {task.completed:,}/{task.total:,}", markup=False),
        TextColumn("{task.fields[line]}", markup=False),
        BarColumn(bar_width=16),
        console=Console(file=sys.stderr, force_terminal=True),
        refresh_per_second=4,
    )
    progress.add_task("", total=total_steps, completed=start_step, line="")
    return progress


def _line(epoch: float, numbers: Mapping[str, float], eta: float | None) -> str:
    forms = {"loss": "loss {:.4f}", "lr": "lr {:.3g}", "images_per_second": "{:,.1f} img/s"}
    parts = [f"epoch {epoch:.2f}", *(form.format(numbers[name]) for name, form in forms.items() if name in numbers)]
    return "  ".join(parts if eta is None else [*parts, f"ETA {timedelta(seconds=round(eta))}"])


def _about(seconds: float) -> str:
    """A time to come, no more exactly than it can be known."""
    if seconds < 90:
        return f"about {math.ceil(seconds / 10) * 10} seconds"
    if seconds < 90 * 60:
        return f"about {round(seconds / 60)} minutes"
    return f"about {round(seconds / 3600)} hours" if seconds < 36 * 3600 else f"about {round(seconds / 86400)} days"


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _without_nan(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become null."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _drop_records_after(step: int, path: Path) -> None:
    """Rewrite a `metrics.jsonl` without the records beyond `step` and without a line that a crash cut short."""
    if not path.exists():
        return
    temporary = path.with_name(f"{path.name}.tmp")
    with path.open(encoding="utf-8", errors="replace") as old, temporary.open("w", encoding="utf-8") as new:
        new.writelines(line.rstrip("\n") + "\n" for line in old if _is_record_up_to(step, line))
    os.replace(temporary, path)


def _is_record_up_to(step: int, line: str) -> bool:
    try:
        record = json.loads(line)
    except json.JSONDecodeError:
        return False
    return isinstance(record, dict) and isinstance(record.get("step"), int) and record["step"] <= step
