from typing import get_args

import pytest
import torch

from fpformats import E2M1, quantize_scaled
from msfp.config import Rounding
from msfp.ptq.rounding.gptq import damped, gptq, upper_factor
from msfp.ptq.rounding.methods import ROUNDINGS
from msfp.ptq.rounding.weight_grid import WeightGrid


def problem():
    """Two groups of a matrix, damped moments of what they read, and scales."""
    draw = torch.Generator().manual_seed(0)
    x, matrix = torch.randn(2, 6, 40, generator=draw), torch.randn(2, 4, 6, generator=draw)
    second = damped(x @ x.mT / 40, 0.01)
    return matrix, second, matrix.abs().amax(dim=-1, keepdim=True) / 6


def test_configs_name_the_ways_of_rounding_that_there_are():
    assert tuple(ROUNDINGS) == get_args(Rounding)


@pytest.mark.parametrize("name", ROUNDINGS)
def test_every_way_gives_values_of_the_grid_in_the_shape_and_dtype_of_the_matrix(name):
    matrix, second, scale = problem()
    for dtype in (torch.float32, torch.float64):
        given = [each.to(dtype) for each in (matrix, second, scale)]
        upper = upper_factor(given[1])
        rounded = ROUNDINGS[name](given[0], WeightGrid(E2M1, given[2]), upper=upper)
        assert (rounded.shape, rounded.dtype) == (matrix.shape, dtype)
        assert rounded.is_contiguous()
        assert torch.equal(rounded, quantize_scaled(rounded, E2M1, given[2]))


def test_nearest_rounds_each_weight_by_itself_and_gptq_does_not():
    matrix, second, scale = problem()
    upper = upper_factor(second)
    nearest = quantize_scaled(matrix, E2M1, scale)
    assert torch.equal(ROUNDINGS["nearest"](matrix, WeightGrid(E2M1, scale), upper=upper), nearest)
    assert not torch.equal(ROUNDINGS["gptq"](matrix, WeightGrid(E2M1, scale), upper=upper), nearest)
    assert ROUNDINGS["gptq"] is gptq
