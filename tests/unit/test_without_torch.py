"""Verification of an ONNX file where neither torch nor DALI is installed."""

import json
import pickle
import subprocess
import sys
from io import BytesIO
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from PIL import Image

REPOSITORY = Path(__file__).parents[2]

PROGRAM = """
import json, sys
for name in ("torch", "torchvision", "timm", "nvidia", "nvidia.dali", "triton"):
    sys.modules[name] = None  # importing it raises ModuleNotFoundError

from recognition.config import Export, Evaluation
from recognition.deploy.onnx_embedder import OnnxEmbedder
from recognition.evaluation.verification import embed_pairs, verify
from recognition.evaluation.verification_sets import open_sets
from pathlib import Path

model, pairs = map(Path, sys.argv[1:])
embedder = OnnxEmbedder(model)
(found,) = open_sets([pairs], embedder.image_size)
print(json.dumps(verify(embed_pairs(embedder, found, batch=7), found.same).to_json()))
"""


def png(colour: int) -> bytes:
    buffer = BytesIO()
    Image.new("RGB", (8, 8), (colour, 255 - colour, 90)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A network whose embedding is the mean of each channel."""
    node = helper.make_node("ReduceMean", ["x"], ["y"], axes=[2, 3], keepdims=0)
    ends = [helper.make_tensor_value_info(*end) for end in (("x", TensorProto.FLOAT, ["n", 3, 8, 8]), ("y", 1, None))]
    graph = helper.make_graph([node], "means", ends[:1], ends[1:])
    path = tmp_path / "model.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def test_a_set_is_verified(model: Path, tmp_path: Path) -> None:
    # Genuine pairs are equal, impostor pairs the opposite in two channels: all are told apart.
    same = np.arange(20) % 2 == 0
    images = [png(colour) for genuine in same for colour in (10, 10 if genuine else 245)]
    pairs = tmp_path / "set.bin"
    pairs.write_bytes(pickle.dumps((images, same.tolist())))
    command = [sys.executable, "-c", PROGRAM, str(model), str(pairs)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert (result["accuracy"], result["pairs"], result["tar_at_far"]["1e-1"]) == (1.0, 20, 1.0)
