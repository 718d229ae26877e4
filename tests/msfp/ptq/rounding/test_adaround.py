import itertools

import pytest
import torch

from fpformats import quantize_scaled
from fpformats.parsing import parse
from msfp.ptq.rounding.adaround import adaround
from msfp.ptq.rounding.gptq import output_error


def problem(rows=6, columns=16, groups=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(groups, columns, 2, generator=generator) @ torch.randn(
        groups, 2, 200, generator=generator
    ) + 0.5 * torch.randn(groups, columns, 200, generator=generator)
    matrix = torch.randn(groups, rows, columns, generator=generator)
    return matrix, x @ x.mT / 200, matrix.abs().amax(dim=-1, keepdim=True) / 6


def error_of(matrix, rounded, second):
    return output_error(matrix - rounded, second).sum().item()


@pytest.mark.parametrize("name", ["E1M2", "E2M1", "E3M0", "E0M3"])
def test_every_weight_is_one_of_its_two_neighbours(name):
    fmt = parse(name)
    matrix, second, scale = problem()
    rounded = adaround(matrix, second, fmt, scale)
    low, high = (
        quantize_scaled(matrix, fmt, scale, rounding=f"Toward{end}")
        for end in ("Negative", "Positive")
    )
    assert ((rounded == low) | (rounded == high)).all()


def test_the_output_error_is_less_than_that_of_nearest():
    fmt = parse("E2M1")
    for seed in range(5):
        matrix, second, scale = problem(seed=seed)
        nearest = error_of(matrix, quantize_scaled(matrix, fmt, scale), second)
        assert error_of(matrix, adaround(matrix, second, fmt, scale), second) < 0.8 * nearest


def test_small_matrices_come_close_to_the_best_of_all_choices():
    fmt = parse("E2M1")
    found, best, nearest = 0.0, 0.0, 0.0
    for seed in range(10):
        matrix, second, scale = problem(rows=1, columns=8, seed=seed)
        low, high = (
            quantize_scaled(matrix, fmt, scale, rounding=f"Toward{end}")
            for end in ("Negative", "Positive")
        )
        choices = torch.tensor(list(itertools.product([False, True], repeat=8)))
        best += output_error(matrix - torch.where(choices, high, low), second).min().item()
        found += error_of(matrix, adaround(matrix, second, fmt, scale), second)
        nearest += error_of(matrix, quantize_scaled(matrix, fmt, scale), second)
    assert best <= found < best + 0.3 * (nearest - best)


def test_columns_that_share_nothing_are_rounded_to_nearest():
    matrix, _, scale = problem()
    second = torch.diag_embed(0.5 + torch.rand(1, 16, generator=torch.Generator().manual_seed(1)))
    fmt = parse("E2M1")
    assert torch.equal(adaround(matrix, second, fmt, scale), quantize_scaled(matrix, fmt, scale))


def test_it_is_the_same_every_time_and_leaves_values_of_the_grid_alone():
    fmt = parse("E2M1")
    matrix, second, scale = problem(groups=2)
    first, again = (adaround(matrix, second, fmt, scale) for _ in range(2))
    assert torch.equal(first, again)
    assert torch.equal(adaround(first, second, fmt, scale), first)
