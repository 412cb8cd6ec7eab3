"""Memory of this process and of the machine, as Linux and PyTorch report it."""

import gc
import threading
import time
from pathlib import Path

import torch

from recognition.errors import UserError

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")
_SAMPLE_SECONDS = 0.005


class PeakMemory:
    """Peak memory since this object was made, above what was in use then.

    On a CPU, the resident memory of the process: Linux's own maximum, or, where that cannot be reset, the maximum of
    samples that a thread takes. On a GPU, the memory that PyTorch has allocated.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
            self._start = torch.cuda.memory_allocated(device)
            return
        self._sampled: list[int] | None = None
        try:
            # Resets the maximum (proc_pid_clear_refs(5)).
            _CLEAR.write_text("5")
        except OSError:
            self._sampled = [0]
            threading.Thread(target=_sample, args=(self._sampled,), daemon=True).start()
        self._start = _bytes(_STATUS, "VmRSS")

    def peak(self) -> int:
        """Return the peak so far, in bytes."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device) - self._start
        peak = _bytes(_STATUS, "VmHWM") if self._sampled is None else max(*self._sampled, _bytes(_STATUS, "VmRSS"))
        return peak - self._start


def available_memory() -> int:
    """Return the bytes of the machine's memory that can be allocated without swapping."""
    return _bytes(Path("/proc/meminfo"), "MemAvailable")


def _bytes(path: Path, name: str) -> int:
    """Return the bytes in the line `name` of a file that gives them in kB.

    Raises UserError where there is no such file, as on macOS.
    """
    try:
        lines = path.read_text().splitlines()
    except OSError as error:
        raise UserError(f"memory is measured as Linux tells it: {error}") from None
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def _sample(peak: list[int]) -> None:
    while True:
        peak[0] = max(peak[0], _bytes(_STATUS, "VmRSS"))
        time.sleep(_SAMPLE_SECONDS)
