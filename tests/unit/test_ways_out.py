"""What a message says to do gets on: the way out is read from the message, tried, and works."""

import importlib
import io
import pickle
import re
import shutil
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from PIL import Image

from recognition import config, distributed, hardware
from recognition.config import UserError
from recognition.data.faces import verification_pairs
from recognition.data.index import build, check_trainable, filter, merge, open_index
from recognition.data.recordio import InsightFaceWriter
from recognition.deploy.embedder import OnnxEmbedder, Reading
from recognition.evaluation.sets import open_sets
from recognition.launch import launched
from recognition.models.backbone import build_backbone
from recognition.models.weights import load_weights, read_file
from recognition.outputs import check_output
from recognition.run_folder import RunFolder


def refusal(attempt: Callable[[], object]) -> str:
    with pytest.raises(UserError) as caught:
        attempt()
    return str(caught.value)


def way_out(message: str, pattern: str) -> re.Match[str]:
    found = re.search(pattern, message, re.DOTALL)
    assert found is not None, message
    return found


# --- settings ------------------------------------------------------------------------------------------------------

SMALL = ("backbone.name=resnet10t", "backbone.image_size=32", "backbone.embedding_size=32")
# A mistake, what the message says, what that is as a setting, and whether it stands in the mistake's place.
SETTINGS = [
    ("optimizer.name=adamw head.untouched=lazy", r"set (head\.optimizer\.name) to (\w+)", r"\1=\2", False),
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
        fields = {"name": "resnet10t", "image_size": 32, "embedding_size": 32, "neck": "pool"}
        return build_backbone(config.Backbone(**(fields | changes)))

    state = backbone(embedding_size=16).state_dict()
    message = refusal(lambda: load_weights(backbone(), state, "x.pt"))
    way_out(message, r"set .*\bembedding_size\b.* as they were")
    load_weights(backbone(embedding_size=16), state, "x.pt")


@pytest.mark.parametrize("whole", [True, False])
def test_weights_are_saved_anew(tmp_path: Path, whole: bool) -> None:
    model, path = build_backbone(config.Backbone(name="resnet10t", image_size=32, embedding_size=32)), tmp_path / "x.pt"
    torch.save(model.neck if whole else [1], path)
    message = refusal(lambda: load_weights(model, read_file(path), path))
    way_out(message, r"torch\.save\(model\.state_dict\(\), path\)")
    torch.save(model.state_dict(), path)
    assert load_weights(model, read_file(path), path)


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


# --- training sets -------------------------------------------------------------------------------------------------


def picture(path: Path, side: int = 8, level: int = 90) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((side, side, 3), level, np.uint8)).save(path)


@pytest.fixture
def people(tmp_path: Path) -> Path:
    for person in ("Ann", "Bob"):
        for image in range(2):
            picture(tmp_path / "people" / person / f"{image}.png", level=40 * image)
    return tmp_path / "people"


@pytest.fixture
def rec(tmp_path: Path) -> Path:
    with InsightFaceWriter(tmp_path / "packed") as writer:
        for label in (0, 0, 1, 1):
            writer.add(label, b"image")
    return tmp_path / "packed/train.rec"


@pytest.mark.parametrize("content", ["", "a page\n", "1\n2\n", "1 2 3\n"])
def test_an_idx_is_removed(rec: Path, content: str) -> None:
    idx = rec.with_suffix(".idx")
    idx.write_text(content)
    found = way_out(refusal(lambda: open_index(rec)), r"(\S+\.idx): .* remove it")
    Path(found[1]).unlink()
    assert len(open_index(rec)) == 4


@pytest.mark.parametrize("kind", ["changed", "facts", "numbers"])
def test_a_derived_index_is_made_again(people: Path, tmp_path: Path, kind: str) -> None:
    derived = tmp_path / "derived"

    def make() -> object:
        source = open_index(people)
        return filter(source, np.ones(len(source), bool), derived)

    make()
    if kind == "changed":
        picture(people / "Ann/0.png", side=9)
    else:
        facts = next(path for path in derived.iterdir() if (path.suffix == ".json") == (kind == "facts"))
        facts.write_bytes(b"")
    way_out(refusal(lambda: open_index(derived)), "filter or merge again")
    make()
    assert len(open_index(derived)) == 4


def test_an_index_that_is_damaged_inside_is_deleted(rec: Path) -> None:
    index = open_index(rec)
    path = next(path for path in index.folder.iterdir() if "range" in path.name)
    ranges = np.lib.format.open_memmap(path, mode="r+")
    ranges["file"][1] = 9
    ranges.flush()
    index = open_index(rec)
    found = way_out(refusal(lambda: index.read(1)), r"^(.*?): the index is damaged .* delete it")
    shutil.rmtree(found[1])
    assert open_index(rec).read(1) == b"image"


def test_another_place_for_an_index(people: Path, tmp_path: Path) -> None:
    index = open_index(people)
    way_out(refusal(lambda: merge([index], people)), "choose another place")
    assert len(merge([index], tmp_path / "elsewhere")) == 4


def test_another_folder_for_the_index(people: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr("recognition.data.source.Source.writable_places", lambda source: (source.places[1],))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    found = way_out(refusal(lambda: open_index(people)), r"(data\.cache)=.*\((--cache) of tools/index\.py\)")
    file = tmp_path / "run.toml"
    file.write_text(f"[data]\npath = '{people}'\n")
    settings = config.load(file, [f"{found[1]}={tmp_path / 'cache'}"]).data
    assert len(build(settings.path, settings.cache)) == 4


def test_one_person_alone(tmp_path: Path) -> None:
    picture(tmp_path / "people/Ann/0.png")
    way_out(refusal(lambda: check_trainable(open_index(tmp_path / "people"))), "a folder .* of its own for each person")
    picture(tmp_path / "people/Bob/0.png")
    check_trainable(open_index(tmp_path / "people"))


@pytest.mark.parametrize(("pairs", "identities", "pattern"), [(30, 40, r"a multiple of (\d+)"), (20, 3, r"give (\d+)")])
def test_numbers_of_a_set_that_is_rendered(pairs: int, identities: int, pattern: str) -> None:
    number = int(way_out(refusal(lambda: verification_pairs(0, pairs, identities)), pattern)[1])
    verification_pairs(0, 2 * number if pairs % 20 else pairs, identities if pairs % 20 else number)


def test_notes_on_a_folder_of_people(people: Path) -> None:
    picture(people / "Ann/deeper/2.png")
    (people / "Cy").symlink_to(people / "Bob")
    picture(people / "ANN/3.png")
    notes = " ".join(build(people).notes)
    way_out(notes, r"move them up into the identity's own folder.*remove the link.*into one folder")
    (people / "Ann/deeper/2.png").rename(people / "Ann/2.png")
    (people / "Ann/deeper").rmdir()
    (people / "Cy").unlink()
    (people / "ANN/3.png").rename(people / "Ann/3.png")
    (people / "ANN").rmdir()
    index = build(people)
    assert not index.notes and len(index) == 6


@pytest.mark.parametrize("compressed", ["gzip", "bz2", "lzma"])
def test_a_compressed_file_is_unpacked(tmp_path: Path, compressed: str) -> None:
    compress = importlib.import_module(compressed).compress
    (tmp_path / "FILE").write_bytes(compress(b"[data]\npath = '.'\n"))
    command = way_out(refusal(lambda: config.load(tmp_path / "FILE")), r"unpack it with `([^`]+)`")[1]
    if shutil.which(command.split()[0]) is None:
        pytest.skip(f"there is no {command.split()[0]}")
    subprocess.run(["sh", "-c", command], check=True, cwd=tmp_path)
    config.load(tmp_path / "NEW")


def test_an_archive_is_unpacked(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text("[data]\npath = '.'\n")
    with tarfile.open(tmp_path / "FILE", "w") as archive:
        archive.add(tmp_path / "run.toml", "inside.toml")
    command = way_out(refusal(lambda: config.load(tmp_path / "FILE")), r"unpack it with `([^`]+)`")[1]
    subprocess.run([*command.split(), "FILE"], check=True, cwd=tmp_path)
    config.load(tmp_path / "inside.toml")


# --- verification sets ---------------------------------------------------------------------------------------------


@pytest.fixture
def listed(tmp_path: Path) -> Path:
    """A list of pairs, whose images lie elsewhere."""
    for image in range(4):
        picture(tmp_path / f"far/away/{image}.png", side=8 + 2 * image, level=50 * image)
    lines = [f"{first}.png {second}.png {label}\n" for first, second, label in ((0, 1, 1), (2, 3, 0))]
    (tmp_path / "list.txt").write_text("".join(lines * 10))
    return tmp_path / "list.txt"


def test_the_images_of_a_list(listed: Path, tmp_path: Path) -> None:
    message = refusal(lambda: open_sets([listed], 8))
    way_out(message, r"put the images' folder beside the file, or name it: evaluation\.images, and --images")
    assert len(open_sets([listed], 8, folder=tmp_path / "far/away")[0]) == 20
    (tmp_path / "far/away").rename(tmp_path / "away")
    assert len(open_sets([listed], 8)[0]) == 20


@pytest.mark.parametrize("choice", [0, 1])
def test_images_of_another_size(listed: Path, tmp_path: Path, choice: int) -> None:
    def attempt(fit: str) -> Any:
        return open_sets([listed], 8, folder=tmp_path / "far/away", fit=fit)[0]

    found = way_out(refusal(lambda: attempt("exact")), r"set data\.fit to (\w+) or (\w+)")
    assert len(attempt(found[1 + choice])) == 20


def test_pairs_whose_images_are_missing(listed: Path, tmp_path: Path) -> None:
    with listed.open("a") as file:
        file.write("0.png gone.png 1\n")

    def attempt(missing: Any) -> Any:
        return open_sets([listed], 8, folder=tmp_path / "far/away", missing=missing)[0]

    found = way_out(refusal(lambda: attempt("refuse")), r"evaluation\.missing_images=(\w+)")
    assert len(attempt(found[1])) == 20


def test_a_list_that_is_called_as_a_pickle(listed: Path, tmp_path: Path) -> None:
    wrong = listed.rename(tmp_path / "list.bin")
    found = way_out(refusal(lambda: open_sets([wrong], 8)), r"a file with another suffix, such as (\.\w+)")
    assert len(open_sets([wrong.rename(wrong.with_suffix(found[1]))], 8, folder=tmp_path / "far/away")[0]) == 20


@pytest.mark.parametrize(
    ("wrong", "pattern", "right"),
    [
        (b"0.png 1.png 0\n2.png 3.png -1\n", "write 1 and 0", b"0.png 1.png 1\n2.png 3.png 0\n"),
        (
            "0.png 1.png 1\n2.png 3.png 0 \xe9\n".encode("latin-1"),
            "UTF-8|mend that line",
            b"0.png 1.png 1\n2.png 3.png 0\n",
        ),
        (b"0.png 1.png 1\n2.png 3.png\n", "mend that line", b"0.png 1.png 1\n2.png 3.png 0\n"),
        (b"0.png 1.png 1\n", "use a set with impostor pairs too", b"0.png 1.png 1\n2.png 3.png 0\n"),
    ],
)
def test_lines_of_a_list(listed: Path, tmp_path: Path, wrong: bytes, pattern: str, right: bytes) -> None:
    def attempt(lines: bytes) -> Any:
        listed.write_bytes(lines * 10)
        return open_sets([listed], 8, folder=tmp_path / "far/away")[0]

    way_out(refusal(lambda: attempt(wrong)), pattern)
    assert len(attempt(right)) == 20


def test_a_set_in_the_folder_that_was_given(tmp_path: Path) -> None:
    jpeg = io.BytesIO()
    Image.new("RGB", (8, 8)).save(jpeg, "JPEG")
    (tmp_path / "sets").mkdir()
    content = [jpeg.getvalue()] * 40, [True, False] * 10
    (tmp_path / "sets/faces.bin").write_bytes(pickle.dumps(content))
    found = way_out(refusal(lambda: open_sets([tmp_path / "sets"], 8)), r"give a file in it, such as (\S+)")
    given = Path(found[1])
    assert len(open_sets([given], 8)[0]) == 20
    way_out(refusal(lambda: open_sets([given, given], 8)), "name it once")
    assert len(open_sets([given], 8)) == 1


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
        ("h", ["a"], Reading(), r"--(size) (\d+)", "size"),
        (8, ["a"], Reading(size=9), r"leave --(size) out", ""),
        (8, ["a", "b"], Reading(), r"say --(output) (\w+)", "output"),
        (8, ["a"], Reading(output="c"), r"no (output) c, but (\w+)", "output"),
        (8, ["a"], Reading(std=(1, 1)), r"--(std) takes (one) number", "std"),
    ],
)
def test_options_for_a_file_of_another_program(
    tmp_path: Path, side: str | int, outputs: list[str], mistake: Reading, pattern: str, field: str
) -> None:
    path = means(tmp_path / "model.onnx", side, *outputs)
    found = way_out(refusal(lambda: OnnxEmbedder(path, reading=mistake)), pattern)
    values: dict[str, Any] = {"size": lambda: int(found[2]), "output": lambda: found[2], "std": lambda: (128.0,)}
    right = Reading(**({field: values[field]()} if field else {}))
    embedder = OnnxEmbedder(path, reading=right)
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
        distributed._device(settings.distributed.backend, 0, 1, alone=False)

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
    message = refusal(lambda: launched(environment))
    found = way_out(message, r"^(?P<former>.*? set), .*unset the former|unset (?P<names>.*) to run one")
    names = re.findall(r"[A-Z_]{4,}", found["former"] or found["names"])
    assert names
    assert launched({name: value for name, value in environment.items() if name not in names}) is None
