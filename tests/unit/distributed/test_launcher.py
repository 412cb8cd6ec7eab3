"""Who a process is, by the variables that torchrun, srun, mpirun and Kubeflow set."""

import pytest

from recognition.distributed.launcher import LaunchInfo, expand_nodes, read_launcher
from recognition.errors import UserError

TORCH = {"RANK": "3", "WORLD_SIZE": "4", "MASTER_ADDR": "first", "MASTER_PORT": "29400"}
SLURM = {"SLURM_NTASKS": "4", "SLURM_PROCID": "2", "SLURM_LOCALID": "0", "SLURM_JOB_ID": "77", "SLURM_STEP_ID": "0"}
TWO_NODES = {"SLURM_NODELIST": "gpu[07-08]", "SLURM_TASKS_PER_NODE": "2(x2)", "SLURM_NODEID": "1"}
OMPI = {f"OMPI_COMM_WORLD_{name}": value for name, value in (("RANK", "1"), ("SIZE", "2"), ("LOCAL_RANK", "1"))}


def place(found: LaunchInfo | None) -> tuple[object, ...] | None:
    if found is None:
        return None
    return found.rank, found.world, found.local_rank, found.local_world, found.address


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, None),
        (TORCH | {"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}, (3, 4, 1, 2, "first")),
        # Kubeflow's pods have a process each.
        (TORCH, (3, 4, 0, 1, "first")),
        (SLURM | TWO_NODES, (2, 4, 0, 2, "gpu07")),
        (SLURM | TWO_NODES | {"MASTER_ADDR": "given"}, (2, 4, 0, 2, "given")),
        (SLURM | {"SLURM_NODELIST": "alone"}, (2, 4, 0, 4, "127.0.0.1")),
        (SLURM | {"SLURM_NODELIST": "a,b", "SLURM_NTASKS_PER_NODE": "2"}, (2, 4, 0, 2, "a")),
        (SLURM | {"SLURM_NODELIST": "a,b", "SLURM_TASKS_PER_NODE": "3,1", "SLURM_NODEID": "0"}, (2, 4, 0, 3, "a")),
        # A step of fewer tasks than its job.
        (SLURM | {"SLURM_STEP_NUM_TASKS": "1"}, None),
        ({"SLURM_NTASKS": "1", "SLURM_PROCID": "0", "SLURM_JOB_ID": "77"}, None),
        (OMPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "2"}, (1, 2, 1, 2, "127.0.0.1")),
        # mpirun within a job of SLURM's, and torchrun within srun.
        (OMPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "2", "SLURM_NTASKS": "8"}, (1, 2, 1, 2, "127.0.0.1")),
        (SLURM | TORCH, (3, 4, 0, 1, "first")),
        (
            {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"},
            (1, 2, 1, 2, "127.0.0.1"),
        ),
    ],
)
def test_a_place(variables: dict[str, str], expected: tuple[object, ...] | None) -> None:
    assert place(read_launcher(variables)) == expected


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"RANK": "1"}, "WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT is not: .*torchrun"),
        (TORCH | {"LOCAL_RANK": "1"}, "LOCAL_WORLD_SIZE is not"),
        (TORCH | {"RANK": "4"}, "contradict each other: rank 4 of 4"),
        (TORCH | {"RANK": "one"}, "whole numbers: RANK=one"),
        (TORCH | {"MASTER_PORT": "-1"}, "MASTER_PORT=-1"),
        ({"SLURM_NTASKS": "2", "SLURM_JOB_ID": "7", "SLURM_PROCID": "0"}, "put srun before python.*unset SLURM_NTASKS"),
        ({"SLURM_NTASKS": "2", "SLURM_PROCID": "0"}, "SLURM_LOCALID is not set.*unset SLURM_NTASKS"),
        (SLURM | {"SLURM_NODELIST": "a,b"}, "2 nodes.*--ntasks-per-node"),
        (SLURM | TWO_NODES | {"SLURM_TASKS_PER_NODE": "3(x2)"}, r"3\(x2\) does not add up to 4 tasks"),
        (SLURM | TWO_NODES | {"SLURM_LOCALID": "2"}, "on this machine 2 of 2"),
        (OMPI, "OMPI_COMM_WORLD_LOCAL_SIZE"),
        (
            OMPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "0"},
            "mpirun -x MASTER_ADDR",
        ),
    ],
)
def test_variables_that_say_no_place(variables: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_launcher(variables)


def test_ranks_of_a_job_meet_at_one_port_and_those_of_another_elsewhere() -> None:
    ports = []
    for job in ("77", "78"):
        places = [read_launcher(SLURM | TWO_NODES | {"SLURM_PROCID": rank, "SLURM_JOB_ID": job}) for rank in "0123"]
        (port,) = {found.port for found in places if found is not None}
        ports.append(port)
    assert ports[0] != ports[1]
    assert all(1024 < port < 32768 for port in ports)


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("node1", ["node1"]),
        ("node[01-03,07],login", ["node01", "node02", "node03", "node07", "login"]),
        ("r[1-2]n[9-10]", ["r1n9", "r1n10", "r2n9", "r2n10"]),
        ("n[098-101].a,b", ["n098.a", "n099.a", "n100.a", "n101.a", "b"]),
        ("", []),
    ],
)
def test_lists_of_nodes(text: str, names: list[str]) -> None:
    assert list(expand_nodes(text)) == names
