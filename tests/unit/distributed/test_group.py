import os
import platform
import resource
import signal
import threading
import time

import numpy as np
import pytest
import torch

from recognition import distributed, hardware
from recognition.config import Distributed
from recognition.distributed import Interrupt, ProcessInfo, group, shard_rows, split
from recognition.errors import UserError
from tests.support.ranks import launch_ranks, run_ranks

_LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture
def no_launcher(monkeypatch):
    for name in _LAUNCHER:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("parts", [1, 2, 3, 7, 8])
@pytest.mark.parametrize("total", [0, 1, 5, 8, 1003])
def test_split_is_even_and_complete(total, parts):
    sizes = split(total, parts)
    assert sizes == [len(block) for block in np.array_split(np.arange(total), parts)]


@pytest.mark.parametrize("world", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("rows", [1, 3, 5, 8, 9, 1003])
def test_shard_rows_are_those_of_chunk(rows, world):
    chunks = [chunk.tolist() for chunk in torch.arange(rows).chunk(world)]
    chunks += [[]] * (world - len(chunks))
    assert [list(shard_rows(rows, world, rank)) for rank in range(world)] == chunks


def test_one_process_needs_no_launcher(no_launcher, threads):
    ranks = distributed.start(Distributed(backend="gloo"), threads=1)
    try:
        assert (ranks.rank, ranks.world, ranks.is_main) == (0, 1, True)
        assert torch.get_num_threads() == 1
        distributed.set_timeout(5)
        x = torch.arange(6.0).view(3, 2)
        assert torch.equal(distributed.all_gather_rows(x), x)
        assert torch.equal(distributed.reduce_scatter_rows(x, [3]), x)
        assert [distributed.any_rank(flag) for flag in (True, False)] == [True, False]
        assert distributed.gather_objects("a") == ["a"]
        assert distributed.broadcast_object("a") == "a"
    finally:
        distributed.stop()
    assert not torch.distributed.is_initialized()
    assert distributed.any_rank(True)
    assert distributed.gather_objects("a") == ["a"]


def test_cores_are_shared_out(no_launcher, threads, monkeypatch):
    monkeypatch.setattr(hardware, "cores", lambda: 3)
    distributed.start(Distributed(backend="gloo"), threads=0)
    distributed.stop()
    assert torch.get_num_threads() == 3


def _faults_of_a_step():
    distributed.start(Distributed(backend="gloo"), threads=1)
    distributed.stop()
    counts = []
    for _ in range(20):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        # More than a MiB each: by default glibc gives all of it back whenever the last of them is freed.
        step = [torch.ones(3 << 18) for _ in range(4)]
        del step
        counts.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    return counts


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a matter of glibc's malloc")
def test_memory_that_a_step_frees_serves_the_next(no_launcher):
    [counts] = launch_ranks(_faults_of_a_step, 1)
    # However large the system's pages are, and whatever else faults now and then.
    assert counts[0] > 0
    assert np.median(counts[5:]) < counts[0] / 10


def test_half_a_launcher_is_refused(no_launcher, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=r"LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT is not.*torchrun"):
        distributed.start(Distributed())
    for name in _LAUNCHER:
        monkeypatch.setenv(name, "two")
    with pytest.raises(UserError, match="RANK=two"):
        distributed.start(Distributed())


def test_nccl_without_gpus_is_refused(no_launcher, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(UserError, match="nccl, which needs a GPU per process: 1 processes here, 0 GPUs"):
        distributed.start(Distributed(backend="nccl"))


def test_processes_that_share_gpus_run_on_the_cpu(monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert group._device("auto", 1, 2, alone=False) == torch.device("cuda", 1)
    assert group._device("gloo", 1, 2, alone=False) == torch.device("cpu")
    assert not caplog.records
    assert group._device("auto", 1, 3, alone=False) == torch.device("cpu")
    assert "3 processes share 2 GPUs" in caplog.text


def test_one_process_on_a_mac_has_its_backbone_on_the_gpu_and_its_head_on_the_cpu(monkeypatch):
    cpu, mps = torch.device("cpu"), torch.device("mps")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert group._device("auto", 0, 1, alone=True) == cpu
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert group._device("auto", 0, 1, alone=True) == mps
    assert group._device("gloo", 0, 1, alone=True) == cpu
    assert group._device("auto", 1, 2, alone=False) == cpu
    assert ProcessInfo(0, 1, 0, 1, mps).head_device == cpu
    for device in (cpu, torch.device("cuda", 1)):
        assert ProcessInfo(0, 1, 0, 1, device).head_device == device


def _started_from_environment():
    ranks = distributed.start(Distributed(backend="gloo"), threads=1)
    everyone = distributed.gather_objects(ranks.rank)
    distributed.stop()
    return ranks.rank, ranks.world, ranks.local_rank, everyone


def test_start_under_a_launcher():
    assert launch_ranks(_started_from_environment, 2) == [(0, 2, 0, [0, 1]), (1, 2, 1, [0, 1])]


def _rows(sizes, dtype):
    rank = torch.distributed.get_rank()
    start = sum(sizes[:rank])
    whole = torch.arange(sum(sizes) * 6, dtype=torch.float32).view(-1, 2, 3).to(dtype)
    own = whole[start : start + sizes[rank]].transpose(1, 2).requires_grad_(dtype.is_floating_point)
    gathered = distributed.all_gather_rows(own, sizes)
    assert torch.equal(gathered, whole.transpose(1, 2))
    assert not gathered.requires_grad
    if len(set(sizes)) == 1:
        assert torch.equal(distributed.all_gather_rows(own), gathered)
    # Rank r contributes (r + 1) times the whole.
    scattered = distributed.reduce_scatter_rows(whole.transpose(1, 2) * (rank + 1), sizes)
    factor = sum(range(1, len(sizes) + 1))
    assert torch.equal(scattered, own.detach() * factor)
    assert scattered.dtype == dtype


def _collectives():
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    for sizes in ([2, 2, 2], [3, 1, 2], [0, 4, 1], [0, 0, 0], [0, 0, 1]):
        for dtype in (torch.float32, torch.bfloat16, torch.int64):
            _rows(sizes, dtype)
    with pytest.raises(ValueError, match="2 sizes for 3 ranks"):
        distributed.all_gather_rows(torch.ones(2), [2, 2])
    with pytest.raises(ValueError, match="add up to 3, but there are 4"):
        distributed.reduce_scatter_rows(torch.ones(4), [1, 1, 1])
    group = torch.distributed.new_group([1, 2])
    if rank:
        assert isinstance(group, torch.distributed.ProcessGroup)
        assert distributed.all_gather_rows(torch.full((rank,), rank), [1, 2], group).tolist() == [1, 2, 2]
    return (
        [distributed.any_rank(flag) for flag in (rank == 1, False, True, rank == world - 1)],
        distributed.broadcast_object({"rank": rank}),
        distributed.gather_objects(rank),
    )


def test_collectives_on_uneven_rows():
    assert run_ranks(_collectives, 3) == [([True, False, True, True], {"rank": 0}, [0, 1, 2])] * 3


def _rank_1_hangs():
    group = torch.distributed.new_group([0, 1])
    assert isinstance(group, torch.distributed.ProcessGroup)
    distributed.set_timeout(0.5, group)
    if torch.distributed.get_rank() == 1:
        return None
    started = time.monotonic()
    with pytest.raises(RuntimeError, match=r"(?i)timed out"):
        torch.distributed.all_reduce(torch.ones(1), group=group)
    return time.monotonic() - started


def test_a_rank_that_hangs_is_noticed_in_time():
    seconds, _ = run_ranks(_rank_1_hangs, 2)
    # The half second that was set, rather than the minute of the other group's; the rest is for a busy machine.
    assert 0.4 < seconds < 30


INTERRUPTS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


def test_interrupt_notes_signals_and_a_later_sigint_acts(monkeypatch):
    before = {number: signal.getsignal(number) for number in INTERRUPTS}
    for number in before:
        with Interrupt() as interrupt:
            assert not interrupt.requested
            os.kill(os.getpid(), number)
            assert interrupt.requested
            os.kill(os.getpid(), signal.SIGTERM)  # asked once more, politely: nothing new
        assert {number: signal.getsignal(number) for number in before} == before
    with Interrupt() as interrupt:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)  # the launcher's echo of the terminal's
        monkeypatch.setattr(group, "ECHO_SECONDS", 0.0)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        assert interrupt.requested
    assert {number: signal.getsignal(number) for number in before} == before


def test_a_run_under_nohup_outlives_its_terminal():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Interrupt() as interrupt:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not interrupt.requested
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_interrupt_restores_handlers_after_an_error():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(ZeroDivisionError), Interrupt():
        raise ZeroDivisionError
    assert signal.getsignal(signal.SIGTERM) is before


def test_interrupt_belongs_in_the_main_thread():
    errors = []

    def enter():
        try:
            Interrupt().__enter__()
        except ValueError as error:
            errors.append(str(error))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert "main thread" in errors[0]
