"""What a message says to do gets on: the way out is read from the message, tried, and works."""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from recognition import config, hardware
from recognition.deploy.onnx_embedder import OnnxEmbedder, OnnxOptions
from recognition.distributed import group
from recognition.distributed.launcher import read_launcher
from recognition.files.outputs import check_output
from recognition.models.backbone import build_backbone
from recognition.models.weights import load_weights, read_weights
from recognition.runs.folder import RunFolder
from tests.support.ways_out import refusal, way_out

SMALL = ("backbone.name=resnet10t", "backbone.image_size=32", "backbone.embedding_size=32")
# A mistake, what the message says, what that is as a setting, and whether it stands in the mistake's place.
SETTINGS = [
    ("optimizer.name=adamw head.inactive_rows=lazy", r"set (head\.optimizer\.name) to (\w+)", r"\1=\2", False),
    ("training.epochs=3 training.schedule=multistep", r"needs (\S+), for example (\[.*?\])", r"\1=\2", False),
    ("training.schedule=multistep", r"needs (\S+), for example (\[.*?\])", r"\1=\2", False),
    ("training.milestones=[1.0]", r"is for (training\.schedule) = (\w+)", r"\1=\2", False),
    ("head.triplet.margin=0.3", r"set (data\.images_per_identity)", r"\1=2", False),
    ("head.contrastive.weight=0.3", r"set (data\.images_per_identity)", r"\1=2", False),
    ("backbone.compile=False", r"write true or (false)", r"backbone.compile=\1", True),
    ("training.epoch=3", r"did you mean (\w+)\?", r"training.\1=3", True),
    ("trainig.epochs=3", r"did you mean (\w+)\?", r"\1.epochs=3", True),
    ("trainig.nonsense=3", r"did you mean (\w+)\?", r"\1.epochs=3", True),
    ("head.loss.marginn=0.3", r"did you mean (\w+)\?", r"head.loss.\1=0.3", True),
    ("head.loss.name=arcfase", r"is none of .*'(arcface)'", r"head.loss.name=\1", True),
    ("optimizer.name=adam", r"is none of '(\w+)'", r"optimizer.name=\1", True),
    ("run.folder=", r"an empty path; write (\.) for", r"run.folder=\1", True),
    ("data.path=facse", r"did you mean (\S+)\?", r"data.path=\1", True),
]


@pytest.mark.parametrize(("mistake", "pattern", "template", "instead"), SETTINGS, ids=lambda value: str(value)[:40])
def test_a_setting_that_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mistake: str, pattern: str, template: str, instead: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "faces").mkdir()
    file = tmp_path / "run.toml"
    file.write_text('[data]\npath = "."\n')
    given = mistake.split()
    message = refusal(lambda: config.load(file, given))
    better = way_out(message, pattern).expand(template)
    config.load(file, [*(given[:-1] if instead else given), better])


LINES = [
    # Lines of a file of settings, what the message says, and the lines that follow from it.
    ('[data]\npath = "C:\\Users"', r"put the text in (single) quotes", "[data]\npath = 'C:\\Users'"),
    ('[data]\npath = "D:\\Data"', r"write (/)", '[data]\npath = "D:\\1Data"'),
    ("[data]\npath = faces", r'a text needs quotes, as in name = (")', "[data]\npath = \\1faces\\1"),
    ('[data]\npath = "a"\n[run]\nseed = 1\nseed = 2', r"remove (one)", '[data]\npath = "a"\n[run]\nseed = 2'),
    ('[data]\npath = "a"\n[run]\nseed = 1\n[run]', r"put their keys (together)", '[data]\npath = "a"\n[run]\nseed = 1'),
    ('[data]\npath: "a"', r"written key (=) value", '[data]\npath \\1 "a"'),
    ('data\npath = "a"', r"written (?:\[name\], settings )?key = value", '[data]\npath = "a"'),
    ('// faces\n[data]\npath = "a"', r"comments begin with (#)", '\\1 faces\n[data]\npath = "a"'),
    (
        '[data]\npath = "a"\n[backbone]\ncompile = True',
        r"true and (false) are",
        '[data]\npath = "a"\n[backbone]\ncompile = \\1',
    ),
]


@pytest.mark.parametrize(("wrong", "pattern", "right"), LINES, ids=lambda value: str(value)[:40])
def test_a_line_that_is_explained(tmp_path: Path, wrong: str, pattern: str, right: str) -> None:
    file = tmp_path / "run.toml"
    file.write_text(wrong)
    found = way_out(refusal(lambda: config.load(file, check_paths=False)), pattern)
    file.write_text(right.replace("\\1", found[1]) if found.lastindex else right)
    config.load(file, check_paths=False)


def test_a_file_of_settings_that_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text('[data]\npath = "."\n')
    found = way_out(refusal(lambda: config.load(tmp_path)), r"such as (\S+)")
    config.load(found[1])


# --- the backbone --------------------------------------------------------------------------------------------------

BACKBONES = [
    ("backbone.name=resnet10", r"did you mean (?:\S+ or )*?(resnet10t)", r"backbone.name=\1", True),
    ("backbone.name=resnet10t.nonsense", r"but (\w+)", r"backbone.name=resnet10t.\1", True),
    ("backbone.name=resnet10t.nonsense", r"; (\w+) alone will do", r"backbone.name=\1", True),
    ("backbone.options.drop_path_rat=0.1", r"did you mean (\w+)\?", r"backbone.options.\1=0.1", True),
    ("backbone.options.img_size=64", r"set (backbone\.image_size)", r"\1=64", True),
    ("backbone.options.global_pool=avg", r"set (backbone\.neck)", r"\1=pool", True),
    ("backbone.freeze=['layer1']", r"did you mean (trunk\.\w+)", r"backbone.freeze=['\1']", True),
    ("backbone.freeze=['trunk.maxpool']", r"name the module that has", "backbone.freeze=['trunk.layer1']", True),
    (
        "backbone.name=vit_tiny_patch16_224 backbone.options.depth=1 backbone.options.patch_drop_rate=0.5",
        r"set (backbone\.neck) = '(\w+)'",
        r"\1=\2",
        False,
    ),
]


@pytest.mark.parametrize(("mistake", "pattern", "template", "instead"), BACKBONES, ids=lambda value: str(value)[:40])
def test_a_setting_of_the_backbone_that_is_named(
    tmp_path: Path, mistake: str, pattern: str, template: str, instead: bool
) -> None:
    file = tmp_path / "run.toml"
    file.write_text('[data]\npath = "."\n')

    def attempt(*settings: str) -> object:
        return build_backbone(config.load(file, [*SMALL, *settings]).backbone)

    given = mistake.split()
    message = refusal(lambda: attempt(*given))
    better = way_out(message, pattern).expand(template)
    attempt(*(given[:-1] if instead else given), better)


def test_weights_of_another_backbone() -> None:
    def backbone(**changes: Any) -> Any:
        fields: dict[str, Any] = {"name": "resnet10t", "image_size": 32, "embedding_size": 32, "neck": "pool"}
        return build_backbone(config.Backbone(**(fields | changes)))

    state = backbone(embedding_size=16).state_dict()
    message = refusal(lambda: load_weights(backbone(), state, "x.pt"))
    way_out(message, r"set .*\bembedding_size\b.* as they were")
    load_weights(backbone(embedding_size=16), state, "x.pt")


@pytest.mark.parametrize("whole", [True, False])
def test_weights_are_saved_anew(tmp_path: Path, whole: bool) -> None:
    model, path = build_backbone(config.Backbone(name="resnet10t", image_size=32, embedding_size=32)), tmp_path / "x.pt"
    torch.save(model.neck if whole else [1], path)
    message = refusal(lambda: load_weights(model, read_weights(path), path))
    way_out(message, r"torch\.save\(model\.state_dict\(\), path\)")
    torch.save(model.state_dict(), path)
    assert load_weights(model, read_weights(path), path)


def test_fewer_checkpoints_need_less_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=100))
    (tmp_path / "checkpoints").mkdir()
    RunFolder(tmp_path).warn_of_room(40, keep=2)
    keep = int(way_out(caplog.text, r"lower checkpoint\.keep \((\d+)\)")[1]) - 1
    caplog.clear()
    RunFolder(tmp_path).warn_of_room(40, keep=keep)
    assert not caplog.records


# --- ONNX files of other programs ----------------------------------------------------------------------------------


def means(path: Path, side: str | int, *outputs: str) -> Path:
    """A network whose embeddings are the mean colour, as each of `outputs`."""
    value = onnx.helper.make_tensor_value_info
    nodes = [onnx.helper.make_node("ReduceMean", ["x"], [name], axes=[2, 3], keepdims=0) for name in outputs]
    given = [value("x", onnx.TensorProto.FLOAT, ["n", 3, side, side])]
    taken = [value(name, onnx.TensorProto.FLOAT, ["n", 3]) for name in outputs]
    graph = onnx.helper.make_graph(nodes, "means", given, taken)
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8), path)
    return path


@pytest.mark.parametrize(
    ("side", "outputs", "mistake", "pattern", "field"),
    [
        ("h", ["a"], OnnxOptions(), r"--(size) (\d+)", "size"),
        (8, ["a"], OnnxOptions(size=9), r"leave --(size) out", ""),
        (8, ["a", "b"], OnnxOptions(), r"say --(output) (\w+)", "output"),
        (8, ["a"], OnnxOptions(output="c"), r"no (output) c, but (\w+)", "output"),
        (8, ["a"], OnnxOptions(std=(1, 1)), r"--(std) takes (one) number", "std"),
    ],
)
def test_options_for_a_file_of_another_program(
    tmp_path: Path, side: str | int, outputs: list[str], mistake: OnnxOptions, pattern: str, field: str
) -> None:
    path = means(tmp_path / "model.onnx", side, *outputs)
    found = way_out(refusal(lambda: OnnxEmbedder(path, mistake)), pattern)
    values: dict[str, Any] = {"size": lambda: int(found[2]), "output": lambda: found[2], "std": lambda: (128.0,)}
    right = OnnxOptions(**({field: values[field]()} if field else {}))
    embedder = OnnxEmbedder(path, right)
    images = np.zeros((2, embedder.image_size, embedder.image_size, 3), np.uint8)
    assert embedder(images).shape == (2, 3)


# --- this machine --------------------------------------------------------------------------------------------------

CPU = hardware.Hardware("cpu", "a processor", "AVX2", "float32")


@pytest.mark.parametrize(
    ("mistake", "pattern", "template"),
    [
        ("data.loader=dali", r"(data\.loader=\w+) does without it", r"\1"),
        ("backbone.compile=true", r"set (backbone\.compile=\w+)", r"\1"),
        ("distributed.backend=nccl", r"set (distributed\.backend) to (\w+)", r"\1=\2"),
    ],
)
def test_what_this_machine_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mistake: str, pattern: str, template: str
) -> None:
    file = tmp_path / "run.toml"
    file.write_text('[data]\npath = "."\n')
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setenv("CXX", "no-such-compiler")

    def attempt(setting: str) -> None:
        settings = config.load(file, [setting])
        hardware.resolve(settings, CPU)
        group._device(settings.distributed.backend, 0, 1, alone=False)

    attempt(way_out(refusal(lambda: attempt(mistake)), pattern).expand(template))


# --- outputs and launchers -----------------------------------------------------------------------------------------


def test_another_output(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()

    def told(path: Path, kind: Any = "file", **options: Any) -> str:
        return refusal(lambda: check_output(path, kind=kind, **options))

    found = way_out(told(tmp_path / "folder"), r"such as (\S+)$")
    check_output(Path(found[1]), kind="file")
    way_out(told(tmp_path / "file", "folder"), "give the name of a folder")
    check_output(tmp_path / "new", kind="folder")
    way_out(told(tmp_path / "file", overwrite=False), "remove it or choose another output")
    (tmp_path / "file").unlink()
    check_output(tmp_path / "file", kind="file", overwrite=False)


TORCH = {"RANK": "0", "WORLD_SIZE": "2"}
SRUN = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "n1"}


@pytest.mark.parametrize(
    "environment",
    [
        {"RANK": "0"},
        {"WORLD_SIZE": "2"},
        TORCH,
        TORCH | {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"},
        {"SLURM_NTASKS": "2"},
        {"SLURM_NTASKS": "2", "SLURM_JOB_ID": "7"},
        {"SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "2"},
        {"SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "2", "SLURM_JOB_ID": "7"},
        {"SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "2", "SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0"},
    ],
    ids=lambda environment: " ".join(environment),
)
def test_variables_are_unset_to_run_one_process(environment: dict[str, str]) -> None:
    message = refusal(lambda: read_launcher(environment))
    found = way_out(message, r"^(?P<former>.*? set), .*unset the former|unset (?P<names>.*) to run one")
    names = re.findall(r"[A-Z_]{4,}", found["former"] or found["names"])
    assert names
    assert read_launcher({name: value for name, value in environment.items() if name not in names}) is None
