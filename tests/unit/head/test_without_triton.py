"""Triton may be missing: the head imports and takes PyTorch all the same."""

import subprocess
import sys
from pathlib import Path

CODE = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "triton":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Missing())
import torch
import recognition.head
from recognition.head.backends.pytorch import PyTorchBackend
from recognition.head.backends.select import select_backend
from recognition.head.losses import triton_code
assert triton_code.tl is None and "triton" not in sys.modules
import importlib.util
importlib.util.find_spec = lambda name: None
assert isinstance(select_backend("auto", torch.device("cpu")), PyTorchBackend)
"""


def test_the_head_imports_without_triton() -> None:
    subprocess.run([sys.executable, "-c", CODE], check=True, cwd=Path(__file__).parents[3])
