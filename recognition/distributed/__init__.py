"""Processes that train together: their ranks and launchers, collectives, shared failures and waiting."""

from recognition.distributed.group import (
    Interrupt,
    ProcessInfo,
    all_gather_rows,
    any_rank,
    broadcast_object,
    gather_objects,
    missing_ranks,
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
    "all_gather_rows",
    "any_rank",
    "broadcast_object",
    "gather_objects",
    "missing_ranks",
    "reduce_scatter_rows",
    "set_timeout",
    "shard_rows",
    "split",
    "start",
    "start_reduce_scatter_rows",
    "stop",
]
