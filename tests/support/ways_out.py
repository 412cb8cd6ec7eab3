"""A refusal and the way out that it names; small pictures to try it on."""

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from recognition.errors import UserError


def refusal(attempt: Callable[[], object]) -> str:
    with pytest.raises(UserError) as caught:
        attempt()
    return str(caught.value)


def way_out(message: str, pattern: str) -> re.Match[str]:
    found = re.search(pattern, message, re.DOTALL)
    assert found is not None, message
    return found


def picture(path: Path, side: int = 8, level: int = 90) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((side, side, 3), level, np.uint8)).save(path)
