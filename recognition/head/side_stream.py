"""Work beside the work: what nobody waits for runs on a stream of its own."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class SideStream:
    """A second stream of a GPU; on other devices all of it runs at once and in order."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    @contextmanager
    def use(self, *read: Tensor | None) -> Iterator[None]:
        """What is launched inside runs after all that was launched before, and beside what comes later.

        `read`: tensors from outside that it reads; their memory is not given to others before it is done.
        """
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream):
            yield
        for tensor in read:
            if tensor is not None:
                tensor.record_stream(self._stream)

    def wait(self) -> None:
        """What is launched from here on runs after all that ran aside. The host does not wait."""
        if self._stream is not None:
            torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)
