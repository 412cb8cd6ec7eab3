"""Modules that are frozen stay bit for bit what they were; the rest trains, alone and over ranks."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from recognition import config
from recognition.config import Backbone as BackboneConfig
from recognition.models.backbone import Backbone, build_backbone, describe
from recognition.runs.checkpoint import read_tensors
from recognition.training import trainer
from tests.support.faults import fault, interrupt
from tests.support.ranks import launch_ranks


def small(*freeze: str, **fields: Any) -> Backbone:
    given = {"name": "resnet10t", "image_size": 32, "embedding_size": 16, "dropout": 0.5, "precision": "float32"}
    return build_backbone(BackboneConfig(**given | fields, freeze=freeze), seed=1)  # type: ignore[arg-type]


def moved(backbone: Backbone) -> set[str]:
    """Tensors that some steps of plain SGD with weight decay change."""
    before = copy.deepcopy(backbone.state_dict())
    learning = [parameter for parameter in backbone.parameters() if parameter.requires_grad]
    backbone.eval().train()
    target = torch.randn(8, 16, generator=torch.Generator().manual_seed(9))
    for step in range(3):  # the last norm of a residual block begins at zero, and lets nothing through in the first
        backbone.zero_grad()
        images = torch.rand(8, 3, 32, 32, generator=torch.Generator().manual_seed(step))
        (backbone(images) - target).square().sum().backward()
        with torch.no_grad():
            for parameter in learning:
                assert parameter.grad is not None
                parameter.sub_(0.01 * (parameter.grad + parameter))
    return {name for name, tensor in backbone.state_dict().items() if not torch.equal(tensor, before[name])}


@pytest.mark.parametrize("freeze", [("trunk.conv1", "trunk.layer1"), ("trunk",), ("neck.norm", "trunk.layer4.0.bn1")])
def test_frozen_modules_stay_with_their_statistics_and_the_others_move(freeze: tuple[str, ...]) -> None:
    # The scale of the last norm is never trained.
    everything = set(small().state_dict()) - {"neck.output_norm.weight"}
    frozen = {name for name in everything if name.startswith(tuple(f"{each}." for each in freeze))}
    backbone = small(*freeze)
    assert moved(backbone) == everything - frozen
    assert all(parameter.grad is None for name, parameter in backbone.named_parameters() if name in frozen)


def test_frozen_dropout_does_not_drop() -> None:
    backbone = small("neck", "trunk").train()
    images = torch.rand(4, 3, 32, 32)
    assert torch.equal(backbone(images), backbone(images))
    assert torch.equal(backbone(images), backbone.eval()(images))


def test_how_much_trains_is_said() -> None:
    settings = BackboneConfig(name="iresnet18", image_size=32, freeze=("trunk.stem", "trunk.stages.3"))
    backbone = build_backbone(settings)
    trains = sum(parameter.numel() for parameter in backbone.parameters() if parameter.requires_grad) / 1e6
    assert describe(backbone, settings).endswith(f"of which {trains:.1f} M train; frozen: trunk.stem, trunk.stages.3")


@pytest.fixture(scope="module")
def faces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("faces")
    generator = np.random.default_rng(0)
    for person in range(4):
        (folder / f"p{person}").mkdir()
        for image in range(6):
            pixels = generator.integers(0, 256, (32, 32, 3), np.uint8)
            Image.fromarray(pixels).save(folder / f"p{person}" / f"{image}.png")
    return folder


def run(faces: Path, folder: Path, *overrides: str) -> bool:
    """Train for four steps."""
    path = folder.with_suffix(".toml")
    path.write_text(
        f'run.folder = "{folder}"\ndata = {{path = "{faces}", index_folder = "{folder.parent}"}}\n'
        'backbone = {name = "resnet10t", image_size = 32, embedding_size = 16, dropout = 0.5, precision = "float32"}\n'
        "training = {epochs = 4, global_batch = 24, threads = 1}\nexport.enabled = false\nhead.precision = 'float32'\n"
        "optimizer.lr = 0.05\ncheckpoint.every_steps = 2\n"
    )
    return trainer.train(config.load(path, overrides))


def still(run: Path) -> set[str]:
    """Tensors of the backbone that a run left as they were drawn."""
    settings = config.load(run / "config.toml", check_paths=False)
    start = build_backbone(settings.backbone, settings.run.seed).state_dict()
    end = read_tensors(run / "checkpoints/step-00000004", "backbone.")
    return {name for name, tensor in start.items() if torch.equal(tensor, end[f"backbone.{name}"])}


FREEZE = {"trunk": 'backbone.freeze=["trunk"]', "whole": 'backbone.freeze=["trunk", "neck"]'}


@pytest.mark.parametrize("freeze", FREEZE)
def test_over_ranks_the_rest_trains(faces: Path, tmp_path: Path, freeze: str) -> None:
    assert launch_ranks(run, 2, faces, tmp_path / "run", FREEZE[freeze]) == [True, True]
    expected = set(small().state_dict())
    if freeze == "trunk":
        expected = {name for name in expected if not name.startswith("neck.")} | {"neck.output_norm.weight"}
    assert still(tmp_path / "run") == expected
    head = read_tensors(tmp_path / "run/checkpoints/step-00000004", "head.weight")["head.weight"]
    assert not torch.equal(head, read_tensors(tmp_path / "run/checkpoints/step-00000002", "head.weight")["head.weight"])
    assert "M train; frozen: trunk" in (tmp_path / "run/log.txt").read_text()


def test_a_run_that_is_stopped_and_continued_is_bit_for_bit_the_one_that_was_not(faces: Path, tmp_path: Path) -> None:
    freeze = 'backbone.freeze=["trunk.conv1", "trunk.layer1", "neck.norm"]'
    assert run(faces, tmp_path / "whole", freeze)

    with fault("step done", interrupt, step=2):
        run(faces, tmp_path / "parts", freeze)
    assert run(faces, tmp_path / "parts", freeze)
    whole, parts = (read_tensors(tmp_path / name / "checkpoints/step-00000004") for name in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    assert all(torch.equal(tensor, parts[name]) for name, tensor in whole.items())
    frozen = ("trunk.conv1.", "trunk.layer1.", "neck.norm.", "neck.output_norm.weight")
    assert still(tmp_path / "whole") == {name for name in small().state_dict() if name.startswith(frozen)}
    assert not [name for name in whole if name.startswith("optimizer.") and "trunk.layer1." in name]
