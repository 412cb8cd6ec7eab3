import functools
import importlib.util
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any, get_args

import pytest
import torch

from recognition.head.backends import tiles
from recognition.head.backends.tiles import Kernel, Problem, Section, Tile, Work

A100, H100 = "NVIDIA A100-SXM4-80GB", "NVIDIA H100 80GB HBM3"
TABLE = """
[fallback]
names = []
source = "a test"
chunk = 8192
negative_sums = [
    { work = "plain", bytes = [2, 2], problem = [1024, 1000000, 512], tile = [128, 256, 64], warps = 8, stages = 3 },
    { work = "plain", bytes = [2, 2], problem = [64, 1000000, 512], tile = [64, 256, 64], warps = 8, stages = 3 },
    { work = "plain", bytes = [4, 2], problem = [64, 1000000, 512], tile = [64, 128, 32], warps = 8, stages = 3 },
    { work = "centers", bytes = [2, 2], problem = [64, 1000000, 512], tile = [32, 128, 32], warps = 4, stages = 2 },
]
logit_gradient = [
    { work = "plain", bytes = [2, 2], problem = [1024, 8192, 512], tile = [128, 128, 64], warps = 8, stages = 3 },
]

["NVIDIA H100"]
names = ["H100", "H200"]
source = "a \\"test\\""
chunk = 16384
negative_sums = [
    { work = "plain", bytes = [2, 2], problem = [1024, 1000000, 512], tile = [256, 128, 64], warps = 8, stages = 4 },
]
logit_gradient = [
    { work = "plain", bytes = [2, 2], problem = [1024, 8192, 512], tile = [64, 256, 64], warps = 8, stages = 3 },
]

[PCIe]
names = ["H100 PCIe"]
source = "a test"
chunk = 100
negative_sums = [
    { work = "plain", bytes = [2, 2], problem = [1024, 1000000, 512], tile = [16, 16, 16], warps = 1, stages = 1 },
]
logit_gradient = [
    { work = "plain", bytes = [2, 2], problem = [1024, 8192, 512], tile = [64, 256, 64], warps = 8, stages = 3 },
]
"""


def forget() -> None:
    for cached in (tiles.sections, tiles._nearest, tiles.chunk):
        cached.cache_clear()


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    path = tmp_path / "tiles.toml"
    path.write_text(TABLE)
    monkeypatch.setattr(tiles, "TABLE", path)
    forget()
    yield path
    forget()


def found(device: str = "", **changes: Any) -> tuple[int, int, int]:
    sizes = {"batch": 1024, "classes": 1_000_000, "embedding_size": 512, "itemsize": 2}
    best = tiles.tile("negative_sums", device, **(sizes | changes))
    return best.batch, best.classes, best.depth


def test_a_device_is_found_by_the_part_of_its_name_that_says_most(table: Path) -> None:
    assert found(H100) == found("NVIDIA GH200 480GB") == (256, 128, 64)
    assert found("NVIDIA H100 PCIe") == (16, 16, 16)
    assert found() == found(A100) == found("NVIDIA H1000") == (128, 256, 64)


def test_the_nearest_problem_counts_by_work_then_types_then_doublings(table: Path) -> None:
    assert found(batch=300, classes=100) == (128, 128, 64)
    assert found(batch=250) == (64, 256, 64)
    assert found(batch=1024, itemsize=4, options=2) == (64, 128, 32)
    assert found(batch=1024, itemsize=4, options=4) == (64, 128, 32)
    assert found(batch=1024, itemsize=4, options=2, work="centers") == (32, 128, 32)
    assert tiles.tile("logit_gradient", "", batch=1, classes=1, embedding_size=1, itemsize=4, work="heavy").warps == 8


def test_a_tile_is_no_larger_than_the_problem(table: Path) -> None:
    assert found(batch=100, classes=130, embedding_size=33) == (64, 256, 64)
    assert found(batch=33, classes=65, embedding_size=32) == (64, 128, 32)
    assert found(batch=1, classes=1, embedding_size=1) == (16, 16, 16)


@pytest.mark.parametrize("batch", [1, 64, 1024, 8192])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_a_chunk_stays_within_the_workspace(batch: int, itemsize: int, table: Path) -> None:
    for workspace in (1 << 20, 64 << 20, 256 << 20):
        rows = tiles.chunk("", batch=batch, embedding_size=512, workspace=workspace, itemsize=itemsize)
        needed = itemsize * rows * (batch + 512) + 4 * rows * 512
        assert needed <= workspace
        assert rows == 8192 or 1.5 * needed * (rows + 128) / rows > workspace
        assert rows % 128 == 0 or rows < 128
    assert tiles.chunk("", batch=batch, embedding_size=512, workspace=1, itemsize=itemsize) == 1


def test_a_section_is_written_as_it_is_read(table: Path) -> None:
    for name, section in tiles.sections().items():
        text = section.to_toml(name)
        assert text.strip() in TABLE
        assert Section.of(tomllib.loads(text)[name]) == section


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("[128, 256, 64]", "[128, 257, 64]", "section fallback: ValueError: .*powers of two"),
        ("[128, 256, 64]", "[8, 256, 64]", "section fallback: ValueError: .*below 16"),
        (
            'work = "centers"',
            'work = "centres"',
            "section fallback: ValueError: negative_sums: no work is called centres",
        ),
        ("chunk = 100\n", "", "section PCIe: KeyError: 'chunk'"),
        ("[fallback]", "[other]", "no section fallback"),
        ("stages = 1 }", "stages = 0 }", "section PCIe: ValueError: .*stages at least 1"),
    ],
)
def test_a_damaged_table_is_an_error_that_says_where(before: str, after: str, message: str, table: Path) -> None:
    assert before in TABLE
    table.write_text(TABLE.replace(before, after))
    with pytest.raises(ValueError, match=message):
        tiles.section("")


def test_the_shipped_table_has_a_tile_for_everything() -> None:
    assert set(tiles.sections()) >= {"A100", "H100", "fallback"}
    assert (tiles.name_of(A100), tiles.name_of(H100)) == ("A100", "H100")
    assert tiles.name_of("NVIDIA RTX A1000") == tiles.name_of("") == "fallback"
    for section in tiles.sections().values():
        for kernel in get_args(Kernel):
            known = section.tiles[kernel]
            assert {problem.work for problem in known} == set(get_args(Work))
            assert {problem.bytes for problem in known if problem.work == "plain"} == {(2, 2), (4, 2), (4, 4)}


def test_the_shipped_table_is_part_of_the_package() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    patterns = project["tool"]["setuptools"]["package-data"]["recognition"]
    root = Path(tiles.__file__).parents[2]
    assert tiles.TABLE in [path for pattern in patterns for path in root.glob(pattern)]


@pytest.mark.parametrize("name", ["fallback", "NVIDIA H100", "PCIe", "NVIDIA L40S"])
def test_a_section_takes_the_place_of_the_old_one(name: str, table: Path) -> None:
    old = tiles.sections()
    new = replace(old["PCIe"], chunk=4096, names=("L40S",))
    table.write_text("# A comment.\n" + tiles.put(TABLE, name, new))
    forget()
    assert tiles.sections() == old | {name: new}
    assert list(tiles.sections())[:3] == list(old)
    assert tiles.put(TABLE, name, old.get(name, new)) == (TABLE if name in old else TABLE + "\n" + new.to_toml(name))


def test_a_tile_can_be_forced() -> None:
    best = Tile(16, 512, 32, 2, 1)
    with tiles.forced(best):
        assert found() == found(H100, batch=1) == (16, 512, 32)
    assert found() != (16, 512, 32)


@pytest.fixture
def tuner() -> ModuleType:
    path = Path(__file__).parents[2] / "tools" / "tune_head.py"
    specification = importlib.util.spec_from_file_location("tune_head", path)
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_tuning_without_a_gpu_says_what_to_do(tuner: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert tuner.main([]) == 2
    output, errors = capsys.readouterr()
    assert not output
    assert errors.endswith("error: no CUDA device here: run this on the GPU whose tiles are to be found\n")


@pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton, in its interpreter")
@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is not in use")
def test_tuning_puts_what_was_fastest_into_the_table(table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from recognition.benchmarks import tune

    small, large = Tile(16, 32, 32, 4, 2), Tile(16, 64, 32, 4, 2)
    launched = []

    def milliseconds(run: Callable[[], Any]) -> float:
        """As if the larger tile was better for negative_sums, the smaller one for the rest, and small chunks best."""
        run()
        best = tiles._forced.get()
        assert best is not None
        launched.append(best)
        if isinstance(run, functools.partial):  # a chunk
            return float(len(launched))
        return abs(best.classes - (64 if run.__name__ == "negative_sums" else 32))

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(tune, "_milliseconds", milliseconds)
    monkeypatch.setattr(tune, "CANDIDATES", [small, large])
    monkeypatch.setattr(tune, "CHUNKS", (32, 64, 1 << 20))
    monkeypatch.setattr(tune, "TYPES", {(4, 4): ("float32", torch.float32)})
    old = tiles.sections()
    name, section = tune.tune(
        torch.device("cpu"),
        batches=[8],
        classes=96,
        embedding_size=32,
        work=["heavy", "centers"],
        workspace=256 << 20,
        report=lambda line: None,
        advance=lambda done, total: None,
    )
    table.write_text(tiles.put(table.read_text(), name, section))
    (plain,) = old["NVIDIA H100"].tiles["logit_gradient"].values()
    assert launched == [small, large] * 4 + [plain] * 2
    forget()
    new = tiles.sections()["NVIDIA H100"]
    assert tiles.sections() == old | {"NVIDIA H100": new}
    assert new.names == ("H100", "H200") and new.source.startswith("timed on NVIDIA H200, torch ")
    assert new.chunk == 32
    best_of: dict[tiles.Kernel, Tile] = {"negative_sums": large, "logit_gradient": small}
    for kernel, best in best_of.items():
        added = {Problem(work, (4, 4), (8, 96, 32)): best for work in ("heavy", "centers")}
        assert new.tiles[kernel] == old["NVIDIA H100"].tiles[kernel] | added


def test_distances() -> None:
    one, other = Problem("plain", (2, 2), (64, 100, 512)), Problem("centers", (4, 2), (256, 50, 512))
    assert one.distance(other) == other.distance(one) == (True, 1, 3.0)
    assert one.distance(one) == (False, 0, 0.0)


def test_a_tile_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="powers of two"):
        Tile(64, 64, 64, 3, 2)
