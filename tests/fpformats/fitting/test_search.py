import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fpformats import (
    E0M3,
    E1M2,
    E1M3U,
    E2M1,
    E2M1U,
    E2M2U,
    E3M0,
    E4M0U,
    E4M3,
    E8M0,
    FloatFormat,
    parse,
    quantize_scaled,
    values,
)
from fpformats.fitting.histogram import Histogram
from fpformats.fitting.objective import BLOCK, BinnedRow, QuantizedRows, SortedRow
from fpformats.fitting.search import RATIOS, ZERO_POINTS, search

SIGNED = [E1M2, E2M1, E3M0, E0M3, E4M3]
UNSIGNED = [E1M3U, E2M1U, E2M2U, E4M0U]
FORMATS = SIGNED + UNSIGNED
FEW = np.array([0.1, 0.4, 0.7, 1.0])

ordinary = st.floats(-100, 100, width=32)
anything = st.floats(width=32, allow_nan=False, allow_infinity=False)
repeated = st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.25, 1.25, 1.75, 2.5, -5.0, 7.0])
tiny = st.floats(-(2.0**-120), 2.0**-120, width=32)
data = st.one_of(
    *(
        arrays(np.float32, st.integers(1, 300), elements=elements)
        for elements in (ordinary, anything, repeated, tiny)
    )
)
zero_points = st.sampled_from([None, ZERO_POINTS[::10]])


def measured(x, choice, weights=1.0):
    """The sum of squared errors of really quantizing, correctly rounded."""
    with np.errstate(over="ignore"):
        difference = choice.quantize(x).astype(np.float64) - x
        squares = np.square(difference) * weights
    return math.fsum(np.ravel(squares)) if np.isfinite(squares).all() else math.inf


def brute_force(x, fmt, ratios=RATIOS, zeros=None):
    """The least error over a grid of candidates, each of them quantized."""
    least = math.inf
    for fraction in [0.0] if zeros is None or fmt.signed else zeros:
        zero = np.float32(np.float64(x.min()) * fraction)
        reach = np.abs(x).max() if fmt.signed else x.max() - np.float64(zero)
        for ratio in ratios:
            scale = np.float32((reach if reach > 0 else np.abs(x).max()) * ratio / fmt.max)
            if scale == 0:
                scale = np.float32(1)
            rounded = quantize_scaled(x, fmt, scale, zero)
            least = min(least, np.square(rounded.astype(np.float64) - x).sum())
    return least


@pytest.fixture(params=[False, True], ids=["quantized", "sorted"])
def way(request, monkeypatch):
    """Take one of the two ways to the error, whatever the length of the data."""
    monkeypatch.setattr("fpformats.fitting.search.sorting_pays", lambda *_: request.param)


both_ways = pytest.mark.usefixtures("way")


def both_objectives(x, weights=None):
    rows = None if weights is None else weights[None]
    return SortedRow(x, weights), QuantizedRows(x[None], rows)


@settings(deadline=None)
@given(x=data, fmt=st.sampled_from(FORMATS), zeros=zero_points, refine=st.booleans())
def test_the_reported_error_is_that_of_quantizing(x, fmt, zeros, refine):
    for long in (False, True):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("fpformats.fitting.search.sorting_pays", lambda *_, long=long: long)
            choice = search(x, [fmt], ratios=FEW, zero_points=zeros, refine=refine)
        assert choice.squared_error == pytest.approx(measured(x, choice), rel=1e-9, abs=0)


@settings(deadline=None)
@given(
    x=data,
    fmt=st.sampled_from(FORMATS),
    scale=st.floats(2.0**-140, 2.0**100, width=32).map(np.float32),
    zero=st.none() | ordinary.map(np.float32) | tiny.map(np.float32),
    copies=st.integers(1, 3 * BLOCK),
    weighted=st.booleans(),
)
def test_sorted_blocks_measure_what_quantizing_does(x, fmt, scale, zero, copies, weighted):
    x = np.resize(x, x.size * copies)[:2000]
    weights = np.linspace(0, 2, x.size) if weighted else None
    scale, zero = np.array([scale]), None if zero is None else np.array([zero])
    with np.errstate(over="ignore"):
        difference = quantize_scaled(x, fmt, scale, zero).astype(np.float64) - x
        squares = difference**2 * (1 if weights is None else weights)
    true = math.fsum(squares) if np.isfinite(squares).all() else math.inf
    for objective in both_objectives(x, weights):
        assert objective.measured(fmt, scale, zero)[0] == pytest.approx(true, rel=1e-9, abs=0)


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("zero", [None, np.float32(-0.3), np.float32(0.7)])
def test_data_next_to_every_threshold_are_measured_as_they_are_quantized(fmt, zero):
    scale = np.float32(0.3)
    middles = (values(fmt)[1:] + values(fmt)[:-1]) / 2 * scale + (0 if zero is None else zero)
    near = middles.astype(np.float32)[:, None].view(np.int32) + np.arange(-40, 41, dtype=np.int32)
    x = np.repeat(near.view(np.float32).ravel(), 3)
    x = x[np.isfinite(x)]
    scale, zero = np.array([scale]), None if zero is None else np.array([zero])
    difference = quantize_scaled(x, fmt, scale, zero).astype(np.float64) - x
    found = SortedRow(x, None).measured(fmt, scale, zero)[0]
    assert found == pytest.approx(math.fsum(difference**2), rel=1e-12, abs=0)


def moments(x, weights):
    w = np.ones(x.size) if weights is None else weights
    wide = x.astype(np.float64)
    return w, w * wide, w * wide * wide


@settings(deadline=None)
@given(
    x=arrays(np.float32, st.integers(1, 60), elements=ordinary),
    fmt=st.sampled_from(FORMATS),
    scale=st.floats(0.0625, 16, width=32).map(np.float32),
    zero=st.none() | st.floats(-1, 1, width=32).map(np.float32),
    weighted=st.booleans(),
)
def test_both_ways_give_the_same_errors_and_sums(x, fmt, scale, zero, weighted):
    weights = np.linspace(0, 2, x.size) if weighted else None
    ways = both_objectives(x, weights)
    scale, zero = np.array([scale]), None if zero is None else np.array([zero])
    zeros = None if zero is None else zero[:, None]
    energy = max(1.0, float(np.square(x, dtype=np.float64).sum()))
    read, true = (way.errors(fmt, scale[:, None], zeros)[0, 0] for way in ways)
    assert read == pytest.approx(true, rel=1e-6, abs=1e-9 * energy)
    s, z = float(scale[0]), 0.0 if zero is None else float(zero[0])
    for objective in ways:
        w, q, qq, total, xq, xx = (float(each[0]) for each in objective.sums(fmt, scale, zero))
        assert (w, total, xx) == pytest.approx(
            [math.fsum(each) for each in moments(x, weights)], rel=1e-9, abs=1e-9
        )
        error = s * s * qq + 2 * s * z * q + z * z * w - 2 * s * xq - 2 * z * total + xx
        assert error == pytest.approx(true, rel=1e-6, abs=1e-6 * energy)


@both_ways
def test_the_grid_is_searched_as_brute_force_does():
    x = np.random.default_rng(0).standard_normal(300).astype(np.float32)
    choice = search(x, SIGNED, refine=False)
    errors = {fmt: brute_force(x, fmt) for fmt in SIGNED}
    assert choice.format == min(errors, key=errors.get)
    assert choice.zero_point is None
    for fmt, best in choice.by_format.items():
        assert best.squared_error == pytest.approx(errors[fmt], rel=1e-9)


@both_ways
def test_the_grid_of_zero_points_is_searched_as_brute_force_does():
    x = (np.random.default_rng(0).gamma(1.0, size=200) - 0.2).astype(np.float32)
    zeros, ratios = np.linspace(0, 1, 4), np.linspace(0.2, 1, 9)
    choice = search(x, FORMATS, ratios=ratios, zero_points=zeros, refine=False)
    for fmt, best in choice.by_format.items():
        true = brute_force(x, fmt, ratios, zeros)
        assert best.squared_error == pytest.approx(true, rel=1e-9)
        assert (best.zero_point is None) == fmt.signed
    assert choice.squared_error == min(c.squared_error for c in choice.by_format.values())


@settings(deadline=None, max_examples=50)
@given(x=data, zeros=zero_points)
def test_refinement_is_never_worse(x, zeros):
    plain, refined = (
        search(x, FORMATS, ratios=FEW, zero_points=zeros, refine=refine) for refine in (False, True)
    )
    assert refined.squared_error <= plain.squared_error
    for fmt, choice in refined.by_format.items():
        assert choice.squared_error <= plain.by_format[fmt].squared_error
        assert choice.scale > 0


@both_ways
def test_refinement_finds_the_grid_that_data_were_made_on():
    q = np.random.default_rng(0).choice(E2M2U.values(), 500)
    x = (0.37 * q - 1.3).astype(np.float32)
    choice = search(x, [E2M2U], zero_points=ZERO_POINTS)
    assert choice.scale == pytest.approx(0.37, rel=1e-5)
    assert choice.zero_point == pytest.approx(-1.3, rel=1e-5)
    assert choice.squared_error < 1e-9


@both_ways
def test_refinement_reaches_a_least_squares_fit():
    x = np.random.default_rng(1).standard_normal(400).astype(np.float32)
    choice = search(x, [E2M1], ratios=np.array([0.8]))
    q = quantize_scaled(x, E2M1, choice.scale).astype(np.float64) / choice.scale
    assert choice.scale == pytest.approx((q * x).sum() / (q * q).sum(), rel=1e-3)
    assert (
        choice.squared_error < search(x, [E2M1], ratios=np.array([0.8]), refine=False).squared_error
    )


@given(
    x=arrays(np.float32, st.integers(1, 40), elements=st.floats(-8, 8, width=32)),
    power=st.integers(-60, 60),
    zeros=zero_points,
)
@settings(deadline=None, max_examples=50)
def test_the_choice_does_not_depend_on_the_unit_of_the_data(x, power, zeros):
    x = np.where(np.abs(x) < 2.0**-10, np.float32(0), x)
    assume(x.any())
    plain, scaled = (
        search(x * factor, FORMATS, ratios=FEW, zero_points=zeros)
        for factor in (np.float32(1), np.float32(2.0**power))
    )
    assert scaled.format == plain.format
    assert scaled.scale == plain.scale * 2.0**power
    assert scaled.squared_error == plain.squared_error * 4.0**power
    if plain.zero_point is not None:
        assert scaled.zero_point == plain.zero_point * 2.0**power


@pytest.mark.parametrize("power", [-70, -3, 60])
def test_the_choice_for_long_data_does_not_depend_on_their_unit(power):
    x = np.random.default_rng(0).standard_normal(20_000).astype(np.float32)
    factor = np.float32(2.0**power)
    plain, scaled = (
        search(data, FORMATS, zero_points=ZERO_POINTS[::5]) for data in (x, x * factor)
    )
    for fmt, choice in plain.by_format.items():
        assert scaled.by_format[fmt].scale == choice.scale * 2.0**power


@given(
    x=arrays(np.float32, st.integers(1, 30), elements=ordinary),
    seed=st.integers(0, 100),
    zeros=zero_points,
)
@settings(deadline=None, max_examples=50)
def test_integer_weights_are_repetitions(x, seed, zeros):
    repeats = np.random.default_rng(seed).integers(0, 4, x.size)
    assume(repeats.any())
    weights = repeats.astype(np.float32)
    options = {"ratios": FEW, "zero_points": zeros, "refine": False}
    for long in (False, True):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("fpformats.fitting.search.sorting_pays", lambda *_, long=long: long)
            weighted = search(x, FORMATS, weights=weights, **options)
            repeated = search(np.repeat(x, repeats), FORMATS, **options)
        for fmt, choice in weighted.by_format.items():
            expected = repeated.by_format[fmt]
            assert choice.squared_error == pytest.approx(expected.squared_error, rel=1e-9)
            assert choice.squared_error == pytest.approx(measured(x, choice, weights), rel=1e-9)


def test_weights_broadcast_and_draw_the_scale_to_what_is_heavy():
    x = np.stack([np.linspace(-1, 1, 50), np.linspace(-10, 10, 50)]).astype(np.float32)
    light = search(x, [E2M1], weights=np.array([[1.0], [1e-6]], dtype=np.float32))
    heavy = search(x, [E2M1], weights=np.array([[1e-6], [1.0]], dtype=np.float32))
    assert light.scale < heavy.scale / 5
    assert search(x, [E2M1], weights=2.0).squared_error == pytest.approx(
        2 * search(x, [E2M1]).squared_error
    )


@both_ways
@pytest.mark.parametrize("axis", [0, 1, 2, -1])
def test_every_channel_has_the_scale_it_would_have_alone(axis):
    x = np.random.default_rng(0).standard_normal((3, 4, 5)).astype(np.float32)
    x *= np.linspace(1, 9, x.shape[axis], dtype=np.float32).reshape(
        [-1 if i == axis % 3 else 1 for i in range(3)]
    )
    choice = search(x, FORMATS, axis=axis, zero_points=ZERO_POINTS[::15])
    assert choice.scale.shape == tuple(n if i == axis % 3 else 1 for i, n in enumerate(x.shape))
    assert choice.scale.dtype == np.float32
    for fmt, found in choice.by_format.items():
        alone = [
            search(channel, [fmt], zero_points=ZERO_POINTS[::15])
            for channel in np.moveaxis(x, axis, 0)
        ]
        assert found.scale.ravel().tolist() == [each.scale for each in alone]
        if not fmt.signed:
            assert found.zero_point.ravel().tolist() == [each.zero_point for each in alone]
        errors = [each.squared_error for each in alone]
        assert found.squared_errors.ravel().tolist() == errors
        assert found.squared_error == pytest.approx(sum(errors))
    assert choice.squared_error == pytest.approx(measured(x, choice), rel=1e-9)


def test_one_format_serves_all_channels():
    rng = np.random.default_rng(0)
    uniform, heavy = rng.uniform(-1, 1, 400), rng.standard_t(2, 400)
    x = np.stack([uniform, heavy]).astype(np.float32)
    assert search(uniform.astype(np.float32), SIGNED[:3]).format == E1M2
    choice = search(x, SIGNED[:3], axis=0)
    totals = {fmt: found.squared_error for fmt, found in choice.by_format.items()}
    assert choice.format == min(totals, key=totals.get)


@both_ways
@pytest.mark.parametrize("block_size", [(1, 4), (2, 3), (-1, 5), (7, -1), (100, 100)])
def test_every_block_has_the_scale_it_would_have_alone(block_size):
    x = np.random.default_rng(0).standard_normal((6, 10)).astype(np.float32) + 0.5
    choice = search(x, [E2M1, E2M2U], zero_points=ZERO_POINTS[::15], block_size=block_size)
    assert choice.squared_error == pytest.approx(measured(x, choice), rel=1e-9)
    sizes = [n if size == -1 else size for n, size in zip(x.shape, block_size, strict=True)]
    for i, j in np.ndindex(choice.scale.shape):
        block = x[i * sizes[0] : (i + 1) * sizes[0], j * sizes[1] : (j + 1) * sizes[1]]
        for fmt, found in choice.by_format.items():
            alone = search(block, [fmt], zero_points=ZERO_POINTS[::15])
            assert found.squared_errors[i, j] == pytest.approx(alone.squared_error, rel=1e-6)


def test_rows_are_searched_alike_in_batches_of_any_size(monkeypatch):
    x = np.random.default_rng(0).standard_normal((40, 30)).astype(np.float32)
    whole = search(x, FORMATS, axis=0)
    monkeypatch.setattr("fpformats.fitting.search.CHUNK", 70)
    monkeypatch.setattr("fpformats.fitting.objective.CHUNK", 70)
    parts = search(x, FORMATS, axis=0)
    assert (parts.scale == whole.scale).all()
    assert (parts.squared_errors == whole.squared_errors).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_tensors_are_answered_with_tensors(dtype):
    x = torch.randn(4, 50, generator=torch.Generator().manual_seed(0)).to(dtype)
    choice = search(x, [E1M2, E2M1], axis=0)
    wide = x.double() if dtype == torch.float64 else x.float()
    expected = search(wide.numpy(), [E1M2, E2M1], axis=0)
    assert isinstance(choice.scale, torch.Tensor)
    assert choice.scale.dtype == wide.dtype
    assert torch.equal(choice.scale, torch.from_numpy(expected.scale))
    error = (choice.quantize(wide).double() - x.double()).square().sum().item()
    assert choice.squared_error == pytest.approx(error, rel=1e-9)
    assert isinstance(search(x, [E2M1]).scale, float)
    assert isinstance(search(x.requires_grad_(), [E2M1]).scale, float)


def test_data_of_float64_are_searched_in_float64():
    x = 1 + np.random.default_rng(0).standard_normal(1000) * 1e-10
    choice = search(x, [E2M2U], zero_points=ZERO_POINTS)
    assert choice.squared_error < 1e-20 * 1000
    assert choice.squared_error == pytest.approx(measured(x, choice), rel=1e-9)
    for factor in (2.0**-450, 2.0**450):
        assert search(x * factor, [E2M1]).scale == search(x, [E2M1]).scale * factor


@pytest.mark.parametrize("value", [0.0, -0.0])
def test_zeros_are_exact_at_scale_one(value):
    x = np.full((2, 5), value, dtype=np.float32)
    for options in ({}, {"axis": 0}, {"zero_points": ZERO_POINTS}, {"block_size": (1, 2)}):
        choice = search(x, FORMATS, **options)
        assert choice.squared_error == 0
        assert np.all(choice.scale == 1)


def test_zeros_have_the_median_scale_of_the_others():
    x = np.array([[0.0, 0.0], [6.0, 3.0], [0.6, 0.3], [60.0, 30.0]], dtype=np.float32)
    scale = search(x, [E2M1], axis=0).scale.ravel()
    assert scale[0] == scale[1]


@pytest.mark.parametrize("value", [3.7, -3.7, 1e-40, 3e38])
def test_equal_values_are_nearly_exact(value):
    x = np.full(5000, value, dtype=np.float32)
    for choice in (search(x, [E2M1]), search(x, [E2M2U], zero_points=ZERO_POINTS)):
        assert choice.squared_error <= (float(x[0]) * 2e-7) ** 2 * x.size + x.size * 2.0**-292
        assert choice.squared_error == pytest.approx(measured(x, choice), rel=1e-9)


def test_negative_values_are_lost_to_unsigned_formats_without_a_zero_point():
    x = np.array([-1.0, -2.0], dtype=np.float32)
    choice = search(x, [E2M2U])
    assert choice.squared_error == 5
    assert choice.scale > 0
    assert search(x, [E2M2U], zero_points=ZERO_POINTS).squared_error < 1e-12


def test_integers_come_as_uniform_formats():
    x = np.random.default_rng(0).integers(-7, 8, 1000).astype(np.float32)
    choice = search(x, [E2M1, E0M3])
    assert choice.format == E0M3
    assert choice.squared_error == 0


@both_ways
def test_wide_formats_are_measured_to_the_last_digits():
    x = np.random.default_rng(0).standard_normal(300).astype(np.float32)
    choice = search(x, [E8M0], ratios=FEW)
    assert choice.squared_error == pytest.approx(measured(x, choice), rel=1e-9)
    half = search(x, [FloatFormat(5, 10)], ratios=FEW)
    assert half.squared_error == pytest.approx(measured(x, half), rel=1e-9)
    assert half.squared_error < 1e-6 * choice.squared_error


def test_of_equal_formats_the_first_wins():
    x = np.array([1.0, -1.0], dtype=np.float32)
    for formats in itertools.permutations([E0M3, E1M2]):
        assert search(x, formats).format == formats[0]


@pytest.mark.parametrize("x", [np.zeros(0), np.array([1.0, np.nan]), np.array([np.inf])])
def test_empty_and_infinite_data_are_refused(x):
    for data in (x, torch.from_numpy(x)):
        with pytest.raises(ValueError, match="x must hold at least one value and only finite ones"):
            search(data, [E2M1])


def test_bad_arguments_are_refused_by_name():
    x = np.ones((2, 3), dtype=np.float32)
    wide = FloatFormat(8, 10)
    for match, options in {
        "formats must hold at least one": {"formats": []},
        "formats has E8M10 of 19 bits; at most 16": {"formats": [wide]},
        "ratios must be one-dimensional, positive": {"ratios": np.array([0.5, 0.0])},
        "ratios must be": {"ratios": np.array([])},
        "zero_points must be one-dimensional, from 0 to 1": {"zero_points": np.array([-0.3])},
        "weights must be from 0 to": {"weights": -x},
        r"weights has shape \(2,\), which does not broadcast": {"weights": x[:, 0]},
        "axis is 2; x has 2 dimensions": {"axis": 2},
        "only one of them": {"axis": 0, "block_size": (1, -1)},
        r"block_size is \(1,\); it must hold": {"block_size": (1,)},
    }.items():
        with pytest.raises(ValueError, match=match):
            search(x, **{"formats": [E2M1], **options})
    for formats, match in (
        (E2M1, "sequence of formats"),
        ("E2M1", "sequence"),
        ([4], "holds?"),
    ):
        with pytest.raises(TypeError, match=match):
            search(np.ones(3), formats)
    with pytest.raises(TypeError, match="x has dtype int64"):
        search(np.arange(3), [E2M1])
    with pytest.raises(TypeError, match="weights is a Tensor; x is a ndarray"):
        search(x, [E2M1], weights=torch.ones(2, 3))
    with pytest.raises(ValueError, match="the largest magnitude in x is 1e-200"):
        search(np.array([1e-200]), [E2M1])
    with pytest.raises(ValueError, match="float32 cannot hold every value"):
        search(x, [FloatFormat(4, 3, bias=300)])


def test_bins_of_a_histogram_go_where_their_place_goes():
    histogram = BinnedRow(
        np.array([1.0, 4.0], dtype=np.float32),
        weights=np.array([2.0, 1.0]),
        sums=np.array([2.2, 4.0]),
        energy=1.1**2 * 2 + 16.0,
        low=1.1,
        high=4.0,
    )
    error = histogram.errors(E2M1, np.array([[1.0]], dtype=np.float32), None)
    assert error[0, 0] == pytest.approx(0.02)


@settings(deadline=None, max_examples=50)
@given(
    x=arrays(np.float32, st.integers(1, 400), elements=ordinary),
    fmt=st.sampled_from(FORMATS),
    zeros=zero_points,
    refine=st.booleans(),
)
def test_the_error_for_a_histogram_exceeds_the_true_one_by_no_more_than_the_bound(
    x, fmt, zeros, refine
):
    x = np.where(np.abs(x) < 2.0**-100, np.float32(0), x)
    histogram = Histogram()
    histogram.update(x)
    choice = search(histogram, [fmt], ratios=FEW, zero_points=zeros, refine=refine)
    true, energy = math.sqrt(measured(x, choice)), math.sqrt(np.square(x, dtype=float).sum())
    assert true * (1 - 1e-6) - 1e-6 * energy <= math.sqrt(choice.squared_error)
    assert math.sqrt(choice.squared_error) <= true + (2.0**-11 + 1e-6) * energy


@pytest.mark.parametrize("formats", [SIGNED[:3], UNSIGNED, [E4M3]])
def test_a_histogram_leads_to_nearly_the_same_choice(formats):
    normal = np.random.default_rng(0).standard_normal(100_000).astype(np.float32)
    x = normal / (1 + np.exp(-normal))
    histogram = Histogram()
    for batch in np.split(x, 10):
        histogram.update(batch)
    exact = search(x, formats, zero_points=ZERO_POINTS[::3])
    found = search(histogram, formats, zero_points=ZERO_POINTS[::3])
    assert found.format == exact.format
    assert measured(x, found) <= exact.squared_error * (1 + 2e-3)
    assert found.squared_error == pytest.approx(measured(x, found), rel=1e-3)


def test_a_histogram_is_searched_as_a_whole_and_says_what_it_left_out():
    histogram = Histogram()
    with pytest.raises(ValueError, match="has seen no finite number"):
        search(histogram, [E2M1])
    histogram.update(np.array([1.0, np.nan, np.inf, -6.0], dtype=np.float32))
    with pytest.warns(RuntimeWarning, match="2 numbers that are NaN or infinite; they are left"):
        choice = search(histogram, [E2M1])
    assert choice.squared_error == 0
    assert choice.scale == 1
    for options in ({"weights": 1.0}, {"axis": 0}, {"block_size": (1,)}):
        with pytest.raises(TypeError, match="x is a Histogram"):
            search(histogram, [E2M1], **options)


def test_zeros_are_no_exact_match_where_the_format_has_no_zero():
    fmt = FloatFormat(4, 0, signed=False, subnormals=False, zero=False)
    for x in (np.zeros(10, np.float32), np.array([[0.0, 0.0], [3.0, 1.0]], np.float32)):
        choice = search(x, [fmt], axis=0)
        true = np.square(choice.quantize(x).astype(float) - x).sum()
        assert choice.squared_error == pytest.approx(true, rel=1e-9)


@pytest.mark.parametrize("exponent", [0, -20, 9])
@pytest.mark.parametrize("name", ["E1M3U", "E2M2U", "E3M1U", "E0M4U", "E1M7U"])
def test_whole_zero_points_are_whole_numbers_of_steps(name, exponent):
    fmt = parse(name)
    x = np.random.default_rng(0).standard_normal(5000).astype(np.float32) * np.float32(
        2.0**exponent
    )
    x = np.maximum(x, -0.2 * 2.0**exponent).astype(np.float32)
    free = search(x, [fmt], zero_points=ZERO_POINTS)
    choice = search(x, [fmt], zero_points=ZERO_POINTS, whole_zero_points=True)
    steps = -choice.zero_point / (choice.scale * fmt.step)
    assert steps == pytest.approx(round(steps), abs=1e-5)
    assert np.float32(-round(steps)) * np.float32(choice.scale * fmt.step) == choice.zero_point
    assert free.squared_error <= choice.squared_error * (1 + 1e-3)
    error = np.square(choice.quantize(x).astype(np.float64) - x).sum()
    assert choice.squared_error == pytest.approx(error, rel=1e-6)


def test_whole_zero_points_are_searched_as_brute_force_does():
    x = np.random.default_rng(1).standard_normal(300).astype(np.float32)
    x = x / (1 + np.exp(-x))
    fmt = parse("E2M2U")
    choice = search(x, [fmt], zero_points=ZERO_POINTS, whole_zero_points=True, refine=False)
    errors = []
    for offset in x.min() * ZERO_POINTS:
        for ratio in RATIOS:
            scale = np.float32((x.max() - np.float32(offset)) * ratio / float(fmt.max))
            step = np.float64(scale) * fmt.step
            zero = np.float32(np.round(np.float32(offset) / step) * step)
            rounded = quantize_scaled(x, fmt, scale, zero).astype(np.float64)
            errors.append(np.square(rounded - x).sum())
    assert choice.squared_error <= min(errors) * (1 + 1e-6)
    refined = search(x, [fmt], zero_points=ZERO_POINTS, whole_zero_points=True)
    assert refined.squared_error <= choice.squared_error
