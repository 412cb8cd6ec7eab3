"""train.py and every tool, given what is wrong: one sentence that names it, status 2, no traceback."""

import errno
import importlib.util
import os
import pickle
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import onnx
import pytest

from recognition.cli import program
from recognition.errors import FailedElsewhere, UserError
from recognition.files.outputs import check_output

REPOSITORY = Path(__file__).resolve().parents[3]
PAGE = b"<!DOCTYPE html>\n<html><head><title>Sign in</title></head></html>\n"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 3\n"


def load(name: str) -> ModuleType:
    path = REPOSITORY / ("train.py" if name == "train" else f"tools/{name}.py")
    specification = importlib.util.spec_from_file_location(f"program_{name}", path)
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    # Dataclasses of a module are looked for where modules are.
    sys.modules[specification.name] = module
    specification.loader.exec_module(module)
    return module


def mean_colours() -> bytes:
    """An ONNX file that takes a picture."""
    data, embedding = (
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)
        for name, shape in (("data", ["n", 3, 16, 16]), ("embedding", ["n", 48]))
    )
    pool = onnx.helper.make_node("AveragePool", ["data"], ["pooled"], kernel_shape=[4, 4], strides=[4, 4])
    nodes = [pool, onnx.helper.make_node("Flatten", ["pooled"], ["embedding"])]
    graph = onnx.helper.make_graph(nodes, "colours", [data], [embedding])
    opset = onnx.helper.make_opsetid("", 17)
    return onnx.helper.make_model(graph, opset_imports=[opset], ir_version=8).SerializeToString()


MODEL = mean_colours()


@pytest.fixture(scope="module")
def mains() -> dict[str, Any]:
    names = ["train", *(path.stem for path in (REPOSITORY / "tools").glob("*.py"))]
    return {name: load(name).main for name in names}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a run, an unreadable file and files that are not what their names say; the current one."""
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "config.toml").write_text(f'[data]\npath = "{tmp_path}"\n[backbone]\nname = "resnet10t"\n')
    for name in ("best.pt", "best.json", "metrics.jsonl"):
        (run / name).write_text("{}\n")
    for name, content in (
        ("page.onnx", PAGE),
        ("page.bin", PAGE),
        ("page.rec", PAGE),
        ("page.toml", PAGE),
        ("pointer.bin", POINTER),
        ("pointer.toml", POINTER),
        ("empty.onnx", b""),
        ("model.onnx", MODEL),
        ("pickle.toml", pickle.dumps([1])),
        ("utf16.toml", "[data]\n".encode("utf-16")),
        ("unquoted.toml", b"[data]\npath = /data/x\n"),
        ("twice.toml", b'[data]\npath = "a"\npath = "b"\n'),
        ("bare.toml", b'[data]\npath = "C:\\faces"\n'),
        ("users.toml", b'[data]\npath = "C:\\Users"\n'),
        ("escape.toml", b'[data]\npath = "D:\\Data"\n'),
        ("yaml.toml", b"data:\n  path: x\n"),
        ("train.toml", f'[data]\npath = "{tmp_path}"\n'.encode()),
        ("file", b"x"),
    ):
        (tmp_path / name).write_bytes(content)
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path


FACES = "--identities 20 --images 1 --pairs 20 --workers 1"
WRONG = [
    # What is missing, a folder, or something else than its name says.
    ("train", "none.toml", "none.toml: No such file or directory"),
    ("train", "folder", "folder: is a folder; give a file of settings"),
    ("train", "page.toml", "page.toml: not valid TOML: the file is an HTML page"),
    ("train", "pointer.toml", "git lfs pull"),
    ("train", "pickle.toml", "the file is a pickle"),
    ("train", "utf16.toml", "UTF-16: save it as UTF-8"),
    ("train", "unquoted.toml", "the line is: path = /data/x; a text needs quotes"),
    ("train", "twice.toml", "the key stands here and further above"),
    ("train", "users.toml", "in double quotes a \\ begins a character's code: write /"),
    ("train", "escape.toml", "in double quotes a \\ begins a character's code: write /"),
    ("train", "yaml.toml", "the line is: data:; a setting is written key = value, one a line"),
    ("train", "bare.toml", "put the text in single quotes"),
    ("train", "train.toml data.path=missing/x", "no such file or folder: missing/x; there is no missing in ."),
    ("train", "train.toml data.path=foldr", "did you mean folder?"),
    ("train", "train.toml data.path=file/x", "data.path: cannot be read: file/x: Not a directory"),
    ("train", "train.toml data.path=~nobody-here/x", "no home folder is known for ~nobody-here"),
    ("train", "train.toml run.folder=", "run.folder: an empty path"),
    ("train", "train.toml --run.folder runs/x", "--run.folder: write run.folder=runs/x, without dashes"),
    ("train", "train.toml --run.folder=runs/x", "write run.folder=runs/x"),
    ("train", "--epochs 3", "--epochs: no option of this program"),
    ("train", "train.toml data.path = folder", "data.path: write data.path=folder, without blanks"),
    ("train", "train.toml other.toml", "other.toml: not section.key=value"),
    ("train", "train.toml backbone.compile=True", "write true or false, in small letters"),
    ("train", f"train.toml data.path={'x' * 300}", "File name too long"),
    ("demo", "nonsense", "nonsense: an override is written section.key=value"),
    ("demo", "training.epoch=1", "did you mean epochs?"),
    ("evaluate", "--model none.onnx --pairs page.bin", "none.onnx"),
    ("evaluate", "--model page.onnx --pairs page.bin", "page.onnx"),
    ("evaluate", "--model model.onnx --pairs none.bin", "none.bin"),
    ("evaluate", "--model model.onnx --pairs folder", "folder"),
    ("evaluate", "--model model.onnx --pairs pointer.bin", "pointer.bin"),
    ("evaluate", "--model page.onnx --pairs page.bin --batch 0", "0 is not a whole number above 0"),
    ("evaluate", "--model= --pairs page.bin", "an empty path"),
    ("export", "none --output m.onnx", "none is not a run folder"),
    ("export", "file --output m.onnx", "file is not a run folder"),
    ("export", "run --output m.onnx", "holds no complete checkpoint"),
    ("export", "run --output m.onnx --which best", "best.pt"),
    ("index", "show none", "none"),
    ("index", "build folder", "folder"),
    ("index", "build page.rec", "page.rec"),
    ("index", "show file", "file"),
    ("faces", "--identities 0 --output new", "0 is not a whole number above 0"),
    ("faces", "--identities 2 --pairs 3 --output new", "pairs is 3: give a multiple of 20"),
    ("faces", "", "give --output DIR, --contact-sheet PNG, or both"),
    ("plan", "--classes 10 --gpus 1 --gpu-memory 1 --backbone nonsense", "no timm model nonsense"),
    ("plan", "--classes 10 --gpus 1 --gpu-memory nan", "nan is not a number above 0"),
    ("plan", "--classes 10 --gpus 1 --gpu-memory 1 --sample-rate 2", "--sample-rate"),
    ("plan", f"--classes {'9' * 5000} --gpus 1 --gpu-memory 1", "is not a whole number above 0"),
    ("doctor", "--folder none", "none"),
    ("doctor", "--folder file", "file"),
    ("doctor", "--ranks ²", "is not a whole number above 0"),
    ("benchmark_data", "--data none", "none"),
    ("benchmark_data", "--data file --threads 0", "0 is not a whole number above 0"),
    ("benchmark_head", "--classes 10 --sample-rate 7", "--sample-rate"),
    ("benchmark_head", "--classes 10 --steps -1", "-1 is not a whole number above 0"),
    ("benchmark_training", "--recipe none.toml", "none.toml"),
    ("benchmark_training", "--recipe page.toml", "an HTML page"),
    ("benchmark_training", "--backbone nonsense --compiler none", "no timm model nonsense"),
    ("tune_head", "--classes 0", "0 is not a whole number above 0"),
    ("tune_head", "--work nonsense", "--work: nonsense: not one of plain"),
    ("gpu_check", "file", "file: is a file; give the name of a folder"),
    ("benchmark_training", "--backbone iresnet18 --recipe page.toml", "--backbone or --recipe, not both"),
    # What the parser itself refuses.
    ("evaluate", "--modle model.onnx", "there is no option --modle; did you mean --model"),
    ("evaluate", "--model model.onnx", "--pairs is missing"),
    ("evaluate", "--model model.onnx --pairs page.bin --fit stretch", "--fit: 'stretch' is not one of 'resize'"),
    ("index", "shwo folder", "there is no subcommand shwo; did you mean show?"),
    ("index", "show", "DATA is missing"),
    ("export", "run", "--output is missing\nSee recognition export --help"),
    ("plan", "--classes", "--classes"),
    ("train", "dmeo", "did you mean the recipe demo?"),
    # Outputs that are folders, inputs, files of a run, or cannot be written.
    ("export", "run --output folder", "folder: is a folder; give the name of a file"),
    ("export", "run --output run", "run: is an input"),
    ("export", "run --output run/config.toml", "belongs to the run in"),
    ("export", "run --output run/best.onnx", "best.json: belongs to the run in"),
    ("export", "run --output run/checkpoints/m.onnx", "its checkpoints"),
    ("export", "run --output file/m.onnx", "file is not a folder"),
    ("export", "run --output /dev/null", "is not a regular file"),
    ("export", f"run --output {'m' * 300}.onnx", "File name too long"),
    ("faces", f"{FACES} --output file", "file: is a file; give the name of a folder"),
    ("faces", f"{FACES} --output run/checkpoints", "its checkpoints"),
    ("faces", f"{FACES} --output file/x", "file is not a folder"),
    ("faces", f"{FACES} --output new --contact-sheet folder", "folder: is a folder"),
    ("faces", "--contact-sheet run/best.pt", "its best backbone"),
    ("index", "build folder --cache file", "file: is a file; give the name of a folder"),
]


def told(mains: dict[str, Any], tool: str, arguments: str, capsys: pytest.CaptureFixture[str]) -> tuple[Any, str]:
    """The status, and what stands on standard error."""
    given = arguments.split(" ") if arguments else []
    try:
        status = mains[tool](given)
    except SystemExit as stop:
        status = stop.code
    captured = capsys.readouterr()
    assert captured.out == ""
    return status, captured.err


@pytest.mark.parametrize(("tool", "arguments", "message"), WRONG, ids=lambda value: str(value)[:60])
def test_a_mistake_is_told_in_words(
    mains: dict[str, Any],
    place: Path,
    capsys: pytest.CaptureFixture[str],
    tool: str,
    arguments: str,
    message: str,
) -> None:
    before = sorted(place.rglob("*"))
    status, error = told(mains, tool, arguments, capsys)
    assert status == 2, error
    assert "Traceback" not in error
    assert message in error
    assert sorted(place.rglob("*")) == before


def test_every_program_is_tried(mains: dict[str, Any]) -> None:
    assert {tool for tool, _, _ in WRONG} == set(mains)


def raising(error: BaseException) -> Callable[[], int]:
    def main() -> int:
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (UserError("data.path: lost"), 2, "error: data.path: lost\n"),
        (KeyboardInterrupt(), 130, ""),
        (PermissionError(errno.EACCES, "Permission denied", "/data/x"), 2, "error: /data/x: Permission denied\n"),
        (OSError(errno.ENOSPC, "No space left on device"), 2, "error: No space left on device\n"),
        (MemoryError(), 2, "error: the memory has run out"),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:114] can't allocate memory"), 2, "Take a smaller batch"),
        (ModuleNotFoundError("", name="onnxruntime"), 2, "-m pip install onnxruntime\n"),
        (ModuleNotFoundError("", name="nvidia.dali"), 2, "-m pip install nvidia-dali-cuda130\n"),
        (ModuleNotFoundError("", name="PIL.Image"), 2, "-m pip install pillow\n"),
        (ModuleNotFoundError("", name="resource"), 2, "WSL on Windows\n"),
        (ModuleNotFoundError("", name="torch._C._none"), 2, "the torch that is installed here has no torch._C._none"),
        (ImportError("libcudnn.so.9: cannot open", name="torch"), 2, "torch is installed here, but cannot be loaded"),
        (UserError("data.path: no text: \udce9"), 2, "no text: \\udce9"),
    ],
)
def test_how_a_program_ends(
    error: BaseException, status: int, message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(program, "_close_standard_output", lambda: None)
    assert program.run(raising(error)) == status
    told = capsys.readouterr().err
    assert message in told.replace("\udce9", "\\udce9")
    assert "Traceback" not in told


@pytest.mark.parametrize(
    "error", [KeyError("x"), ModuleNotFoundError("no module", name="recognition.nonsense"), OSError("odd")]
)
def test_a_defect_has_a_traceback_and_says_how_to_report_it(
    error: Exception, capsys: pytest.CaptureFixture[str]
) -> None:
    assert program.run(raising(error)) == 1
    told = capsys.readouterr().err
    assert told.startswith("Traceback") and type(error).__name__ in told
    assert "issue tracker" in told and "torch " in told and sys.executable in told


def test_a_rank_tells_what_is_its_own(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", os.devnull)
    own = UserError("lost")
    own.add_note("(rank 1 of 2, on node7)")
    far = FailedElsewhere("lost\n(rank 9 of 12, on node8)")
    far.is_far = True
    told = []
    for local_rank, error in (("1", own), ("1", UserError("lost")), ("0", UserError("lost")), ("0", far), ("1", far)):
        monkeypatch.setenv("LOCAL_RANK", local_rank)
        assert program.run(raising(error)) == 2
        told.append(capsys.readouterr().err)
    assert told[:3] == ["error: lost\n(rank 1 of 2, on node7)\n", "", "error: lost\n"]
    assert told[3:] == ["error: lost\n(rank 9 of 12, on node8)\n", ""]


ENDS = """
import sys
sys.path.insert(0, {repository!r})
from recognition.cli import program
def main():
    print("x" * 200000)
    return 0
sys.exit(program.run(main))
"""


@pytest.mark.parametrize(("pipe", "status", "message"), [("| head -c 1", 141, ""), ("> /dev/full", 2, "No space left")])
def test_standard_output_that_takes_no_more(pipe: str, status: int, message: str) -> None:
    if "/dev/full" in pipe and not Path("/dev/full").exists():
        pytest.skip("there is no /dev/full")
    code = ENDS.format(repository=str(REPOSITORY))
    shell = f'{{ "$0" -c "$1"; echo "status $?" >&2; }} {pipe}'
    done = subprocess.run(["sh", "-c", shell, sys.executable, code], capture_output=True, text=True, timeout=60)
    *said, last = done.stderr.splitlines()
    assert last == f"status {status}"
    assert [line for line in said if message not in line or not message] == []


def test_a_package_that_is_missing_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "rich").mkdir()
    (tmp_path / "rich/__init__.py").write_text("raise ModuleNotFoundError(\"No module named 'rich'\", name='rich')")
    command = [sys.executable, str(REPOSITORY / "tools/index.py"), "show", "x"]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)
    assert done.returncode == 2
    assert done.stderr.strip() == "error: the package rich is not installed here; install it: " + (
        f"{sys.executable} -m pip install rich"
    )


def test_outputs(place: Path) -> None:
    assert check_output(Path("~/new/x.onnx"), kind="file") == place / "home/new/x.onnx"
    assert check_output(Path("new/deeper"), kind="folder") == Path("new/deeper")
    assert check_output(Path("run/model.onnx"), kind="file", inputs=[Path("run")]) == Path("run/model.onnx")
    assert not (place / "home").exists() and not (place / "new").exists()
    (place / "link").symlink_to("file")
    with pytest.raises(UserError, match="link: is an input"):
        check_output(Path("link"), kind="file", inputs=[Path("file")])
    with pytest.raises(UserError, match="file: exists already; remove it or choose another"):
        check_output(Path("file"), kind="file", overwrite=False)
    assert (place / "file").read_bytes() == b"x"


def test_an_output_without_permission(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (place / "folder").chmod(stat.S_IRUSR | stat.S_IXUSR)
    if os.access(place / "folder", os.W_OK):
        # The administrator may write everywhere: let the system say no.
        def refuse(**_: Any) -> None:
            raise PermissionError(errno.EACCES, "Permission denied")

        monkeypatch.setattr("recognition.files.outputs.tempfile.TemporaryFile", refuse)
    with pytest.raises(UserError, match="folder/x: cannot be written: Permission denied; choose another output"):
        check_output(Path("folder/x"), kind="file")


def test_windows_has_no_module_resource(monkeypatch: pytest.MonkeyPatch) -> None:
    from recognition.tracking import tracker

    monkeypatch.setitem(sys.modules, "resource", None)
    monkeypatch.setattr("torch.cuda.is_initialized", lambda: False)
    assert tracker.peak_memory() == 0
