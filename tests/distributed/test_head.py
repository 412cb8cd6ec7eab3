"""The head against a dense, single-process, float64 version of the papers' formulas, on 1 to 4 ranks."""

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from recognition import config
from tests.support.head_checks import EVERY_BATCH, KEPT, batches, part, refusals, resharded
from tests.support.ranks import run_ranks
from tests.support.reference_head import D, dense_training, make
from tests.support.reference_losses import LOSSES

WORLDS = [1, 2, 3, 4]
EXACT, TRAINED, BFLOAT16 = 1e-5, 1e-4, 1e-2
"""Errors, relative to the largest number. float32 rounds to 6e-8, of a logit of 64 and its exponential 4e-6;
1.6e-6 were found. Six steps carry each error on. bfloat16 rounds to 4e-3, which sums of many numbers average out."""


@cache
def attempt(world: int, name: str) -> list[dict[str, Any]] | AssertionError:
    try:
        return run_ranks(part, world, name, str(_folder))
    except AssertionError as failure:
        return failure


def results(world: int, name: str = "others") -> list[dict[str, Any]]:
    found = attempt(world, name)
    if isinstance(found, AssertionError):
        raise found
    return found


_folder: Path


@pytest.fixture(autouse=True, scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> None:
    global _folder
    _folder = tmp_path_factory.mktemp("heads")


each_world = pytest.mark.parametrize("world", WORLDS)


@each_world
@pytest.mark.parametrize("how", ["float32", "kept"])
def test_loss_and_gradients_are_the_papers(world: int, how: str) -> None:
    for rank in results(world, how):
        others = len(LOSSES) - len(EVERY_BATCH)
        assert len(rank[how]) == len(EVERY_BATCH) * (len(batches(world)) + 1) + others * 3
        wrong = {name: errors for name, errors in rank[how].items() if not max(errors) <= EXACT}
        assert not wrong


@each_world
def test_bfloat16_products_are_close(world: int) -> None:
    for rank in results(world, "bfloat16"):
        assert len(rank["bfloat16"]) == 2 * len(LOSSES)
        for name, errors in rank["bfloat16"].items():
            # The error of a logit, and so of its exponential, grows with the scale.
            scale = getattr(LOSSES[name.split()[0]].loss, "scale", 0.0)
            assert 1e-6 < max(errors) <= BFLOAT16 * max(1, scale / 64), name


@each_world
@pytest.mark.parametrize(
    ("how", "name"), [*(("training", name) for name in LOSSES), *(("kept training", name) for name in KEPT)]
)
def test_fused_update_is_torch_sgd(world: int, how: str, name: str) -> None:
    expected = dense_training(name)
    for rank in results(world, how):
        found = rank[how][name]
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert np.abs(found[key] - value).max() <= TRAINED * np.abs(value).max(), key


@each_world
def test_accumulation_is_the_large_batch(world: int) -> None:
    # Both in float32: sums of the same numbers in another order.
    assert max(rank["accumulation"] for rank in results(world)) <= 1e-6


@each_world
def test_a_broken_batch_changes_nothing_on_any_rank(world: int) -> None:
    for rank in results(world):
        for found in rank["broken"]:
            assert found == {"finite": False, "unchanged": True, "went_on": True}


@each_world
def test_only_sampled_rows_take_part(world: int) -> None:
    for rank in results(world):
        for found in rank["sampled"]:
            assert found["untouched"]
            assert found["changed"]
            assert found["count"] == 16
            assert max(found["errors"]) <= EXACT


def test_under_ddp_the_backbone_gets_the_single_process_gradient() -> None:
    for rank in results(2):
        assert max(rank["ddp"]) <= EXACT


@each_world
def test_logits_are_never_held_and_collectives_are_few(world: int) -> None:
    for rank in results(world):
        for name, all_reduces in (("watched", 1), ("watched softmax", 2), ("watched sampled", 1)):
            found = rank[name]
            # The rows themselves are the largest; a chunk of logits and one of rows are smaller.
            assert found["largest"] <= 4000 * D < found["logits"]
            assert found["collectives"] == {
                "_allgather_base_": 2,
                "allreduce_": all_reduces,
                "_reduce_scatter_base_": 1,
            }


@each_world
def test_rules(world: int) -> None:
    for rank in results(world):
        found = rank["rules"]
        assert f"label 9 of sample 2 in the batch of rank {world - 1} is outside 0..8" in found["label 0"]
        assert "label -1 of sample 2" in found["label 1"]
        assert max(found["evaluation"]) <= EXACT
        assert max(found["autocast"]) <= EXACT
        for name in ("evaluation has no graph", "a rate of 0", "frozen backbone", "no parameters"):
            assert found[name], name


def test_initial_rows_differ_and_do_not_depend_on_the_number_of_ranks() -> None:
    rows = results(1)[0]["initial"]
    for world in WORLDS[1:]:
        for rank in results(world):
            np.testing.assert_array_equal(rank["initial"], rows)
    assert len(np.unique(rows, axis=0)) == len(rows)
    # Of 60,000 numbers with deviation 0.01, from a fixed seed: three standard errors, and seven.
    assert rows.mean() == pytest.approx(0, abs=5e-4 / 4)
    assert rows.std() == pytest.approx(0.01, rel=0.02)


def test_state_loads_in_place_at_another_number_of_ranks() -> None:
    results(2)
    # Two classes on three ranks: one shard is empty.
    for errors in run_ranks(resharded, 3, str(_folder)):
        assert len(errors) == 20
        assert max(errors) <= EXACT


def test_needs_a_process_group() -> None:
    with pytest.raises(RuntimeError, match="process group"):
        make(config.ArcFace(), 3)


def test_embeddings_of_another_size_are_refused() -> None:
    run_ranks(refusals, 1)
