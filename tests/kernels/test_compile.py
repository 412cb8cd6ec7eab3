"""Every kernel, as the launchers launch it, compiled for Ampere and Hopper: what it takes of a GPU, without one.

What does not fit into registers is kept in memory, which makes a kernel several times slower and shows in no result.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from recognition import config
from recognition.head.backends.problem import ActiveClasses, LogitOptions, LogitProblem, LossGradient, NegativeTerm
from recognition.head.class_weights.gradient import RowGradient
from recognition.head.class_weights.shard import RowFormat, WeightShard
from recognition.head.losses.negatives import (
    AffineNegatives,
    CurricularNegatives,
    FilteredNegatives,
    Negatives,
    SphereFace2Negatives,
    SphereFaceRNegatives,
)
from tests.support.compiled import Child, Resources, compiling

BATCH, CLASSES, SIZE = 1024, 4096, 512
KIB = 1024
# What a device is called, how its kernels are compiled, and the shared memory that a block may have there.
A100, H100, A10 = "NVIDIA A100-SXM4-80GB", "NVIDIA H100 80GB HBM3", "NVIDIA A10"
DEVICES = {80: {A100: 163 * KIB, A10: 99 * KIB}, 90: {H100: 227 * KIB}}


@dataclass(frozen=True)
class Case:
    """What the kernels are told."""

    negatives: Negatives = field(default_factory=lambda: AffineNegatives(64.0))
    state: RowFormat = "bfloat16"
    options: torch.dtype = torch.bfloat16
    bound: float | None = 64.0
    logistic: bool = False
    unit_rows: bool = True
    sampled: bool = False
    centers: int = 1
    cached_exp: bool = False
    """Whether the forward pass keeps what the backward pass would compute anew."""


CURRICULAR = CurricularNegatives(64.0, torch.tensor(0.3))
CASES = {
    "linear": Case(),
    "kept": Case(cached_exp=True),
    "rows in float32": Case(state="float32"),
    "products in float32": Case(state="float32", options=torch.float32),
    "split, products in float32": Case(state="split", options=torch.float32),
    "bias, running maximum": Case(unit_rows=False, bound=None),
    "curricular, running maximum, sampled": Case(CURRICULAR, bound=128.0, sampled=True),
    "filtered, rows in float32": Case(FilteredNegatives(CURRICULAR, 0.4, zero=False), state="float32"),
    "divided angle": Case(SphereFaceRNegatives(64.0, 1.4)),
    "logistic, sphere2": Case(SphereFace2Negatives(64.0, 0.4, 3.0, torch.tensor(1.0)), logistic=True),
    "sub-centres, filtered, sampled": Case(FilteredNegatives(CURRICULAR, 0.4, zero=False), centers=3, sampled=True),
}
UPDATES: dict[str, tuple[RowFormat, config.SGD | config.AdamW, bool]] = {
    "float32, SGD": ("float32", config.SGD(), False),
    "split, SGD, sampled": ("split", config.SGD(), True),
    "bfloat16, SGD": ("bfloat16", config.SGD(), False),
    "split, AdamW": ("split", config.AdamW(), False),
    "bfloat16, AdamW, sampled": ("bfloat16", config.AdamW(), True),
}
WIDE = "more than registers hold"
ON_A10 = ["linear", "rows in float32", "products in float32"]


def compile_all(arch: int) -> Iterator[tuple[str, str, list[dict[str, Any]]]]:
    """In a process where Triton compiles: device, case and the kernels' resources, of one case after the other."""

    from recognition.head.backends import chunk_loop, triton_backend

    torch.set_num_threads(1)
    with (
        compiling(arch) as resources,
        mock.patch.object(chunk_loop, "multiply", lambda a, b, total: total),
    ):
        for device, name in compiled_for(arch):
            resources.clear()
            if name in CASES:
                with mock.patch.object(triton_backend, "_name", lambda x, device=device: device):
                    launch_products(CASES[name])
            elif name in UPDATES:
                launch_update(*UPDATES[name])
            else:
                launch_wide()
            yield device, name, [asdict(each) for each in resources]


def compiled_for(arch: int) -> list[tuple[str, str]]:
    """Devices and cases, in their order."""
    tiled = [(device, name) for device in DEVICES[arch] for name in (CASES if device != A10 else ON_A10)]
    return tiled + [(next(iter(DEVICES[arch])), name) for name in (*UPDATES, WIDE)]


def launch_products(case: Case) -> None:
    from recognition.head.backends.chunk_loop import backward
    from recognition.head.backends.triton_backend import TritonBackend

    seeds = {"seed": 0, "device": torch.device("cpu"), "row_format": case.state}
    rows = WeightShard.initial(range(CLASSES * case.centers), SIZE, bias=not case.unit_rows, **seeds)  # type: ignore[arg-type]
    x, vector = torch.zeros(BATCH, SIZE, dtype=case.options), torch.zeros(BATCH)
    classes = torch.arange(CLASSES) if case.sampled else None
    active = ActiveClasses(classes, torch.zeros(BATCH, dtype=torch.int64))
    options = LogitOptions(
        unit_rows=case.unit_rows,
        dtype=case.options,
        chunk=CLASSES,
        workspace=1 << 30 if case.cached_exp else None,
        centers=case.centers,
    )
    hard_boundary = None if isinstance(case.negatives, AffineNegatives) else vector
    negative_term = NegativeTerm(case.negatives, hard_boundary, case.logistic, case.bound)
    problem = LogitProblem(rows, active, x, options, negative_term)
    TritonBackend().negative_sums(problem, keep=case.cached_exp)
    if not case.cached_exp:
        backward(TritonBackend(), problem, LossGradient(vector, vector, vector, vector), None)


def launch_update(state: RowFormat, settings: config.SGD | config.AdamW, sampled: bool) -> None:
    from recognition.head.class_weights.optimizer import build_row_optimizer

    cpu = torch.device("cpu")
    rows = WeightShard.initial(range(CLASSES), SIZE, bias=False, seed=0, device=cpu, row_format=state)
    optimizer = build_row_optimizer(settings, "sparse", seed=0)
    optimizer.kernels = True
    rows.moments.update(optimizer.moments(CLASSES, SIZE, bias=False, device=cpu, row_format=state))
    part = torch.arange(0, CLASSES, 2) if sampled else slice(0, CLASSES)
    count = len(rows.positions(part))
    a, x = torch.zeros(8, count, dtype=torch.bfloat16), torch.zeros(8, SIZE, dtype=torch.bfloat16)
    optimizer.begin(rows, 0, 0.1, torch.zeros(()))
    optimizer.update(rows, part, RowGradient(a, x, torch.zeros(count)), 0.1, torch.zeros(()), 0)


def launch_wide() -> None:
    import triton
    import triton.language as tl

    @triton.jit
    def wide_kernel(numbers):
        place = tl.arange(0, 16384)
        scale_and_bias = tl.load(numbers + place)
        tl.debug_barrier()
        tl.store(numbers + place, scale_and_bias / tl.sum(scale_and_bias, 0))

    wide_kernel[(1,)](torch.zeros(16384), num_warps=1)


BOUNDS = {
    "linear": ((200, 64), (255, 32), (192, 144), (254, 96)),
    "kept": ((192, 64), (0, 0), (224, 144), (0, 0)),
    "rows in float32": ((184, 48), (200, 48), (208, 104), (254, 64)),
    "products in float32": ((200, 24), (128, 24), (128, 24), (128, 24)),
    "split, products in float32": ((248, 32), (224, 32), (240, 32), (224, 32)),
    "bias, running maximum": ((200, 64), (240, 32), (192, 144), (144, 96)),
    "curricular, running maximum, sampled": ((254, 64), (255, 32), (254, 144), (255, 96)),
    "filtered, rows in float32": ((160, 40), (168, 40), (128, 52), (176, 52)),
    "divided angle": ((255, 24), (255, 24), (255, 36), (255, 36)),
    "logistic, sphere2": ((184, 24), (208, 24), (184, 36), (192, 36)),
    "sub-centres, filtered, sampled": ((176, 16), (176, 16), (128, 24), (168, 24)),
}
"""Registers per thread and KiB of shared memory, at most: of negative_sums and of logit_gradient, on sm_80, then on
sm_90. The larger of what Triton 3.6 and 3.9 make of them."""
UPDATE_BOUND = (64, 4)
SPILLED = {(80, "curricular, running maximum, sampled", "logit_gradient_kernel"): 64}
"""Bytes per thread that are in memory, not in registers, where there are any: here with Triton 3.6 alone."""


class Compiler:
    """A process that compiles for one architecture, and what it has said so far."""

    def __init__(self, arch: int, folder: Path) -> None:
        self.child = Child(Path(__file__), "compile_all", arch, folder)
        self.said = iter(self.child)
        self.known: dict[tuple[str, str], dict[str, Resources]] = {}

    def resources(self, device: str, case: str) -> dict[str, Resources]:
        """By kernel."""
        while (device, case) not in self.known:
            *key, found = next(self.said)
            self.known[tuple(key)] = {each["kernel"]: Resources(**each) for each in found}
        return self.known[device, case]


@pytest.fixture(scope="module")
def compilers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[int, Compiler]]:
    """Side by side, by architecture."""
    if find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    from triton.backends import backends

    if "nvidia" not in backends:
        pytest.skip("this Triton does not compile for NVIDIA's GPUs")
    found = {arch: Compiler(arch, tmp_path_factory.mktemp(f"sm_{arch}")) for arch in DEVICES}
    for arch, compiler in found.items():
        compiler.resources(*compiled_for(arch)[0])  # the first waits for what they import
    yield found
    for compiler in found.values():
        compiler.child.close()


@pytest.mark.parametrize(
    ("arch", "device", "case"), [(arch, device, case) for arch in DEVICES for device, case in compiled_for(arch)]
)
def test_what_the_kernels_take_of_a_gpu(compilers: dict[int, Compiler], arch: int, device: str, case: str) -> None:
    found = compilers[arch].resources(device, case)
    if case == WIDE:
        # What does not fit into registers is seen.
        assert all(each.stack > 0 for each in found.values())
        return
    if case in UPDATES:
        assert "update_kernel" in found
    else:
        assert ("negative_sums_kernel" in found, "logit_gradient_kernel" in found) == (True, not CASES[case].cached_exp)
    for kernel, each in found.items():
        place = (kernel == "logit_gradient_kernel") + 2 * (arch == 90)
        registers, shared = UPDATE_BOUND if kernel == "update_kernel" else BOUNDS[case][place]
        assert each.registers <= registers and each.shared <= shared * KIB, each
        assert each.stack <= SPILLED.get((arch, case, kernel), 0), each
        assert each.shared <= DEVICES[arch][device], "more than a block may have"
        if case in UPDATES:
            assert each.matrix == ""
        elif CASES[case].options == torch.float32:
            assert each.matrix == "", "rounded to tf32"
        else:
            assert each.matrix.split(" ")[0] == {80: "mma", 90: "wgmma"}[arch], kernel
