"""Of ranks that fail together, the one with a reason is heard."""

import functools
from typing import Any

import pytest
import torch
import torch.distributed as dist

from recognition.distributed import local_ranks
from recognition.errors import UserError


class Work:
    def __init__(self, device: torch.device) -> None:
        self.device = device

    def fail(self, kind: type[Exception]) -> Any:
        if dist.get_rank() == 1:
            raise kind("file x is missing")
        dist.all_reduce(torch.zeros(1))


@pytest.mark.parametrize(("kind", "seen"), [(UserError, UserError), (KeyError, RuntimeError)])
def test_the_reason_of_one_rank(kind: type[Exception], seen: type[Exception]) -> None:
    start = functools.partial(local_ranks.processes, 2, Work, device="cpu", threads=1, less="fewer")
    with start(preload="recognition.training.trainer") as group, pytest.raises(seen, match="file x is missing"):
        group.call("fail", kind)
