"""The points at which tests inject faults are those that the code passes."""

import re
from pathlib import Path

import pytest

from recognition.runs import faults
from tests.support.faults import fault, forbidden, raising

PACKAGE = Path(faults.__file__).parents[1]


def test_every_point_is_passed_and_every_point_that_is_passed_is_known() -> None:
    text = "\n".join(path.read_text() for path in PACKAGE.rglob("*.py"))
    assert sorted(re.findall(r'faults\.reach\("([^"]+)"', text)) == sorted(faults.POINTS)
    with (
        pytest.raises(ValueError, match=r"no point 'steps'; there are batch, step,"),
        fault("steps", raising(KeyError())),
    ):
        pass


def test_a_fault_happens_where_it_is_to_and_has_to_happen() -> None:
    found: list[int] = []
    with fault("step", lambda step: found.append(step), step=3, times=1):
        for step in (2, 3, 3, 4):
            faults.reach("step", step=step)
        faults.reach("step done", step=3)
    faults.reach("step", step=3)
    assert found == [3]
    with pytest.raises(AssertionError, match=r"never happened: it was reached after \[1\] updates"):  # noqa: SIM117
        with fault("step", raising(KeyError()), step=2):
            faults.reach("step", step=1)
    with fault("step", raising(KeyError()), rank=1):  # which this process is not
        faults.reach("step", step=1)
    with pytest.raises(AssertionError, match="reached 'export'"), forbidden("export"):
        faults.reach("export", step=1)
    with forbidden("step"), pytest.raises(ValueError, match="has an action already"), forbidden("step"):
        pass
