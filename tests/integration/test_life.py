"""What a run bears, what it leaves behind, and how it goes on."""

import contextlib
import errno
import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from recognition import config
from recognition.data.pipeline import Batch
from recognition.data.procedural.dataset import write_faces
from recognition.errors import UserError
from recognition.files import lock
from recognition.runs.best import BestBackbone, read_best, read_record
from recognition.runs.checkpoint import Checkpoints, read_tensors
from recognition.runs.folder import RunFolder
from recognition.runs.metadata import check_resumable
from recognition.training import trainer
from recognition.training.trainer import Trainer
from tests.support.faults import fault, forbidden, interrupt, raising, spoil
from tests.support.ranks import launch_ranks

TINY = Path(__file__).parent / "tiny.toml"
BATCH, IMAGES, RATE = 8, 48, 0.02
SETTINGS = (
    "run.seed=3",
    "backbone.name=test_resnet",
    "backbone.image_size=32",
    "backbone.embedding_size=32",
    "backbone.precision=float32",
    f"optimizer.lr={RATE}",
    f"training.global_batch={BATCH}",
    "training.threads=1",
    "data.threads=1",
    "data.loader=torchvision",
    "checkpoint.every_steps=0",
    "evaluation.batch_per_rank=40",
    "tracking.every_steps=1",
    "tracking.preview_images=0",
    "export.enabled=false",
)


@pytest.fixture(scope="module")
def faces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("faces")
    write_faces(folder, identities=8, images_per_identity=6, pairs=20, seed=1, image_size=32, workers=1)
    return folder


@pytest.fixture(autouse=True)
def as_it_was() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def settings(faces: Path, run: Path, steps: int, *overrides: str) -> list[str]:
    return [
        *SETTINGS,
        f"data.path={faces}",
        f"run.folder={run}",
        f"training.epochs={steps * BATCH / IMAGES}",
        *overrides,
    ]


def train(overrides: list[str]) -> bool:
    return trainer.train(config.load(TINY, overrides))


def records(run: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [record for record in found if "loss" in record]


def log(run: Path) -> str:
    return (run / "log.txt").read_text()


# --- steps that are not finite -------------------------------------------------------------------------------------


def faulty(overrides: list[str], nan_at: int | None, infinite_at: int | None) -> list[list[str]]:
    """Train; on the last rank, one image of the first pass of step `nan_at` is NaN, a gradient in step `infinite_at`
    is infinite. Returns the names of the tensors that each step changed."""
    before: dict[str, torch.Tensor] = {}
    changed: list[list[str]] = []

    def spoil_one(*, batch: Batch, **_: Any) -> None:
        batch.images[0] = torch.nan

    def make_infinite(*, trainer: Trainer, **_: Any) -> None:
        weight = next(iter(trainer.backbone.parameters()))
        hook: Any = weight.register_hook(lambda gradient: (hook.remove(), gradient * torch.inf)[1])

    def begin(*, trainer: Trainer, step: int) -> None:
        before.update({name: tensor.clone() for name, tensor in trainer.state_tensors().items()})
        if step == infinite_at and trainer.ranks.rank == trainer.ranks.world - 1:
            make_infinite(trainer=trainer)

    def end(*, trainer: Trainer, **_: Any) -> None:
        after = trainer.state_tensors()
        changed.append([name for name, tensor in before.items() if not same(tensor, after[name])])

    with contextlib.ExitStack() as stack:
        stack.enter_context(fault("step", begin))
        stack.enter_context(fault("step done", end))
        if nan_at is not None:
            stack.enter_context(fault("batch", spoil_one, step=nan_at, rank=-1, times=1))
        assert train(overrides)
    return changed


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    one, other = (getattr(tensor, "_local_tensor", tensor) for tensor in (one, other))
    return one.numpy().tobytes() == other.numpy().tobytes()


@pytest.mark.parametrize(
    ("world", "passes", "optimizer"), [(1, 1, "sgd"), (2, 1, "adamw"), (2, 2, "sgd")], ids=["alone", "ranks", "passes"]
)
def test_a_step_whose_loss_is_not_finite_changes_nothing_at_all(
    faces: Path, tmp_path: Path, world: int, passes: int, optimizer: str
) -> None:
    run = tmp_path / "run"
    changes = (f"training.accumulation_steps={passes}", f"optimizer.name={optimizer}")
    ranks = launch_ranks(faulty, world, settings(faces, run, 4, *changes), 1, None)
    for changed in ranks:
        assert changed[1] == []
        for step in (0, 2, 3):
            assert any(name.endswith("running_var") for name in changed[step])
            assert any(name.endswith("num_batches_tracked") for name in changed[step])
            assert {"head.weight", "head.inverse_norm"} < set(changed[step])
    found = Checkpoints(run / "checkpoints", 2).find()
    assert found is not None
    assert all(tensor.isfinite().all() for tensor in read_tensors(found).values() if tensor.is_floating_point())
    losses = [record["loss"] for record in records(run)]
    assert losses[1] is None and None not in (losses[0], *losses[2:])
    assert "not finite in the last 1 steps, which changed nothing\n" in log(run)


def test_a_backbone_s_gradient_that_alone_is_not_finite_leaves_all_but_the_class_weights(
    faces: Path, tmp_path: Path
) -> None:
    (changed,) = launch_ranks(faulty, 1, settings(faces, tmp_path / "run", 2), None, 1)
    assert changed[1] and all(name.startswith("head.") for name in changed[1])
    assert "which changed nothing but, in 1, whose loss was finite, the class weights\n" in log(tmp_path / "run")


def test_a_run_that_fails_where_it_failed_before_says_so(faces: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert train(settings(faces, run, 2))
    longer = settings(faces, run, 6, "training.more_epochs=stretch", "training.max_nonfinite_steps=2")
    with fault("batch", spoil):
        with pytest.raises(UserError, match=f"backbone.weights={run}") as first:
            train(longer)
        with pytest.raises(UserError, match="began at step 2 too and failed at step 4") as second:
            train(longer)
    assert "began at" not in str(first.value)
    assert "The backbone's weights are those of step 2" in str(second.value)
    # The way out that it names.
    assert train(settings(faces, tmp_path / "another", 1, f"backbone.weights={run}", "optimizer.lr=0.001"))


# --- the checkpoint comes first ------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["verification", "export"])
def test_what_fails_after_the_last_step_is_made_up_for_without_training_again(
    faces: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    run = tmp_path / "run"

    def export(backbone: Any, path: Path, card: dict[str, Any], _: Any) -> None:
        path.write_bytes(b"model")
        path.with_suffix(".json").write_text(json.dumps(card))

    monkeypatch.setattr(trainer, "check_export", lambda *_: None)
    monkeypatch.setattr(trainer, "export_onnx", export)
    overrides = settings(faces, run, 2, f"evaluation.pairs={faces / 'pairs.bin'}", "export.enabled=true")
    with fault(what, raising(UserError("a reason")), step=2), pytest.raises(UserError) as error:
        train(overrides)
    text = str(error.value)
    assert f"{what} at step 2: a reason" in text and f"{run / 'checkpoints'} holds a checkpoint of step 2" in text
    with forbidden("step"):
        assert train(overrides)
    card = json.loads((run / "model.json").read_text())
    results = json.loads((run / "results.json").read_text())
    assert card["step"] == results["step"] == read_record(run)["step"] == 2
    assert card["verification"] == results["verification"] and "accuracy" in results["verification"]["pairs"]
    # Now there is nothing left.
    with forbidden("step"), forbidden("verification"), forbidden("export"):
        assert train(overrides)
    assert "complete: all 2 steps are done, nothing to do (pairs: accuracy" in log(run)


def test_a_verification_on_the_way_comes_after_its_checkpoint(faces: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    overrides = settings(faces, run, 3, f"evaluation.pairs={faces / 'pairs.bin'}", "evaluation.every_steps=2")
    with fault("verification", raising(ZeroDivisionError()), step=2), pytest.raises(ZeroDivisionError) as error:
        train(overrides)
    assert any("holds a checkpoint of step 2" in note for note in error.value.__notes__)
    assert Checkpoints(run / "checkpoints", 2).find() == run / "checkpoints/step-00000002"
    assert train(overrides)
    assert [record["step"] for record in records(run)] == [1, 2, 3]
    assert all(record["data_seconds"] >= 0 for record in records(run))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line.get("checkpoint_seconds", 0) > 0] == [2, 3]


def test_a_disk_that_does_not_take_the_best_backbone_does_not_end_the_run(
    faces: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    # From the second verification on nothing is better.
    accuracies = iter((0.9, 0.5))
    offer = BestBackbone.offer
    monkeypatch.setattr(
        BestBackbone, "offer", lambda self, backbone, step, _: offer(self, backbone, step, next(accuracies))
    )
    pairs = f"evaluation.pairs={faces / 'pairs.bin'}"
    full = raising(OSError(errno.ENOSPC, "No space left on device"))
    with fault("best backbone", full, step=1, times=1):
        assert train(settings(faces, run, 2, pairs, "evaluation.every_steps=1"))
    assert "best.safetensors cannot be written ([Errno 28] No space left on device): it is tried again" in log(run)
    _, best, record = read_best(run)
    assert record == {"step": 1, "accuracy": 0.9}
    first = {name: tensor for name, tensor in best.items() if name.endswith("num_batches_tracked")}
    assert first and all(int(count) == 1 for count in first.values())


# --- more epochs ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(faces: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 3 steps at a rate that falls at the third."""
    run = tmp_path_factory.mktemp("runs") / "finished"
    assert train(settings(faces, run, 3, *stepped(2)))
    return run


def stepped(*milestones: int) -> tuple[str, str]:
    epochs = [step * BATCH / IMAGES for step in milestones]
    return "training.schedule=multistep", f"training.milestones={epochs}"


def rates(run: Path) -> list[float]:
    return [record["lr"] for record in records(run)]


def test_a_stretched_run_is_the_run_that_had_its_epochs_from_the_beginning(
    faces: Path, finished: Path, tmp_path: Path
) -> None:
    run, whole = tmp_path / "run", tmp_path / "whole"
    shutil.copytree(finished, run)
    with pytest.raises(UserError, match=r"training.more_epochs=stretch or training.more_epochs=restart"):
        train(settings(faces, run, 5, *stepped(2)))
    assert train(settings(faces, run, 5, *stepped(2), "training.more_epochs=stretch"))
    # It needs the setting no more.
    assert train(settings(faces, run, 5, *stepped(2)))
    assert train(settings(faces, whole, 5, *stepped(2)))
    assert rates(run) == rates(whole) == pytest.approx(2 * [RATE] + 3 * [RATE / 10])
    expected, found = (read_tensors(Checkpoints(each / "checkpoints", 2).find() or each, "") for each in (whole, run))
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    assert "as if it had had them from the beginning" in log(run)


def test_a_restarted_run_begins_its_rate_again_and_remembers_where(faces: Path, finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    with fault("step", interrupt, step=3):
        assert not train(settings(faces, run, 7, *stepped(2), "training.more_epochs=restart"))
    assert train(settings(faces, run, 7, *stepped(2)))
    assert rates(run) == pytest.approx(2 * [RATE, RATE, RATE / 10] + [RATE / 10])
    assert "starts again at step 3, with 0 steps of warm-up" in log(run)


def test_fewer_epochs_are_refused(faces: Path, finished: Path) -> None:
    with pytest.raises(UserError, match=r"training.epochs: was 0.5, is 0.3"):
        train(settings(faces, finished, 2, "training.more_epochs=restart"))


def test_settings_that_came_after_a_checkpoint_have_their_defaults_in_it(finished: Path) -> None:
    found = Checkpoints(finished / "checkpoints", 2)
    metadata = found.metadata(found.find() or finished)
    older = json.loads(json.dumps(metadata))
    del older["config"]["data"]["fit"], older["config"]["backbone"]["freeze"]
    check_resumable(finished, older, metadata)
    metadata["config"]["data"]["fit"] = "exact"
    with pytest.raises(UserError, match=r'data.fit: was "resize", is "exact"'):
        check_resumable(finished, older, metadata)


# --- one folder, one run -------------------------------------------------------------------------------------------


def test_a_second_run_in_the_folder_is_refused_and_touches_nothing(faces: Path, finished: Path) -> None:
    before = sorted((path, path.stat().st_mtime_ns) for path in finished.rglob("*") if path.is_file())
    with lock.held(finished), pytest.raises(UserError, match="belongs to a run that is at work"):
        train(settings(faces, finished, 3, *stepped(2)))
    assert sorted((path, path.stat().st_mtime_ns) for path in finished.rglob("*") if path.is_file()) == before


def test_a_run_that_begins_anew_leaves_nothing_of_an_earlier_attempt(faces: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    left = ["best.pt", "best.json", "model.onnx", "model.json", "quarantine.jsonl", "metrics.jsonl", "log.txt"]
    left += ["events.out.tfevents.1", "config.toml", "checkpoints/step-00000009/manifest.json"]
    for name in [*left, "notes.txt", "checkpoints/step-00000005.partial/__0_0.distcp"]:
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text("of the earlier one")
    assert train(settings(faces, run, 1))
    assert sorted(str(path.relative_to(run / "earlier-1")) for path in (run / "earlier-1").rglob("*.*")) == sorted(left)
    assert all((run / "earlier-1" / name).read_text() == "of the earlier one" for name in left)
    there = [run / name for name in left if (run / name).exists()]
    assert not [path for path in there if "of the earlier one" in path.read_text(errors="ignore")]
    assert (run / "notes.txt").exists() and not any(run.glob("best.*"))
    assert "what an earlier attempt left is in earlier-1 now" in log(run)
    # Going on moves nothing.
    assert train(settings(faces, run, 1))
    assert not (run / "earlier-2").exists()


def test_what_can_be_known_before_the_first_step_is_said_before_it(
    faces: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: Any) -> None:
        raise UserError("no such opset")

    monkeypatch.setattr(trainer, "check_export", refuse)
    with forbidden("step"), pytest.raises(UserError, match="no such opset"):
        train(settings(faces, tmp_path / "run", 1, "export.enabled=true"))
    folder = RunFolder(tmp_path / "run")
    free = shutil.disk_usage(tmp_path).free
    with caplog.at_level(logging.WARNING):
        folder.warn_of_room(free // 4, keep=2)
        assert not caplog.records
        folder.warn_of_room(free // 2, keep=2)
    assert "lower checkpoint.keep (2)" in caplog.text
    folder.model.mkdir()
    with pytest.raises(UserError, match=r"model.onnx is a folder, .* move it elsewhere"):
        folder.refuse_folders()
