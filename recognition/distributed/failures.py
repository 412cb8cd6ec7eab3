"""The first failure among the ranks, shared with all: the user gets its reason, not the errors that follow from it."""

import contextlib
import json
import os
import re
import socket
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch._C._distributed_c10d import Store

from recognition.errors import FailedElsewhere, UserError, user_message

PATIENCE_SECONDS = 10.0
"""Seconds that a rank whose peers are gone waits for the reason of one of them."""
_FIRST, _SEEN = "recognition/first_failure", "recognition/failures_seen"
# Messages of gloo and NCCL about a peer that is gone or silent; their other errors are faults of this rank.
_LOST = re.compile(
    r"connection (closed|reset|refused)|by peer|connectFullMesh|pair closure|broken pipe|socket|timed? ?out"
    r"|remote process|ncclRemoteError|ncclSystemError|communicator was aborted",
    re.IGNORECASE,
)
_LATE = re.compile(r"timed? ?out", re.IGNORECASE)


@contextlib.contextmanager
def shared(store: Store | None, rank: int, world: int) -> Iterator[None]:
    """Turn an error in here that follows from another rank's into a FailedElsewhere with that rank's reason.

    The first error of all is raised as it is, with a note of the rank. On an error, the process group is left.
    `store`: the store at which the ranks meet; None for a rank that is alone.
    """
    try:
        yield
    except Exception as error:
        if store is None:
            raise
        own = _connection_lost(error) or error
        first = _first_failure(store, rank, own)
        if dist.is_initialized():
            # The others notice at once.
            dist.destroy_process_group()
        if rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
            _keep_store(store, world)
        if first["rank"] == rank:
            own.add_note(f"(rank {rank} of {world}, on {socket.gethostname()})")
            if own is error:
                raise
            raise own from error
        where = f"rank {first['rank']} of {world}, on {first['host']}"
        elsewhere = FailedElsewhere(f"{first['reason']}\n({where})")
        elsewhere.is_far, elsewhere.status = first["host"] != socket.gethostname(), first["status"]
        raise elsewhere from error


def _first_failure(store: Store, rank: int, error: Exception) -> dict[str, Any]:
    """Return the first failure on any rank: this error, unless another came before it or caused it."""
    sentence = user_message(error)
    reason = sentence if sentence is not None else f"{type(error).__name__}: {error}"
    host, status = socket.gethostname(), 1 if sentence is None else 2
    own = {"rank": rank, "host": host, "reason": reason, "status": status}
    try:
        if isinstance(error, FailedElsewhere | _ConnectionLost):
            with contextlib.suppress(RuntimeError):
                store.wait([_FIRST], timedelta(seconds=PATIENCE_SECONDS))
        first = json.loads(store.compare_set(_FIRST, "", json.dumps(own)))
        store.add(_SEEN, 1)
    except (RuntimeError, ValueError):
        # The store has gone with the rank that kept it.
        return own
    return dict(first)


class _ConnectionLost(UserError):
    """Another rank is gone or silent, which is seldom the first thing that went wrong."""


def _connection_lost(error: Exception) -> _ConnectionLost | None:
    """Return the error to show if `error` comes from a failed collective; None for any other error."""
    text = str(error)
    if not isinstance(error, RuntimeError) or not _LOST.search(text) or user_message(error) is not None:
        return None
    said = text.strip().splitlines()[0] if text.strip() else type(error).__name__
    if _LATE.search(text):
        return _ConnectionLost(
            f"another rank has not answered in time: {said}\nIt hangs, or is slower than distributed.timeout_seconds "
            "(distributed.init_timeout_seconds until the first step is done): raise that if it only is slow"
        )
    return _ConnectionLost(
        f"the connection to another rank is lost: {said}\nIts process was ended from outside, often for want of memory "
        "(`dmesg` or the scheduler's log says so), or its machine is gone. The same command goes on from the newest "
        "checkpoint"
    )


def _keep_store(store: Store, world: int) -> None:
    """Keep the store, which ends with this process, until all ranks have read it."""
    until = time.monotonic() + PATIENCE_SECONDS
    with contextlib.suppress(RuntimeError):
        while int(store.add(_SEEN, 0)) < world and time.monotonic() < until:
            time.sleep(0.05)
