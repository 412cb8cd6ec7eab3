"""Sampling, row formats, optimizers and auxiliary losses of the head, against float64."""

from functools import cache
from typing import Any

import numpy as np
import pytest

from tests.support.option_checks import AUXILIARY, options
from tests.support.ranks import run_ranks

EXACT = 1e-5
"""Of the largest number: float32 against float64, over as many as eight steps; see test_head.py."""


@cache
def results(world: int) -> list[dict[str, Any]]:
    return run_ranks(options, world, timeout=90)


each_world = pytest.mark.parametrize("world", [1, 3])


@each_world
@pytest.mark.parametrize("name", AUXILIARY)
def test_losses_on_embeddings_join_in(world: int, name: str) -> None:
    assert max(rank["auxiliary"][name] for rank in results(world)) <= EXACT


@each_world
def test_lazy_rows_are_where_dense_sgd_has_them(world: int) -> None:
    for rank in results(world):
        losses, rows, before = rank["lazy"]
        assert losses <= EXACT
        assert rows <= EXACT
        # The rows that sat steps out have indeed not been touched until they were looked at.
        assert before > 1e-3


@each_world
def test_adamw_is_torch_s(world: int) -> None:
    assert max(max(rank["adamw"]) for rank in results(world)) <= EXACT


@each_world
def test_split_is_float32_and_bfloat16_is_near(world: int) -> None:
    for rank in results(world):
        losses, rows = rank["formats"]["float32"]
        split_losses, split_rows = rank["formats"]["split"]
        assert split_losses == losses
        np.testing.assert_array_equal(split_rows, rows)
        near_losses, near_rows = rank["formats"]["bfloat16"]
        # Rounded to 2^-8 in each step, at random and so without a trend.
        np.testing.assert_allclose(near_losses, losses, rtol=0.03)
        assert 0 < np.abs(near_rows - rows).max() < 0.03 * np.abs(rows).max()


@each_world
def test_a_scaled_loss_moves_the_head_as_if_it_were_not(world: int) -> None:
    # A power of two, which float32 multiplies by without rounding.
    assert max(max(rank["loss scale"]) for rank in results(world)) <= 1e-6


@each_world
def test_any_rate_of_sampling(world: int) -> None:
    for rank in results(world):
        found = rank["rates"]
        assert found["zero"] <= EXACT
        assert found["zero touches"]
        assert found["one class a rank"] <= EXACT
        # In standard errors of the mean over 300 draws, which are always the same ones.
        assert abs(found["mean"]) < 4
        assert found["spread"] > 0.01
