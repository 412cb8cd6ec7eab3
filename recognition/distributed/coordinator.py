"""Work that some ranks do while the others wait: the main rank, or one rank of each machine first, or each rank.

The work has no time limit, as indexing a large folder takes hours, but it must not fall silent for too long. A rank at
work sends heartbeats: a thread raises a counter in the process group's store, but only while the process uses
its processor or reports progress (`progress.task`), so that one that hangs on a disk falls silent.
"""

import contextlib
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from torch.distributed.distributed_c10d import PrefixStore, Store

from recognition import distributed
from recognition.distributed import ProcessInfo
from recognition.errors import FailedElsewhere, UserError
from recognition.files import lock
from recognition.tracking import progress

T = TypeVar("T")

_BUSY = 0.01
"""Share of one processor above which a process is taken to be at work; threads that only wait use a tenth of it."""


class Coordinator:
    """Coordinator of work that some ranks do while the others wait. All ranks call its methods in the same order.

    A failure on one rank stops all: that rank raises its error again, the others raise FailedElsewhere.
    """

    def __init__(self, ranks: ProcessInfo, silence: float) -> None:
        """Agree on a name with the other ranks.

        `silence`: seconds without a heartbeat after which a wait raises UserError.
        """
        self.ranks, self.silence = ranks, silence
        names, self._processes = zip(
            *distributed.gather_objects((secrets.token_hex(8), lock.this_process())), strict=True
        )
        self._name = names[0]
        self._calls = 0

    def on_main(self, what: str, work: Callable[[], object]) -> None:
        """Do `work` on the main rank."""
        self.on_each(what, work if self.ranks.is_main else None)

    def local_first(self, what: str, work: Callable[[], T], *, shared: bool = False) -> T:
        """Do `work` on the first rank of each machine, then on the others, which find its files there.

        `shared`: on the main rank before the other machines, too, as they may see the same files.
        """
        first = self.ranks.local_rank == 0
        result: T | None = None
        main = self.ranks.is_main
        rounds = [main, first and not main, not first] if shared else [first, not first]
        for mine in rounds:
            done = self.on_each(what, work if mine else None)
            result = done if mine else result
        return result  # type: ignore[return-value]

    def on_each(self, what: str, work: Callable[[], T] | None) -> T | None:
        """Do each rank's own `work`, if it has any, and return its result once all ranks are done.

        `what`: name of the work in messages.
        """
        self._calls += 1
        result: T | None = None
        error: BaseException | None = None
        if self.ranks.store is None:
            return None if work is None else work()
        store = PrefixStore(f"{self._name}/{self._calls}", self.ranks.store)
        if work is not None:
            try:
                with _heartbeats(store, self.silence):
                    result = work()
            except Exception as caught:
                error = caught
        store.set(f"done/{self.ranks.rank}", "")
        self._wait(store, what)
        failed = distributed.any_rank(error is not None)
        if error is not None:
            raise error
        if failed:
            raise FailedElsewhere(f"{what}: another rank failed")
        return result

    def _wait(self, store: Store, what: str) -> None:
        """Return when all ranks are done."""
        seen, since, pause = "", time.monotonic(), 0.001
        waited_for = list(range(self.ranks.world))
        while waited_for := [rank for rank in waited_for if not store.check([f"done/{rank}"])]:
            for rank in waited_for:
                if not lock.is_alive(self._processes[rank]) and not store.check([f"done/{rank}"]):
                    raise UserError(f"{what}: the process of rank {rank} has ended; its message, if any, says why")
            now = f"{len(waited_for)} {store.add('beats', 0)}"
            if now != seen:
                seen, since = now, time.monotonic()
            elif time.monotonic() - since > self.silence:
                listed = ", ".join(str(rank) for rank in waited_for)
                raise UserError(
                    f"{what}: rank {listed} has shown no sign of work for {self.silence:g} seconds. Look whether its "
                    "disk or network hangs; distributed.init_timeout_seconds is how long the others bear with it"
                )
            time.sleep(pause)
            pause = min(2 * pause, 0.5)


@contextlib.contextmanager
def _heartbeats(store: Store, silence: float) -> Iterator[None]:
    """Send heartbeats as long as the block uses the processor or reports progress."""
    finished = threading.Event()
    advanced = threading.Event()
    pause = min(1.0, silence / 5)

    def beat() -> None:
        used = time.process_time()
        while not finished.wait(pause):
            before, used = used, time.process_time()
            if advanced.is_set() or used - before > _BUSY * pause:
                advanced.clear()
                store.add("beats", 1)

    thread = threading.Thread(target=beat, name="beat", daemon=True)
    stop_listening = progress.on_advance(advanced.set)
    thread.start()
    try:
        yield
    finally:
        stop_listening()
        finished.set()
        thread.join()
