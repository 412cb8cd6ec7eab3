"""InsightFace's published state dicts give InsightFace's embeddings."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from recognition.config import Backbone as BackboneConfig
from recognition.errors import UserError
from recognition.models.backbone import build_backbone
from recognition.models.weights import load_weights, read_weights

OURS = {"r18": "iresnet18", "r50": "iresnet50", "mbf": "mobilefacenet"}


def published(shared_data: Path, network: str) -> dict[str, torch.Tensor]:
    """The state dict by the rule that stands beside the reference embeddings."""
    shapes = json.loads((shared_data / "formats" / "insightface_backbones.json").read_text())[network]
    state = {}
    for i, (name, shape) in enumerate(shapes):
        if name.endswith("num_batches_tracked"):
            state[name] = torch.tensor(0)
            continue
        w = np.sin(0.1 * np.arange(int(np.prod(shape))) + i)
        if name.endswith("running_var"):
            w = 1 + 0.5 * w * w
        elif len(shape) == 1:
            w = 1 + 0.1 * w if name.endswith("weight") else 0.1 * w
        else:
            w /= np.sqrt(np.prod(shape[1:]))
        state[name] = torch.from_numpy(w.reshape(shape)).float()
    return state


@pytest.mark.parametrize("network", OURS)
def test_reproduces_insightface(network: str, shared_data: Path, tmp_path: Path) -> None:
    expected = np.load(shared_data / "formats" / "insightface_backbones.npz")[network]
    torch.save(published(shared_data, network), tmp_path / "backbone.pth")
    backbone = build_backbone(BackboneConfig(name=OURS[network], precision="float32")).eval()
    load_weights(backbone, read_weights(tmp_path / "backbone.pth"), "backbone.pth")
    images = torch.from_numpy(np.sin(0.001 * np.arange(2 * 3 * 112 * 112)).reshape(2, 3, 112, 112)).float()
    with torch.inference_mode():
        embeddings = backbone(images).numpy()
    # Float32 here and where the files were made, through up to 50 layers: 2e-6 was found, of numbers of about 1.
    assert np.abs(embeddings - expected).max() < 1e-4
    assert not backbone.neck.output_norm.weight.requires_grad


def test_checkpoint_of_a_wrapped_network(shared_data: Path, tmp_path: Path) -> None:
    state = published(shared_data, "mbf")
    torch.save(
        {"epoch": 3, "state_dict_backbone": {f"module.{name}": tensor for name, tensor in state.items()}},
        tmp_path / "checkpoint_gpu_0.pt",
    )
    backbone = build_backbone(BackboneConfig(name="mobilefacenet"))
    load_weights(backbone, read_weights(tmp_path / "checkpoint_gpu_0.pt"), "checkpoint_gpu_0.pt")
    assert torch.equal(backbone.get_parameter("trunk.stem.0.conv.weight"), state["layers.0.layers.0.weight"])
    assert torch.equal(backbone.neck.linear.weight, state["features.layers.2.weight"])


def test_another_network_is_refused(shared_data: Path, tmp_path: Path) -> None:
    torch.save(published(shared_data, "mbf"), tmp_path / "backbone.pth")
    backbone = build_backbone(BackboneConfig(name="iresnet18", image_size=32, embedding_size=128))
    before = backbone.get_parameter("trunk.stem.0.weight").clone()
    with pytest.raises(UserError) as caught:
        load_weights(backbone, read_weights(tmp_path / "backbone.pth"), "backbone.pth")
    message = str(caught.value)
    assert "backbone.pth does not fit" in message
    assert "lacks trunk.stem.0.weight" in message
    assert "trunk.pool.conv.weight" in message or "trunk.stem.0.conv.weight" in message
    assert "neck.linear.weight [512, 512] for [128, 2048]" in message
    assert torch.equal(backbone.get_parameter("trunk.stem.0.weight"), before)
