"""TensorBoard's event file, written record by record, so that a full disk costs records and not the run."""

import io
import secrets
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter
from torch import Tensor
from torch.utils.tensorboard import summary as summaries

from recognition.tracking.logs import Appender
from recognition.tracking.terminal import escape

BINS = np.linspace(-1, 1, 81)
"""Edges of a histogram of cosines."""


class Events:
    """An event file in a folder; earlier files' records from `purge_step` on are no longer shown. Raises OSError."""

    def __init__(self, folder: Path, purge_step: int) -> None:
        now = time.time()
        # Readers take files by name, so by time. Machines may share a name and a process number: neither is unique.
        name = f"events.out.tfevents.{now:.6f}.{socket.gethostname()}.{secrets.token_hex(4)}"
        self._file = Appender(folder / name)
        self._write(Event(wall_time=now, file_version="brain.Event:2"))
        self._write(Event(wall_time=now, step=purge_step, session_log=SessionLog(status=SessionLog.START)))

    def scalars(self, numbers: Mapping[str, float], step: int) -> None:
        """Write numbers by tag."""
        values = [Summary.Value(tag=escape(tag), simple_value=number) for tag, number in numbers.items()]
        self._add(Summary(value=values), step)

    def images(self, tag: str, images: Tensor, step: int) -> None:
        """Write uint8 images [n, 3, H, W] as one picture."""
        self._add(summaries.image(escape(tag), images.cpu().numpy(), dataformats="NCHW"), step)

    def text(self, tag: str, text: str, step: int) -> None:
        """Write a text as it stands."""
        lines = "\n".join(f"    {escape(line)}" for line in text.split("\n"))  # Markdown's code block
        self._add(summaries.text(escape(tag), lines), step)

    def cosines(self, tag: str, cosines: np.ndarray, step: int) -> None:
        """Write the histogram of numbers in [-1, 1], whose bins are the same for all."""
        values = np.clip(np.asarray(cosines, np.float64).ravel(), -1, 1)
        if not len(values):
            return
        counts, _ = np.histogram(values, BINS)
        total, squares = float(values.sum()), float(np.square(values).sum())
        extent = float(BINS[0]), float(BINS[-1]), len(values), total, squares
        self._add(summaries.histogram_raw(escape(tag), *extent, BINS[1:].tolist(), counts.tolist()), step)

    def hyperparameters(self, settings: Mapping[str, Any], metrics: Mapping[str, float], step: int) -> None:
        """Write the settings of a run that is complete, whose results are the scalars of the tags in `metrics`."""
        shown = {
            escape(name): value if isinstance(value, bool | int | float) else escape(str(value))
            for name, value in settings.items()
        }
        for part in summaries.hparams(shown, {escape(tag): number for tag, number in metrics.items()}):
            self._add(part, step)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _add(self, summary: Any, step: int) -> None:
        self._write(Event(wall_time=time.time(), step=step, summary=summary))

    def _write(self, event: Any) -> None:
        record = io.BytesIO()
        RecordWriter(record).write(event.SerializeToString())
        self._file.write(record.getvalue())
