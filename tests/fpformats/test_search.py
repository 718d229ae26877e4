import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fpformats import E1M2, E2M1, E2M1U, E2M2U, E3M0, E4M0U, E4M3, quantize_scaled
from fpformats.search import RATIOS, SortedTensor, search_rows, search_tensor

FORMATS = [E1M2, E2M1, E3M0, E4M3]


def measured(x, fmt, scale, zero_point=None):
    """The sum of squared errors of really quantizing, in float64."""
    zero = None if zero_point is None else float(zero_point)
    rounded = quantize_scaled(x.astype(np.float64), fmt, float(scale), zero)
    return np.square(rounded - x).sum()


@given(
    x=arrays(np.float32, st.integers(1, 60), elements=st.floats(-100, 100, width=32)),
    fmt=st.sampled_from([*FORMATS, E2M1U, E2M2U, E4M0U]),
    scale=st.floats(0.0625, 16, width=32),
    zero=st.floats(-1, 1, width=32),
)
def test_the_error_read_off_the_sums_is_that_of_quantizing(x, fmt, scale, zero):
    read = SortedTensor(x).squared_error(fmt, np.array([scale]), np.array([zero]))[0]
    true = measured(x, fmt, scale, zero)
    assert read == pytest.approx(true, rel=1e-9, abs=1e-9 * max(1.0, float(np.square(x).sum())))


def test_the_choice_is_that_of_brute_force():
    x = np.random.default_rng(0).standard_normal(300)
    choice = search_tensor(x, FORMATS)
    errors = {
        (fmt, ratio): measured(x, fmt, np.float32(np.abs(x).max() * ratio / float(fmt.max)))
        for fmt, ratio in itertools.product(FORMATS, RATIOS)
    }
    fmt, ratio = min(errors, key=errors.get)
    assert choice.format == fmt
    assert choice.squared_error == pytest.approx(errors[fmt, ratio], rel=1e-9)
    assert choice.zero_point is None


def test_the_choice_with_zero_points_is_that_of_brute_force():
    x = np.random.default_rng(0).gamma(1.0, size=200) - 0.2
    zeros, ratios = np.linspace(-0.3, 0, 4), np.linspace(0.2, 1, 9)
    choice = search_tensor(x, [E2M1U, E2M2U], ratios=ratios, zero_points=zeros)
    best = min(
        measured(x, fmt, np.float32((x.max() - zero) * ratio / float(fmt.max)), np.float32(zero))
        for fmt, zero, ratio in itertools.product([E2M1U, E2M2U], zeros, ratios)
    )
    assert choice.squared_error == pytest.approx(best, rel=1e-6)


@pytest.mark.parametrize("power", [-40, -3, 5, 60])
def test_the_choice_does_not_depend_on_the_scale_of_the_tensor(power):
    x = np.random.default_rng(0).standard_normal(500).astype(np.float32)
    plain, scaled = search_tensor(x, FORMATS), search_tensor(x * 2.0**power, FORMATS)
    assert scaled.format == plain.format
    assert scaled.scale == plain.scale * 2.0**power


def test_rows_get_the_scale_that_brute_force_finds():
    weight = torch.randn(5, 3, 3, 3, generator=torch.Generator().manual_seed(0))
    fmt, scales, errors = search_rows(weight, [E1M2, E2M1])
    for row, scale, error in zip(weight.flatten(1).numpy(), scales, errors, strict=True):
        best = min(
            measured(row, fmt, np.float32(np.abs(row).max() * r / float(fmt.max))) for r in RATIOS
        )
        assert error.item() == pytest.approx(best, rel=1e-4)
        assert measured(row, fmt, scale.item()) == pytest.approx(best, rel=1e-4)


def test_rows_of_zeros_have_scale_one_and_no_error():
    _, scales, errors = search_rows(torch.zeros(2, 4), [E2M1])
    assert scales.tolist() == [1, 1]
    assert errors.tolist() == [0, 0]


def test_a_row_of_zeros_has_the_median_scale_of_the_others():
    weight = torch.tensor([[0.0, 0.0], [6.0, 3.0], [0.6, 0.3], [60.0, 30.0]])
    _, scales, _ = search_rows(weight, [E2M1])
    assert scales[0] == scales[1]


def test_a_tensor_of_zeros_is_exact():
    choice = search_tensor(np.zeros(8), [E2M1])
    assert choice.squared_error == 0
    assert choice.scale > 0


@pytest.mark.parametrize("x", [np.zeros(0), np.array([1.0, np.nan]), np.array([np.inf])])
def test_empty_and_infinite_data_are_refused(x):
    with pytest.raises(ValueError, match="x must hold at least one value and only finite ones"):
        search_tensor(x, [E2M1])


def test_no_formats_are_refused():
    with pytest.raises(ValueError, match="formats must hold at least one format"):
        search_tensor(np.ones(3), [])
    with pytest.raises(ValueError, match="formats must hold at least one format"):
        search_rows(torch.ones(3, 3), [])
