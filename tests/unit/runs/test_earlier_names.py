"""What a run wrote under earlier names of settings is read under today's, wherever it is read."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from recognition import distributed
from recognition.config import Backbone, Config, ConfigError, Data, Distributed, Head, Run
from recognition.models.backbone import build_backbone
from recognition.runs import checkpoint, folder
from recognition.runs.best import BestBackbone, read_best, read_record
from recognition.runs.checkpoint import Checkpoints
from recognition.runs.folder import RunFolder, load_backbone
from recognition.runs.metadata import RunMetadata, check_resumable

SMALL = Backbone(name="resnet10t", image_size=32, embedding_size=16, neck="pool", precision="float32")


def rename(tree: dict[str, Any], old: str, new: str) -> dict[str, Any]:
    tree = copy.deepcopy(tree)
    if old in tree.get("head", {}):
        tree["head"][new] = tree["head"].pop(old)
    return tree


@pytest.fixture
def old_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, dict[str, Any]]:
    """A run's folder in which `head.chunk` and `head.sample_rate` have other names, and today's metadata of it."""
    settings = Config(
        run=Run(folder=tmp_path), data=Data(path=tmp_path), backbone=SMALL, head=Head(chunk=7, sample_rate=0.5)
    )
    metadata = RunMetadata(settings, {}, 0, "a" * 64, 9, 3).to_json(1)
    run = RunFolder(tmp_path)
    run.create()
    run.save_config(settings)
    run.config.write_text(run.config.read_text().replace("sample_rate = 0.5", "share = 0.5"))
    state = {f"backbone.{name}": tensor for name, tensor in build_backbone(SMALL, seed=3).state_dict().items()}
    distributed.start(Distributed(backend="gloo"), torch.get_num_threads())
    written = metadata | {"config": rename(metadata["config"], "sample_rate", "share")}
    Checkpoints(run.checkpoints, keep=1).save(1, state, written)
    distributed.stop()
    for module in (checkpoint, folder):
        monkeypatch.setattr(module, "to_current", lambda tree: rename(tree, "share", "sample_rate"))
    return tmp_path, metadata


def test_a_checkpoint_and_a_config_are_read(old_run: tuple[Path, dict[str, Any]]) -> None:
    run, metadata = old_run
    checkpoints = Checkpoints(run / "checkpoints", keep=1)
    found = checkpoints.find()
    assert found is not None and '"share"' in (found / "manifest.json").read_text()
    assert checkpoints.metadata(found) == metadata
    check_resumable(run, checkpoints.metadata(found), metadata)
    assert RunFolder(run).read_config().head.sample_rate == 0.5
    backbone, about = load_backbone(run)
    assert all(
        torch.equal(a, b)
        for a, b in zip(backbone.state_dict().values(), build_backbone(SMALL, 3).state_dict().values(), strict=True)
    )
    assert about["step"] == 1 and about["backbone"] == "resnet10t"


def test_a_config_that_is_wrong_under_any_names_says_so(old_run: tuple[Path, dict[str, Any]]) -> None:
    config = RunFolder(old_run[0]).config
    config.write_text(config.read_text().replace("share = 0.5", "share = 2.0"))
    with pytest.raises(ConfigError, match=r"head\.sample_rate"):
        RunFolder(old_run[0]).read_config()
    config.write_text("head = [")
    with pytest.raises(ConfigError, match="not valid TOML"):
        RunFolder(old_run[0]).read_config()


def test_an_earlier_best_backbone_counts_until_there_is_a_better_one(tmp_path: Path) -> None:
    first, second = (build_backbone(SMALL, seed) for seed in (1, 2))
    torch.save(first.state_dict(), tmp_path / "best.pt")
    (tmp_path / "best.json").write_text('{"step": 4, "accuracy": 0.5}')
    assert read_record(tmp_path) == {"step": 4, "accuracy": 0.5}
    best = BestBackbone(tmp_path)
    best.offer(second, step=6, accuracy=0.5)
    path, state, record = read_best(tmp_path)
    assert path.name == "best.pt" and record["step"] == 4
    assert torch.equal(state["neck.linear.weight"], first.state_dict()["neck.linear.weight"])
    best.offer(second.to(memory_format=torch.channels_last), step=8, accuracy=0.1 + 0.6)
    path, state, record = read_best(tmp_path)
    assert [each.name for each in tmp_path.iterdir()] == ["best.safetensors"] == [path.name]
    assert record == {"step": 8, "accuracy": 0.1 + 0.6}
    assert state.keys() == second.state_dict().keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in second.state_dict().items())
    (tmp_path / "other").touch()
    assert path.stat().st_mode == (tmp_path / "other").stat().st_mode, "whoever may read other files may read it"
