import json
import multiprocessing
import resource
import shutil
import signal

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from recognition import distributed
from recognition.config import Distributed
from recognition.errors import UserError
from recognition.runs import checkpoint
from recognition.runs.checkpoint import CheckpointError, Checkpoints, read_manifest, read_tensors, step_folders
from tests.support.faults import fault, kill, raising
from tests.support.ranks import run_ranks

METADATA = {"config": {"lr": 0.1, "name": "café", "none": None}, "fingerprint": "ab" * 32, "step": 10, "list": [1, 2.5]}


@pytest.fixture
def alone():
    """A process group of one."""
    threads = torch.get_num_threads()
    distributed.start(Distributed(backend="gloo"), threads)
    yield
    distributed.stop()


def _whole() -> dict[str, torch.Tensor]:
    """What the checkpoint holds, in one piece, by arithmetic that needs no generator."""
    rows = torch.arange(1003 * 8, dtype=torch.float32).view(1003, 8)
    return {
        "head.weight": torch.sin(rows),
        "head.momentum": torch.cos(rows).to(torch.bfloat16),
        "head.few": rows[:2].clone(),  # fewer rows than ranks
        "backbone.conv.weight": rows[:512].view(64, 8, 8).transpose(0, 2) / 3,
        "backbone.bn.num_batches_tracked": torch.tensor(2**40 + 1),
        "optimizer.momentum": nn.Parameter(rows[:700].tan()),
    }


def _sharded(fill: bool) -> dict[str, torch.Tensor]:
    """`_whole` as this rank holds it: the head's rows shared out, the rest on every rank; or zeros to load into."""
    rank, world = dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh("cpu", (world,))
    tensors = {}
    for name, whole in _whole().items():
        value = whole if fill else torch.zeros_like(whole)
        if name.startswith("head."):
            own = distributed.shard_rows(len(value), world, rank)
            local = value[own.start : own.stop].clone()
            value = DTensor.from_local(local, mesh, [Shard(0)], shape=value.shape, stride=value.stride())
        tensors[name] = value
    return tensors


def _assert_loaded(folder, from_world: int) -> None:
    checkpoints = Checkpoints(folder, keep=2)
    found = checkpoints.find()
    assert found is not None and found == folder / "step-00000010"
    tensors = _sharded(fill=False)
    places = {name: _local(tensor).data_ptr() for name, tensor in tensors.items()}
    assert checkpoints.load(found, tensors) == METADATA
    for name, expected in _sharded(fill=True).items():
        assert torch.equal(_local(tensors[name]), _local(expected)), name
        assert _local(tensors[name]).data_ptr() == places[name], "loaded in place"
    manifest = read_manifest(found)
    assert (manifest.step, manifest.world_size, manifest.metadata) == (10, from_world, METADATA)


def _local(tensor):
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _save_and_load(folder):
    Checkpoints(folder, keep=2).save(10, _sharded(fill=True), METADATA)
    _assert_loaded(folder, from_world=3)


def test_loads_at_any_number_of_ranks_bitwise(tmp_path, alone):
    run_ranks(_save_and_load, 3, tmp_path)
    _assert_loaded(tmp_path, from_world=3)
    run_ranks(_assert_loaded, 2, tmp_path, 3)

    # What is on every rank is written once.
    written = sum(size for size, _ in read_manifest(tmp_path / "step-00000010").files.values())
    assert written < 1.5 * sum(tensor.nbytes for tensor in _whole().values())

    # A part, by a process alone.
    tensors = read_tensors(tmp_path / "step-00000010", "head.")
    assert tensors.keys() == {"head.weight", "head.momentum", "head.few"}
    assert all(torch.equal(tensor, _whole()[name]) for name, tensor in tensors.items())
    with pytest.raises(
        UserError, match=r"no tensor whose name starts with 'neck\.': backbone\.bn\.num_batches_tracked"
    ):
        read_tensors(tmp_path / "step-00000010", "neck.")


def _faults(folder):
    """What one rank suffers, every rank learns."""
    rank = dist.get_rank()
    checkpoints = Checkpoints(folder, keep=2)
    tensors = _sharded(fill=True)
    first = checkpoints.save(10, tensors, METADATA)

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    with pytest.raises(CheckpointError, match=r"step-00000020 could not be saved .*GB are free.*: rank 1: "):
        checkpoints.save(20, tensors, METADATA)
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    dist.barrier()
    assert sorted(path.name for path in folder.iterdir()) == ["latest", "step-00000010"]
    assert Checkpoints(folder, keep=2).find() == first

    # Rank 0 alone writes the manifest; here it cannot.
    no_space = raising(OSError(28, "no space", "manifest.json"))
    with (
        fault("checkpoint manifest", no_space, step=20, rank=0),
        pytest.raises(CheckpointError, match=r"rank 0: OSError: \[Errno 28\] no space"),
    ):
        checkpoints.save(20, tensors, METADATA)
    assert Checkpoints(folder, keep=2).find() == first

    # A folder that is not the same on all machines: rank 0 does not see what rank 1 wrote.
    with (
        fault("checkpoint manifest", _lose_rank_1, step=20, rank=0),
        pytest.raises(
            CheckpointError, match=r"rank 0 does not see \S*__1_0\.distcp .*file system that all nodes share"
        ),
    ):
        checkpoints.save(20, tensors, METADATA)

    second = checkpoints.save(20, tensors, METADATA)
    dist.barrier()
    if rank == 0:
        _flip_a_bit(second / "__1_0.distcp")
    dist.barrier()
    assert Checkpoints(folder, keep=2).find() == first

    misfit = tensors | {"backbone.conv.weight": torch.zeros(8, 8, 65)}
    with pytest.raises(
        UserError, match=r"backbone\.conv\.weight is torch\.float32 \[8, 8, 64\] in it and .*\[8, 8, 65\]"
    ):
        checkpoints.load(first, misfit)


def _lose_rank_1(*, folder, **_):
    (folder / "__1_0.distcp").unlink()


def _flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_a_fault_on_one_rank_is_an_error_on_all_and_harms_nothing(tmp_path):
    run_ranks(_faults, 2, tmp_path)


def _tensors(value: float) -> dict[str, torch.Tensor]:
    return {"a": torch.full((1000,), float(value)), "b": torch.full((3, 4), float(value))}


def _steps(folder):
    return sorted(path.name for path in folder.iterdir() if path.is_dir())


def _truncate(folder):
    with (folder / "__0_0.distcp").open("r+b") as file:
        file.truncate(100)


def _spoil_manifest(folder):
    text = (folder / "manifest.json").read_text()
    (folder / "manifest.json").write_text(text.replace('"loss": 0.5', '"loss": 0.4'))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda folder: _flip_a_bit(folder / "__0_0.distcp"), "__0_0.distcp has changed since it was written"),
        (lambda folder: _flip_a_bit(folder / ".metadata"), ".metadata has changed since it was written"),
        (_truncate, "__0_0.distcp has 100 bytes instead of "),
        (lambda folder: (folder / "__0_0.distcp").unlink(), "__0_0.distcp is missing"),
        (lambda folder: (folder / "manifest.json").unlink(), "manifest.json cannot be read: FileNotFoundError"),
        (lambda folder: (folder / "manifest.json").write_text("{"), "manifest.json cannot be read: JSONDecodeError"),
        (_spoil_manifest, "manifest.json is not as it was written"),
    ],
    ids=["bit flip", "bit flip in metadata", "truncated", "missing", "no manifest", "half a manifest", "wrong fact"],
)
def test_a_damaged_one_is_passed_over(tmp_path, alone, caplog, damage, reason):
    checkpoints = Checkpoints(tmp_path, keep=3)
    folders = [checkpoints.save(step, _tensors(step), {"loss": 0.5}) for step in (1, 2)]
    damage(folders[1])
    again = Checkpoints(tmp_path, keep=1)
    assert again.find() == folders[0]
    assert f"{folders[1]} is damaged and passed over: {reason}" in caplog.text
    with pytest.raises(CheckpointError, match="is damaged"):
        again.load(folders[1], _tensors(0))
    with pytest.raises(CheckpointError, match="is damaged"):
        read_tensors(folders[1])

    # It does not count as one of those to keep, and is replaced when its step comes again.
    again.save(3, _tensors(3), {})
    assert _steps(tmp_path) == ["step-00000002", "step-00000003"]
    loaded = _tensors(0)
    again.save(2, _tensors(2), {})
    assert again.load(folders[1], loaded) == {}
    assert torch.equal(loaded["a"], _tensors(2)["a"])


def test_nothing_is_unpickled_before_the_hashes_agree(tmp_path, alone, monkeypatch):
    folder = Checkpoints(tmp_path, keep=1).save(1, _tensors(1), {})
    _flip_a_bit(folder / "__0_0.distcp")
    monkeypatch.setattr(checkpoint, "FileSystemReader", lambda path: pytest.fail("the pickle was read"))
    assert Checkpoints(tmp_path, keep=1).find() is None
    for read in (lambda: Checkpoints(tmp_path, keep=1).load(folder, _tensors(0)), lambda: read_tensors(folder)):
        with pytest.raises(CheckpointError):
            read()


def test_retention_keeps_the_newest(tmp_path, alone, monkeypatch, caplog):
    checkpoints = Checkpoints(tmp_path, keep=2)
    assert checkpoints.find() is None
    for step in (1, 2, 3, 4):
        checkpoints.save(step, _tensors(step), {})
    assert _steps(tmp_path) == ["step-00000003", "step-00000004"]
    checkpoints.save(5, _tensors(5), {})
    assert _steps(tmp_path) == ["step-00000004", "step-00000005"]
    assert (tmp_path / "latest").read_text() == "step-00000005\n"

    def refuse(path):
        raise PermissionError(13, "not yours")

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", refuse)
        checkpoints.save(6, _tensors(6), {})
    assert "step-00000004 could not be removed: [Errno 13] not yours" in caplog.text
    assert Checkpoints(tmp_path, keep=2).find() == tmp_path / "step-00000006"

    # Before the newest is safe nothing is removed, and what could not be removed goes with the next.
    checkpoints.save(7, _tensors(7), {})
    assert _steps(tmp_path) == ["step-00000006", "step-00000007"]


def test_steps_are_ordered_as_numbers(tmp_path):
    for name in ("step-99999999", "step-100000000", "step-00000007", "step-00000008.partial", "step-7", "other"):
        (tmp_path / name).mkdir()
    names = [path.name for path in step_folders(tmp_path)]
    assert names == ["step-100000000", "step-99999999", "step-00000007"]
    assert step_folders(tmp_path / "nowhere") == []


def test_a_complete_one_is_never_overwritten(tmp_path, alone):
    checkpoints = Checkpoints(tmp_path, keep=2)
    folder = checkpoints.save(1, _tensors(1), {"first": True})
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert Checkpoints(tmp_path, keep=2).save(1, _tensors(2), {"first": False}) == folder
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before


class Death(BaseException):
    """Stands for a SIGKILL: nothing that cleans up after errors catches it."""


@pytest.mark.parametrize(
    ("point", "counts"),
    [
        ("checkpoint shards", False),
        ("checkpoint hashes", False),
        ("checkpoint manifest", False),
        ("checkpoint name", False),
        ("checkpoint latest", True),
        ("checkpoint retention", True),
    ],
)
def test_death_while_saving_leaves_a_whole_checkpoint(tmp_path, alone, point, counts):
    first = Checkpoints(tmp_path, keep=1).save(1, _tensors(1), {})
    with fault(point, raising(Death()), step=2), pytest.raises(Death):
        Checkpoints(tmp_path, keep=1).save(2, _tensors(2), {})
    again = Checkpoints(tmp_path, keep=1)
    second = tmp_path / "step-00000002"
    assert again.find() == (second if counts else first)
    again.save(2, _tensors(2), {})
    assert _steps(tmp_path) == [second.name]
    assert torch.equal(read_tensors(second)["b"], _tensors(2)["b"])


def _kill_while_saving(folder):
    distributed.start(Distributed(backend="gloo"), threads=1)
    Checkpoints(folder, keep=2).save(1, _tensors(1), {})
    with fault("checkpoint manifest", kill):
        Checkpoints(folder, keep=2).save(2, _tensors(2), {})


def test_killed_while_saving(tmp_path):
    process = multiprocessing.get_context("forkserver").Process(target=_kill_while_saving, args=(tmp_path,))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert _steps(tmp_path) == ["step-00000001", "step-00000002.partial"]
    assert (tmp_path / "latest").read_text() == "step-00000001\n"
    assert Checkpoints(tmp_path, keep=2).find() == tmp_path / "step-00000001"


def test_misfits_are_named_and_leave_the_tensors_alone(tmp_path, alone):
    checkpoints = Checkpoints(tmp_path, keep=1)
    folder = checkpoints.save(1, _tensors(1), {})
    wrong = {"a": torch.zeros(999), "c": torch.zeros(2)}
    with pytest.raises(UserError) as caught:
        checkpoints.load(folder, wrong)
    message = str(caught.value)
    for part in (str(folder), "it lacks c", "only it has b", "a is torch.float32 [1000] in it and torch.float32 [999]"):
        assert part in message
    half = _tensors(0) | {"b": torch.zeros(3, 4, dtype=torch.bfloat16)}
    with pytest.raises(UserError, match=r"b is torch\.float32 \[3, 4\] in it and torch\.bfloat16 \[3, 4\] here"):
        checkpoints.load(folder, half)
    assert not half["a"].any()


def test_metadata_that_is_not_json_is_refused(tmp_path, alone):
    with pytest.raises(CheckpointError, match="not JSON compliant"):
        Checkpoints(tmp_path, keep=1).save(1, _tensors(1), {"loss": float("nan")})
    assert _steps(tmp_path) == []


def test_manifest_lists_every_file(tmp_path, alone):
    folder = Checkpoints(tmp_path, keep=1).save(1, _tensors(1), {})
    tree = json.loads((folder / "manifest.json").read_text())
    assert tree["files"].keys() == {path.name for path in folder.iterdir()} - {"manifest.json"}
    assert {".metadata", "__0_0.distcp"} == tree["files"].keys()
