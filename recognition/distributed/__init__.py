"""Processes that train together: who they are, what they agree on, how they fail and wait."""

from recognition.distributed.group import (
    Interrupt,
    ProcessInfo,
    absent,
    all_gather_rows,
    any_rank,
    broadcast_object,
    gather_objects,
    reduce_scatter_rows,
    set_timeout,
    shard_rows,
    split,
    start,
    start_reduce_scatter_rows,
    stop,
)

__all__ = [
    "Interrupt",
    "ProcessInfo",
    "absent",
    "all_gather_rows",
    "any_rank",
    "broadcast_object",
    "gather_objects",
    "reduce_scatter_rows",
    "set_timeout",
    "shard_rows",
    "split",
    "start",
    "start_reduce_scatter_rows",
    "stop",
]
