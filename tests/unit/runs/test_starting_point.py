"""A backbone's weights from another run, one of its checkpoints, or a file; and a run's backbone for export."""

import hashlib
import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from recognition import distributed
from recognition.config import Backbone as BackboneConfig
from recognition.config import Config, Data, Distributed, Run
from recognition.errors import UserError
from recognition.models.backbone import Backbone, build_backbone
from recognition.runs.best import BestBackbone
from recognition.runs.checkpoint import Checkpoints
from recognition.runs.folder import RunFolder, load_backbone
from recognition.runs.starting_point import start_from
from tools import export

SMALL = BackboneConfig(name="resnet10t", image_size=32, embedding_size=16, neck="pool", precision="float32")


def weights(seed: int) -> dict[str, torch.Tensor]:
    return build_backbone(SMALL, seed).state_dict()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A run's folder with checkpoints of two steps, and no best backbone."""
    path = tmp_path_factory.mktemp("runs") / "first"
    folder = RunFolder(path)
    folder.create()
    folder.save_config(Config(run=Run(folder=path), data=Data(path=path), backbone=SMALL))
    distributed.start(Distributed(backend="gloo"), torch.get_num_threads())
    checkpoints = Checkpoints(folder.checkpoints, keep=2)
    for step in (1, 2):
        tensors = {f"backbone.{name}": tensor for name, tensor in weights(step).items()}
        checkpoints.save(step, tensors | {"head.weight": torch.zeros(3, 16)}, {"step": step, "config": {}})
    distributed.stop()
    yield path


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of it, to be changed."""
    return shutil.copytree(finished, tmp_path / "run")


def start(path: Path, run: Path, **fields: Any) -> tuple[Backbone, list[str]]:
    settings = SMALL.model_copy(update={"weights": path} | fields)
    backbone = build_backbone(settings, seed=9)
    return backbone, start_from(backbone, settings, run, goes_on=False)


def holds(backbone: Backbone, seed: int) -> bool:
    expected = weights(seed)
    return all(torch.equal(tensor, expected[name]) for name, tensor in backbone.state_dict().items())


@pytest.mark.parametrize(
    ("inside", "step"),
    [("", 2), ("checkpoints", 2), ("checkpoints/step-00000001", 1), ("checkpoints/step-00000002", 2)],
)
def test_a_run_or_one_of_its_checkpoints(finished: Path, tmp_path: Path, inside: str, step: int) -> None:
    backbone, notes = start(finished / inside, tmp_path / "next")
    assert holds(backbone, step)
    assert notes == [f"weights from {finished}/checkpoints/step-{step:08d}: trunk and neck"]


def test_a_damaged_checkpoint_is_passed_over(run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (run / "checkpoints/step-00000002/__0_0.distcp").write_bytes(b"")
    with caplog.at_level(logging.WARNING):
        backbone, _ = start(run, tmp_path / "next")
    assert holds(backbone, 1)
    assert "step-00000002 is damaged" in caplog.text
    with pytest.raises(UserError, match=r"step-00000002 is damaged: .*; give the run's folder, (\S+), whose") as caught:
        start(run / "checkpoints/step-00000002", tmp_path / "next")
    assert str(run) in str(caught.value)


def test_what_is_no_start_is_named_with_a_way_that_works(run: Path, tmp_path: Path) -> None:
    def refusal(path: Path, here: Path = tmp_path / "next") -> str:
        with pytest.raises(UserError) as caught:
            start(path, here)
        assert str(caught.value).startswith("backbone.weights: ")
        return str(caught.value)

    shard = run / "checkpoints/step-00000002/__0_0.distcp"
    assert f"{shard} is one file of a checkpoint: give the run's folder, {run}" in refusal(shard)
    (run / "model.onnx").write_bytes(b"\x08\x08\x12\x07pytorch")
    assert f"is not trained on: give the run's folder, {run}" in refusal(run / "model.onnx")
    partial = run / "checkpoints/step-00000003.partial"
    partial.mkdir()
    assert f"being written, or whose run has died; give the run's folder, {run}, whose" in refusal(partial)
    assert "is in the folder of the run that begins" in refusal(run, run)
    assert "is in the folder of the run that begins" in refusal(run / "checkpoints/step-00000001", run)
    assert holds(start(run, tmp_path / "next")[0], 2)  # where three of these lead

    shutil.rmtree(run / "checkpoints")
    (run / "checkpoints").mkdir()
    assert f"{run} holds no complete checkpoint: its run has saved none yet" in refusal(run)
    torch.save(weights(5), run / "best.pt")
    assert refusal(run).endswith(f"holds no complete checkpoint; give {run / 'best.pt'}")
    assert holds(start(run / "best.pt", tmp_path / "next")[0], 5)
    (tmp_path / "faces").mkdir()
    (tmp_path / "faces/a.jpg").touch()
    assert "neither a run's folder nor a checkpoint: it holds a.jpg" in refusal(tmp_path / "faces")


def test_what_is_said_where_nothing_is_read(tmp_path: Path) -> None:
    backbone = build_backbone(SMALL, seed=9)

    def notes(goes_on: bool = False, **fields: Any) -> list[str]:
        return start_from(backbone, SMALL.model_copy(update=fields), tmp_path, goes_on=goes_on)

    assert notes() == []
    assert notes(name="resnet10t.c3_in1k")[0].startswith("weights are drawn at random: c3_in1k says")
    assert notes(freeze=("trunk",))[0].startswith("frozen modules keep weights drawn at random")
    assert notes(weights=tmp_path, goes_on=True) == [f"{tmp_path} is not read: the run goes on from a checkpoint"]
    assert holds(backbone, 9)


def test_the_backbone_of_a_run(run: Path) -> None:
    backbone, facts = load_backbone(run)
    assert holds(backbone, 2) and not backbone.training
    assert facts == {"step": 2, "backbone": "resnet10t", "loss": "arcface"}
    with pytest.raises(UserError, match=r"has no best\.safetensors, .*\(evaluation\.pairs\); --which last takes"):
        load_backbone(run, "best")
    BestBackbone(run).offer(build_backbone(SMALL, seed=7), step=1, accuracy=0.5)
    backbone, facts = load_backbone(run, "best")
    assert holds(backbone, 7) and facts["accuracy"] == 0.5
    with pytest.raises(UserError, match=rf"it has no config\.toml; give {run}$"):
        load_backbone(run / "checkpoints/step-00000002")


def test_a_run_whose_files_are_not_its_own_or_broken(run: Path) -> None:
    folder = RunFolder(run)
    other = build_backbone(SMALL.model_copy(update={"embedding_size": 8}))
    BestBackbone(run).offer(other, step=1, accuracy=0.5)
    with pytest.raises(
        UserError, match=r"best\.safetensors is not of the backbone that .*config\.toml describes \(resnet10t\)"
    ):
        load_backbone(run, "best")
    folder.best.write_bytes(b"")
    with pytest.raises(UserError, match=r"best\.safetensors is damaged .*--which last takes"):
        load_backbone(run, "best")
    shutil.rmtree(folder.checkpoints)
    with pytest.raises(UserError, match=r"holds no complete checkpoint; --which best takes its best\.safetensors"):
        load_backbone(run)
    folder.best.unlink()
    with pytest.raises(UserError, match="holds no complete checkpoint: the run has saved none yet"):
        load_backbone(run)


def test_exports_of_one_folder_have_cards_of_their_own(run: Path, tmp_path: Path) -> None:
    for name in ("x.onnx", "x.model"):
        assert export.main([str(run), "--output", str(tmp_path / name), "--opset", "11"]) == 0
    cards = sorted(path.name for path in tmp_path.glob("*.json"))
    assert cards == ["x.json", "x.model.json"]
    hashes = [json.loads((tmp_path / name).read_text())["sha256"] for name in cards]
    assert hashes == [hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() for name in ("x.onnx", "x.model")]


def test_an_export_never_replaces_what_is_not_its_own(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refusal(output: Path) -> str:
        assert export.main([str(run), "--output", str(output)]) == 2
        return capsys.readouterr().err

    for content in ('{"labels": [1]}', "[]", "not JSON"):
        (tmp_path / "labels.json").write_text(content)
        said = refusal(tmp_path / "labels.onnx")
        assert "labels.json is in the place of the export's card, and is none" in said
        assert (tmp_path / "labels.json").read_text() == content
    assert not (tmp_path / "labels.onnx").exists()
    BestBackbone(run).offer(build_backbone(SMALL), step=1, accuracy=0.5)
    assert "best.json: belongs to the run" in refusal(run / "best.onnx")
    assert "is a folder" in refusal(tmp_path)


def test_the_opset_of_an_export_can_be_chosen(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert export.main([str(run), "--output", str(tmp_path / "x.onnx"), "--opset", "10"]) == 2
    assert "greater than or equal to 11, not 10" in capsys.readouterr().err
    assert export.main([str(run), "--output", str(tmp_path / "x.onnx"), "--opset", "11"]) == 0
    assert json.loads((tmp_path / "x.json").read_text())["opset"] == 11
