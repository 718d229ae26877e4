import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import assert_same_bits

from fpformats import hadamard

on_backends = pytest.mark.usefixtures("backend")
SIZES = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024]


def by_definition(row, size):
    """Groups of a row, number by number, in the row's dtype."""
    row = [*row]
    for start in range(0, len(row), size):
        distance = 1
        while distance < size:
            for place in range(size):
                if not place & distance:
                    low, high = start + place, start + place + distance
                    row[low], row[high] = row[low] + row[high], row[low] - row[high]
            distance *= 2
    factor = row[0].dtype.type(1 / math.sqrt(size))
    return np.array([number * factor for number in row])


def numbers(shape, seed=0, dtype=np.float32):
    generator = np.random.default_rng(seed)
    return (generator.standard_normal(shape) * 2.0 ** generator.integers(-9, 9, shape)).astype(
        dtype
    )


@on_backends
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("size", SIZES)
def test_groups_are_transformed_as_defined(size, dtype):
    x = numbers((3, 2 * size), dtype=dtype)
    expected = np.stack([by_definition(row, size) for row in x])
    assert_same_bits(hadamard(x, size), expected)
    assert_same_bits(hadamard(torch.from_numpy(x), size), expected)


@on_backends
@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_axis_and_any_strides_give_the_same_bits(data):
    shape = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    axis = data.draw(st.integers(0, len(shape) - 1))
    size = data.draw(st.sampled_from(SIZES[:7]))
    shape[axis] *= size
    x = numbers(shape, seed=data.draw(st.integers(0, 99)))
    rows = np.moveaxis(x, axis, -1).reshape(-1, shape[axis])
    expected = np.stack([by_definition(row, size) for row in rows])
    expected = np.moveaxis(expected.reshape(np.moveaxis(x, axis, -1).shape), -1, axis)
    order = data.draw(st.permutations(range(len(shape))))
    strided = np.ascontiguousarray(x.transpose(order)).transpose(np.argsort(order))
    for array in (x, strided):
        assert_same_bits(hadamard(array, size, axis=axis), expected)
        assert_same_bits(hadamard(torch.from_numpy(array), size, axis=axis - len(shape)), expected)


@pytest.mark.parametrize("size", [4, 16, 64, 256])
def test_the_matrix_is_symmetric_and_orthogonal(size):
    unit = np.eye(size)
    matrix = hadamard(unit, size)
    assert np.array_equal(matrix, matrix.T)
    assert np.array_equal(matrix @ matrix, unit)
    assert set(np.abs(matrix).flat) == {1 / math.sqrt(size)}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_numbers_are_rounded_once(dtype):
    x = torch.from_numpy(numbers((5, 64))).to(dtype)
    assert torch.equal(hadamard(x, 64), hadamard(x.float(), 64).to(dtype))


def test_results_are_the_same_under_compile_and_with_a_gradient():
    x = torch.from_numpy(numbers((4, 32, 6, 5)))
    expected = hadamard(x, 16, axis=1)
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: hadamard(x, 16, axis=1), fullgraph=True)
    assert torch.equal(compiled(x), expected)
    assert torch.equal(torch.vmap(lambda x: hadamard(x, 16, axis=0))(x), expected)
    learning = x.clone().requires_grad_()
    y = hadamard(learning, 16, axis=1)
    assert torch.equal(y, expected)
    wanted = torch.from_numpy(numbers(x.shape, seed=1))
    (y * wanted).sum().backward()
    assert torch.allclose(learning.grad, hadamard(wanted, 16, axis=1), atol=1e-3, rtol=1e-4)


def test_compiled_kernels_keep_channels_last_in_memory(backend):
    x = torch.from_numpy(numbers((2, 32, 6, 5))).contiguous(memory_format=torch.channels_last)
    y = hadamard(x, 16, axis=1)
    assert backend == "portable" or y.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(y, hadamard(x.contiguous(), 16, axis=1))


@on_backends
def test_nan_and_infinity_stay_in_their_group():
    x = numbers((1, 64))
    expected = hadamard(x, 16)
    x[0, 17], x[0, 33] = math.nan, math.inf
    for array in (x, torch.from_numpy(x)):
        found = np.asarray(hadamard(array, 16))
        assert np.isnan(found[0, 16:32]).all()
        assert np.isinf(found[0, 32:48]).all()
        assert_same_bits(
            found[0, [*range(16), *range(48, 64)]], expected[0, [*range(16), *range(48, 64)]]
        )


@on_backends
@pytest.mark.parametrize("shape", [(0, 16), (2, 0), (0,)])
def test_nothing_gives_nothing(shape):
    assert hadamard(np.zeros(shape, np.float32), 16).shape == shape
    assert hadamard(torch.zeros(shape), 16).shape == shape


@pytest.mark.parametrize("size", [0, -4, 3, 12, 2048, 4.0, True, None])
def test_sizes_without_a_matrix_are_refused(size):
    with pytest.raises(ValueError, match=r"size is .*; it must be a power of two up to 1024"):
        hadamard(np.ones(48, np.float32), size)


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match=r"size is 32; .* divides the length 48 of the axis"):
        hadamard(np.ones(48, np.float32), 32)
    with pytest.raises(ValueError, match="axis is 1; x has 1 dimensions"):
        hadamard(np.ones(48, np.float32), 16, axis=1)
    with pytest.raises(TypeError, match="x is of type list"):
        hadamard([1.0, 2.0], 2)
    with pytest.raises(TypeError, match="x has dtype int64"):
        hadamard(np.ones(16, np.int64), 16)
