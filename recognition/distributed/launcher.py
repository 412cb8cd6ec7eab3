"""The rank of this process, by the environment variables of its launcher: torchrun, srun, mpirun or Kubeflow."""

import os
import re
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from recognition.errors import UserError

_NUMBERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
_MPI = {
    "Open MPI": tuple(f"OMPI_COMM_WORLD_{name}" for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")),
    "MPICH": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
}


@dataclass(frozen=True)
class LaunchInfo:
    """A process's rank, and the address at which the ranks meet."""

    rank: int
    world: int
    local_rank: int
    local_world: int
    address: str
    port: int
    note: str = ""
    """A message on what was derived rather than given."""

    def variables(self) -> dict[str, str]:
        """Return the variables that torchrun would have set."""
        numbers = (self.rank, self.world, self.local_rank, self.local_world)
        meeting = {"MASTER_ADDR": self.address, "MASTER_PORT": str(self.port)}
        return {name: str(number) for name, number in zip(_NUMBERS, numbers, strict=True)} | meeting


def read_launcher(environment: Mapping[str, str] = os.environ) -> LaunchInfo | None:
    """Read the launcher's variables; None where there is one process only.

    Raises UserError where variables are missing or contradict each other.
    """
    if "RANK" in environment or "WORLD_SIZE" in environment:
        found: LaunchInfo | None = _by_torch(environment)
    elif any(names[0] in environment and names[2] in environment for names in _MPI.values()):
        found = _by_mpi(environment)
    else:
        found = _by_slurm(environment)
    if found is not None and not (
        0 <= found.local_rank < found.local_world <= found.world and found.local_rank <= found.rank < found.world
    ):
        raise UserError(
            f"the launcher's variables contradict each other: rank {found.rank} of {found.world}, and on this machine "
            f"{found.local_rank} of {found.local_world}; start the processes with torchrun, or correct them"
        )
    return found


def _by_torch(environment: Mapping[str, str]) -> LaunchInfo:
    """Read torchrun's variables, or those of Kubeflow's PyTorchJob, whose pods have one process each."""
    needed = [name for name in (*_NUMBERS, "MASTER_ADDR", "MASTER_PORT") if not environment.get(name)]
    alone = needed == ["LOCAL_RANK", "LOCAL_WORLD_SIZE"]
    if needed and not alone:
        raise UserError(
            f"RANK or WORLD_SIZE is set, but {', '.join(needed)} is not: start several processes with torchrun, "
            "or unset the former to run one"
        )
    note = "LOCAL_RANK and LOCAL_WORLD_SIZE are not set: taken for the only process of this machine" if alone else ""
    numbers = _integers(environment, *(_NUMBERS[:2] if alone else _NUMBERS), "MASTER_PORT")
    rank, world, local_rank, local_world = (*numbers[:2], 0, 1) if alone else numbers[:4]
    return LaunchInfo(rank, world, local_rank, local_world, environment["MASTER_ADDR"], numbers[-1], note)


def _by_mpi(environment: Mapping[str, str]) -> LaunchInfo | None:
    launcher = next(name for name, names in _MPI.items() if names[0] in environment and names[2] in environment)
    missing = [name for name in _MPI[launcher] if not environment.get(name)]
    if missing:
        raise UserError(f"{launcher} has not set {', '.join(missing)}: start the processes with torchrun")
    rank, world, local_rank, local_world = _integers(environment, *_MPI[launcher])
    if world == 1:
        return None
    address = environment.get("MASTER_ADDR", "127.0.0.1" if local_world == world else "")
    if not address:
        raise UserError(
            f"{launcher} has started {world} processes on several machines, which need to know the first one: "
            "mpirun -x MASTER_ADDR=its-name"
        )
    job = zlib.crc32(environment.get("PMIX_NAMESPACE", "").partition("@")[0].encode())
    port, note = _port(environment, job), f"{launcher}'s variables"
    return LaunchInfo(rank, world, local_rank, local_world, address, port, f"by {note}, ranks meet at {address}:{port}")


def _by_slurm(environment: Mapping[str, str]) -> LaunchInfo | None:
    """Read srun's variables. The number of tasks is not enough: sbatch and salloc set it for a single process, too."""
    tasks = "SLURM_STEP_NUM_TASKS" if environment.get("SLURM_STEP_NUM_TASKS") else "SLURM_NTASKS"
    if not environment.get(tasks) or _integers(environment, tasks) == [1]:
        return None
    unset = " and ".join(name for name in ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS") if environment.get(name))
    if "SLURM_JOB_ID" in environment and "SLURM_STEP_ID" not in environment:
        raise UserError(
            f"SLURM has {environment[tasks]} tasks for this job, but this process was not started by srun: put srun "
            f"before python, start torchrun, or unset {unset} to run one process"
        )
    missing = [name for name in ("SLURM_PROCID", "SLURM_LOCALID") if not environment.get(name)]
    if missing:
        raise UserError(
            f"{tasks} is {environment[tasks]}, but {', '.join(missing)} is not set: start several processes with srun "
            f"or torchrun, or unset {unset} to run one"
        )
    world, rank, local_rank = _integers(environment, tasks, "SLURM_PROCID", "SLURM_LOCALID")
    nodes = next((environment[name] for name in _NODES if environment.get(name)), "")
    names = list(expand_nodes(nodes))
    local_world = _slurm_local_world(environment, world, len(names))
    address = environment.get("MASTER_ADDR") or (names[0] if len(names) > 1 else "127.0.0.1")
    port = _port(environment, zlib.crc32(":".join(environment.get(name, "") for name in _JOB).encode()))
    return LaunchInfo(
        rank, world, local_rank, local_world, address, port, f"by SLURM's variables, ranks meet at {address}:{port}"
    )


_NODES = ("SLURM_STEP_NODELIST", "SLURM_NODELIST", "SLURM_JOB_NODELIST")
_JOB = ("SLURM_JOB_ID", "SLURM_STEP_ID")


def _slurm_local_world(environment: Mapping[str, str], world: int, nodes: int) -> int:
    """Return the number of tasks of this node from a list such as "2(x3),1" or one number for all nodes."""
    for name in ("SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE"):
        text = environment.get(name)
        if text:
            parts = [re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip()) for part in text.split(",")]
            counts = [int(part[1]) for part in parts if part for _ in range(int(part[2] or 1))]
            node = _integers(environment, "SLURM_NODEID")[0] if environment.get("SLURM_NODEID") else 0
            if None in parts or sum(counts) != world or node >= len(counts):
                raise UserError(
                    f"{name}={text} does not add up to {world} tasks with this node, number {node}: start the "
                    "processes with srun, whose options say how many tasks there are"
                )
            return counts[node]
    if environment.get("SLURM_NTASKS_PER_NODE"):
        return min(world, _integers(environment, "SLURM_NTASKS_PER_NODE")[0])
    if nodes > 1:
        raise UserError(
            f"SLURM names {nodes} nodes, but not how many tasks each has: give srun --ntasks-per-node, or use torchrun"
        )
    return world


def expand_nodes(text: str) -> Iterator[str]:
    """Expand a node list of SLURM, such as `login,gpu[01-03,7]`."""
    for part in re.findall(r"(?:[^,\[]|\[[^\]]*\])+", text):
        group = re.search(r"\[([^\]]*)\]", part)
        if group is None:
            yield part.strip()
            continue
        before, after = part[: group.start()], part[group.end() :]
        for span in group[1].split(","):
            first, _, last = span.strip().partition("-")
            for number in range(int(first), int(last or first) + 1):
                yield from expand_nodes(f"{before}{number:0{len(first)}}{after}")


def _port(environment: Mapping[str, str], job: int) -> int:
    """Return the given port, or one derived from the job, below the ports that systems assign themselves."""
    return _integers(environment, "MASTER_PORT")[0] if environment.get("MASTER_PORT") else 10000 + job % 20000


def _integers(environment: Mapping[str, str], *names: str) -> list[int]:
    wrong = [f"{name}={environment[name]}" for name in names if not environment[name].strip().isdecimal()]
    if wrong:
        raise UserError(f"the launcher's variables have to be whole numbers: {', '.join(wrong)}")
    return [int(environment[name]) for name in names]
