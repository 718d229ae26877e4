import math
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fpformats import strategies
from fpformats.fitting.histogram import MANTISSA_BITS, Histogram

numbers = arrays(np.float32, st.integers(0, 60), elements=strategies.floats())
finite = arrays(
    np.float32,
    st.integers(1, 60),
    elements=st.floats(width=32, allow_nan=False, allow_infinity=False),
)


def histogram_of(*batches):
    histogram = Histogram()
    for batch in batches:
        histogram.update(batch)
    return histogram


def assert_same(left, right):
    left, right = left.state(), right.state()
    assert left.keys() == right.keys()
    for name, array in left.items():
        assert array.dtype == right[name].dtype
        assert array.tobytes() == right[name].tobytes()


@given(numbers, numbers, numbers)
@settings(deadline=None)
def test_any_cut_and_order_of_a_stream_gives_the_same_histogram(a, b, c):
    whole = histogram_of(np.concatenate([c, a, b]))
    assert_same(histogram_of(a, b, c), whole)
    x, y, z = histogram_of(a), histogram_of(b), histogram_of(c)
    assert_same((x + y) + z, whole)
    assert_same(z + (y + x), whole)
    x.merge(y)
    x.merge(z)
    assert_same(x, whole)
    assert_same(y, histogram_of(b))


def test_long_batches_are_the_same_as_short_ones():
    x = np.random.default_rng(0).standard_normal(600_000).astype(np.float32)
    assert_same(histogram_of(x), histogram_of(*np.split(x, 100)))


@given(finite)
@settings(deadline=None)
def test_each_bin_holds_count_sum_and_sum_of_squares_of_its_numbers(x):
    keys = [(float(n), int(n.view(np.uint32)) >> (23 - MANTISSA_BITS)) for n in x]
    groups = {key: [n for n, other in keys if other == key] for _, key in keys}
    expected = sorted(groups.values(), key=lambda group: (group[0], math.copysign(1, group[0])))
    bins = histogram_of(x).bins()
    assert bins.counts.tolist() == [len(group) for group in expected]
    for i, group in enumerate(expected):
        assert bins.sums[i] == pytest.approx(math.fsum(group), rel=1e-14, abs=0)
        squares = math.fsum(n * n for n in group)
        assert bins.squares[i] == pytest.approx(squares, rel=1e-14, abs=0)


@given(finite, st.integers(1, 5))
@settings(deadline=None)
def test_statistics_are_those_of_the_numbers(x, repeats):
    histogram = Histogram()
    histogram.update(x, repeats)
    wide = np.repeat(x, repeats).astype(np.float64)
    assert (histogram.count, histogram.nonfinite) == (wide.size, 0)
    assert (histogram.min, histogram.max) == (wide.min(), wide.max())
    size = np.abs(wide).max()
    assert histogram.mean == pytest.approx(math.fsum(wide) / wide.size, rel=1e-12, abs=1e-14 * size)
    assert histogram.variance == pytest.approx(wide.var(), rel=1e-9, abs=1e-14 * size**2)


@given(finite, st.floats(0, 1))
@settings(deadline=None)
def test_quantiles_are_right_to_the_width_of_a_bin(x, fraction):
    found = histogram_of(x).quantile(fraction)
    exact = float(np.quantile(x, fraction, method="inverted_cdf"))
    assert found == pytest.approx(exact, rel=2.0**-MANTISSA_BITS, abs=2.0**-126)
    assert histogram_of(x).quantile(0) == x.min()
    assert histogram_of(x).quantile(1) == x.max()


@given(numbers, st.integers(1, 100))
@settings(deadline=None)
def test_repeats_count_as_often(x, repeats):
    histogram = Histogram()
    histogram.update(x, repeats)
    assert_same(histogram, histogram_of(*[x] * repeats))


def test_nan_and_infinities_are_counted_and_left_out():
    histogram = histogram_of(
        np.array([1.0, np.nan, -np.nan, np.inf, -np.inf, 3.0], dtype=np.float32)
    )
    assert (histogram.count, histogram.nonfinite) == (2, 4)
    assert (histogram.min, histogram.max, histogram.mean, histogram.variance) == (1, 3, 2, 1)
    assert histogram.quantile(0.5) == 1
    assert repr(histogram) == "Histogram(2 numbers from 1 to 3, 4 not finite)"
    empty = histogram_of(np.array([np.nan], dtype=np.float32))
    assert (empty.count, empty.min, empty.max) == (0, math.inf, -math.inf)
    assert math.isnan(empty.mean)
    assert math.isnan(empty.variance)
    with pytest.raises(ValueError, match="no finite number was seen"):
        empty.quantile(0.5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_arrays_and_tensors_of_any_type_shape_and_stride_are_taken(dtype):
    x = torch.randn(6, 5, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = histogram_of(x.float().numpy().ravel())
    assert_same(histogram_of(x), expected)
    assert_same(histogram_of(x.permute(2, 0, 1)[::1]), expected)
    assert_same(histogram_of(x.requires_grad_()), expected)
    if dtype != torch.bfloat16:
        assert_same(histogram_of(x.detach().numpy().T), expected)
    assert_same(histogram_of(1.5), histogram_of(np.float32(1.5)))
    assert_same(histogram_of(np.zeros(0, dtype=np.float32)), Histogram())


@given(numbers)
@settings(deadline=None)
def test_a_state_is_restored(x):
    histogram = histogram_of(x)
    state = histogram.state()
    assert_same(Histogram.from_state(state), histogram)
    tensors = {name: torch.from_numpy(array) for name, array in state.items()}
    restored = Histogram.from_state(tensors)
    assert_same(restored, histogram)
    restored.update(np.ones(3, dtype=np.float32))
    assert_same(Histogram.from_state(state), histogram)
    assert_same(pickle.loads(pickle.dumps(histogram)), histogram)  # noqa: S301 - our own bytes


def test_states_that_do_not_fit_are_refused():
    state = histogram_of(np.ones(3, dtype=np.float32)).state()
    with pytest.raises(ValueError, match="state has no bins, ends"):
        Histogram.from_state({"moments": state["moments"]})
    with pytest.raises(ValueError, match=r"moments of shape \(3, 1\) .*; 2 bins need \(3, 2\)"):
        Histogram.from_state({**state, "bins": np.array([1, 2])})


def test_memory_is_that_of_the_bins_in_use():
    histogram = Histogram()
    for seed in range(3):
        histogram.update(np.random.default_rng(seed).standard_normal(100_000).astype(np.float32))
        state = histogram.state()
        assert sum(array.nbytes for array in state.values()) == 28 * len(state["bins"]) + 8
    every = np.arange(0, 1 << 32, 1 << 12, dtype=np.uint32).view(np.float32)
    histogram.update(every)
    assert len(histogram.state()["bins"]) == 1 << 20


def test_bad_updates_are_refused():
    histogram = Histogram()
    with pytest.raises(TypeError, match="x has dtype int64"):
        histogram.update(np.arange(3))
    for repeats in (0, -1, 1.0, True, 1 << 17):
        with pytest.raises(ValueError, match=r"repeats is .*; it must be an integer from 1"):
            histogram.update(1.0, repeats)
    assert histogram.count == 0


def test_a_bin_that_is_full_is_not_wrapped_around():
    worst = np.uint32(0x3F800FFF).view(np.float32)  # the largest integer within a bin
    state = histogram_of(np.array([worst])).state()
    state["moments"] *= 2**38
    histogram = Histogram.from_state(state) + Histogram.from_state(state)
    assert histogram.count == 2**39
    with pytest.raises(OverflowError, match="too many numbers"):
        histogram.merge(histogram)
    assert histogram.count == 2**39


WORKER = """
import sys
import numpy as np
import torch.distributed as dist
from fpformats.fitting.histogram import Histogram

rank, meeting_point = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", f"file://{meeting_point}", rank=rank, world_size=2)
x = np.random.default_rng(0).standard_normal((2, 5000)).astype(np.float32)
x[1] *= 1000
histogram = Histogram()
histogram.update(x[rank])
histogram.all_reduce()
whole = Histogram()
whole.update(x)
for name, array in whole.state().items():
    assert array.tobytes() == histogram.state()[name].tobytes(), name
full = Histogram()
full.update(np.array([0x3F800FFF], dtype=np.uint32).view(np.float32))
full = Histogram.from_state({**full.state(), "moments": full.state()["moments"] * 2**38})
full.merge(full)
try:
    full.all_reduce()
except OverflowError:
    print("same, and guarded")
dist.destroy_process_group()
"""


def test_processes_together_have_the_histogram_of_one(tmp_path):
    workers = [
        subprocess.Popen(  # noqa: S603 - our own program
            [sys.executable, "-c", WORKER, str(rank), str(tmp_path / "meet")],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for worker in workers:
        assert worker.communicate(timeout=120)[0].strip() == "same, and guarded"
        assert worker.returncode == 0
