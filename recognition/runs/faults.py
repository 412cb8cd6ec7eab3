"""Points of a run at which a test may inject a fault: an error, a delay, or the end of the process.

The code that runs passes a point with `reach`, which finds nothing to do unless a test has injected an action there
with `inject`. So tests say where a fault happens by a name that is written down here, and patch no private function.
`tests/support/faults.py` restricts a fault to a step and a rank, and asserts that it happened.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

Action = Callable[..., None]
"""Called with the point's values as keywords: `step`, the number of updates done so far, and those in `POINTS`."""

POINTS: dict[str, str] = {
    "batch": "A batch has been read: `trainer`, `batch`.",
    "step": "An update is about to be done: `trainer`.",
    "step done": "An update has been done: `trainer`.",
    "verification": "The verification sets are about to be embedded: `trainer`.",
    "export": "The ONNX file is about to be written: `trainer`.",
    "best backbone": "The file of the best backbone is about to be written: `path`.",
    "checkpoint shards": "Each rank is about to write its tensors: `folder`, which has a temporary name.",
    "checkpoint hashes": "Each rank has written its tensors and is about to hash them: `folder`.",
    "checkpoint manifest": "The main rank is about to check all files and to write the manifest: `folder`.",
    "checkpoint name": "The main rank is about to give the complete folder its final name: `folder`.",
    "checkpoint latest": "The folder has its final name, `latest` still names the previous one: `folder`.",
    "checkpoint retention": "Older checkpoints are about to be removed: `folder`.",
}
"""Every point, and the values that its action gets besides `step`."""

_actions: dict[str, Action] = {}


def reach(point: str, *, step: int, **values: Any) -> None:
    """Pass `point` after `step` updates; calls the action that a test has injected there, if any."""
    action = _actions.get(point)
    if action is not None:
        action(step=step, **values)


@contextlib.contextmanager
def inject(point: str, action: Action) -> Iterator[None]:
    """Have `action` called whenever this process reaches `point`. Raises ValueError where that cannot be."""
    if point not in POINTS:
        raise ValueError(f"no point {point!r}; there are {', '.join(POINTS)}")
    if point in _actions:
        raise ValueError(f"the point {point!r} has an action already")
    _actions[point] = action
    try:
        yield
    finally:
        del _actions[point]
