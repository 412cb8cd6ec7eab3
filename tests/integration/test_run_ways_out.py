"""What the messages of a run say to do gets on: the way out is read from the message, tried, and works."""

import importlib.util
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image

from recognition import config
from recognition.cli.evaluate import load_embedder
from recognition.cli.export import export
from recognition.data.procedural.dataset import write_faces
from recognition.deploy.onnx_embedder import OnnxOptions
from recognition.evaluation.verification import verify
from recognition.files import lock
from recognition.runs.folder import load_backbone
from recognition.training import trainer
from tests.support.faults import fault, spoil
from tests.support.ways_out import refusal, way_out

REPOSITORY = Path(__file__).parents[2]
TINY = Path(__file__).parent / "tiny.toml"
SETTINGS = (
    "backbone.name=resnet10t",
    "backbone.image_size=32",
    "backbone.embedding_size=32",
    "backbone.precision=float32",
    "training.global_batch=16",
    "training.epochs=1",  # two steps
    "training.threads=1",
    "data.threads=1",
    "data.loader=torchvision",
    "checkpoint.every_steps=1",
    "tracking.preview_images=0",
    "export.enabled=false",
)


@pytest.fixture(scope="module")
def faces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("faces")
    write_faces(folder, identities=8, images_per_identity=4, pairs=20, seed=1, image_size=32, workers=1)
    return folder


@pytest.fixture(autouse=True)
def as_it_was() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def train(faces: Path, run: Path, *changes: str) -> bool:
    given = (f"data.path={faces}", f"run.folder={run}", f"evaluation.pairs={faces / 'pairs.bin'}")
    return trainer.train(config.load(TINY, [*SETTINGS, *given, *changes]))


@pytest.fixture(scope="module")
def finished(faces: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("finished") / "run"
    threads = torch.get_num_threads()
    assert train(faces, run)
    torch.set_num_threads(threads)
    return run


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished run, to go on with."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def tool(name: str) -> ModuleType:
    specification = importlib.util.spec_from_file_location(f"tool_{name}", REPOSITORY / f"tools/{name}.py")
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def steps(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").glob("step-*"))


@pytest.mark.parametrize("which", [0, 1])
def test_more_epochs(faces: Path, run: Path, which: int) -> None:
    message = refusal(lambda: train(faces, run, "training.epochs=1.5"))
    ways = re.findall(r"training\.more_epochs=\w+", message)
    assert len(ways) == 2
    assert train(faces, run, "training.epochs=1.5", ways[which])
    assert "step-00000003" in steps(run)


def test_another_run_from_this_one(faces: Path, run: Path, tmp_path: Path) -> None:
    message = refusal(lambda: train(faces, run, "run.seed=7"))
    found = way_out(
        message, r"Set them back; or start another run with (run\.folder)=\.\.\. and (backbone\.weights=\S+)"
    )
    assert train(faces, run, "run.seed=7", f"{found[1]}={tmp_path / 'another'}", found[2])
    assert "weights from" in (tmp_path / "another/log.txt").read_text()
    assert train(faces, run)


def test_what_is_said_at_the_end(faces: Path, run: Path, monkeypatch: pytest.MonkeyPatch, finished: Path) -> None:
    told = (run / "log.txt").read_text().replace(str(finished), str(run))
    command = shlex.split(way_out(told, r"recognition (evaluate [^\n]*)")[1])
    assert tool("evaluate").main(command[1:]) == 0
    assert train(
        faces, run, *way_out(told, r"go on: the same command, and\s[^\n]*?(training\.epochs=[^\n]*)")[1].split()
    )
    assert steps(run)[-1] == "step-00000004"


def test_a_run_at_work(faces: Path, run: Path, tmp_path: Path) -> None:
    with lock.held(run):
        found = way_out(refusal(lambda: train(faces, run)), r"set another (run\.folder)")
        assert train(faces, run, f"{found[1]}={tmp_path / 'another'}", "training.epochs=0.5")


def test_a_folder_in_the_place_of_a_file(faces: Path, run: Path, tmp_path: Path) -> None:
    (run / "results.json").unlink()
    (run / "results.json").mkdir()
    found = way_out(refusal(lambda: train(faces, run)), r"(\S+) is a folder, .*: move it elsewhere")
    Path(found[1]).rename(tmp_path / "elsewhere")
    assert train(faces, run)


def test_the_other_of_two_backbones(run: Path) -> None:
    best = (run / "best.safetensors").read_bytes()
    (run / "best.safetensors").write_bytes(b"")
    found = way_out(refusal(lambda: load_backbone(run, "best")), r"--which (last)")
    load_backbone(run, found[1])  # type: ignore[arg-type]
    (run / "best.safetensors").write_bytes(best)
    shutil.rmtree(run / "checkpoints")
    found = way_out(refusal(lambda: load_backbone(run, "last")), r"--which (best)")
    load_backbone(run, found[1])  # type: ignore[arg-type]


def test_a_model_that_is_broken(faces: Path, run: Path, tmp_path: Path) -> None:
    message = refusal(lambda: verify(np.full((40, 8), np.nan), np.arange(20) % 2 == 0))
    command = way_out(message, r"`recognition (export [^`]*)`")[1].split()
    places = {"RUN": str(run), "FILE": str(tmp_path / "best.onnx")}
    options = export.make_context("export", [places.get(word, word) for word in command[1:]]).params
    load_backbone(options["run"], options["which"])
    setting = way_out(message, r"begin at an earlier checkpoint: (backbone\.weights=)\.\.\.")[1]
    assert train(faces, tmp_path / "another", f"{setting}{run / 'checkpoints/step-00000001'}", "training.epochs=0.5")


def test_a_loss_that_is_not_finite(faces: Path, tmp_path: Path) -> None:
    low = "backbone.precision=bfloat16", "training.max_nonfinite_steps=1", "evaluation.pairs=[]", "training.epochs=0.5"
    with fault("batch", spoil):
        message = refusal(lambda: train(faces, tmp_path / "run", *low, "tracking.every_steps=1"))
    found = way_out(message, r"or go on with (backbone\.precision=\w+)$")
    assert train(faces, tmp_path / "run", *low, found[1])


def test_options_that_a_run_has_no_use_for(run: Path) -> None:
    message = refusal(lambda: load_embedder(run, OnnxOptions(size=9)))
    way_out(message, "--size, .* are for ONNX files; leave them out")
    load_embedder(run, OnnxOptions())


def test_weights_in_the_run_s_own_folder(faces: Path, tmp_path: Path, finished: Path) -> None:
    weights = tmp_path / "run/weights.safetensors"
    weights.parent.mkdir()
    shutil.copy(finished / "best.safetensors", weights)
    short = f"backbone.weights={weights}", "training.epochs=0.5"
    found = way_out(refusal(lambda: train(faces, weights.parent, *short)), r"set another (run\.folder)")
    assert train(faces, tmp_path / "run", *short, f"{found[1]}={tmp_path / 'another'}")


@pytest.mark.parametrize("choice", [0, 1])
def test_images_of_another_size(faces: Path, tmp_path: Path, choice: int) -> None:
    def attempt(*fit: str) -> bool:
        return train(
            faces, tmp_path / "run", "backbone.image_size=40", "evaluation.pairs=[]", "training.epochs=0.5", *fit
        )

    ways = re.findall(r"data\.fit=\w+", refusal(lambda: attempt("data.fit=exact")))
    assert len(ways) == 2
    assert attempt(ways[choice])


@pytest.mark.parametrize("change", [("training.global_batch", "16"), ("training.accumulation_steps", "1")])
def test_a_batch_that_is_too_small(faces: Path, tmp_path: Path, change: tuple[str, str]) -> None:
    small = "training.global_batch=4", "training.accumulation_steps=4", "training.epochs=0.2"
    message = refusal(lambda: train(faces, tmp_path / "run", *small))
    assert change[0] in way_out(message, r"Raise (.*)")[1]
    assert train(faces, tmp_path / "run", *small, "=".join(change))


def test_images_that_cannot_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("recognition.data.quarantine._ALWAYS_TOLERATED", 7)
    people = tmp_path / "people"
    for number in range(32):
        path = people / f"{number // 4}/{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((32, 32, 3), 8 * number, np.uint8)).save(path)
        if number % 4 == 0:
            path.write_bytes(path.read_bytes()[:40])
    short = "evaluation.pairs=[]", "training.epochs=1"
    message = refusal(lambda: train(people, tmp_path / "run", *short))
    command = way_out(message, r"`recognition (index filter DATA OUT [^`]*)`, (data\.path)=OUT")
    places = {"DATA": str(people), "OUT": str(tmp_path / "out")}
    assert tool("index").main([places.get(word, word) for word in shlex.split(command[1])[1:]]) == 0
    assert train(people, tmp_path / "another", *short, f"{command[2]}={places['OUT']}")
