import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fpformats import pack, unpack

on_backends = pytest.mark.usefixtures("backend")


@on_backends
@pytest.mark.parametrize("bits", range(1, 17))
@given(data=st.data())
def test_packing_is_the_row_of_bits_and_comes_back(bits, data):
    shape = tuple(data.draw(st.lists(st.integers(0, 5), max_size=3)))
    count = math.prod(shape)
    codes = data.draw(st.lists(st.integers(0, 2**bits - 1), min_size=count, max_size=count))
    codes = np.array(codes, dtype=np.int64).reshape(shape)
    packed = pack(codes, bits)
    row = ((codes.reshape(-1, 1) >> np.arange(bits)) & 1).astype(np.uint8)
    np.testing.assert_array_equal(packed, np.packbits(row, bitorder="little"))
    assert packed.dtype == np.uint8
    back = unpack(packed, bits, shape=shape)
    np.testing.assert_array_equal(back, codes)
    assert back.dtype == (np.uint8 if bits <= 8 else np.uint16)
    tensor = pack(torch.from_numpy(codes), bits)
    np.testing.assert_array_equal(tensor.numpy(), packed)
    np.testing.assert_array_equal(unpack(tensor, bits, shape=shape).numpy(), codes)


@on_backends
def test_two_codes_of_four_bits_share_a_byte_low_half_first():
    assert pack(np.array([1, 2, 15], dtype=np.uint8), 4).tolist() == [0x21, 0x0F]


@on_backends
def test_strided_codes_are_packed_in_row_major_order():
    codes = np.arange(12).reshape(3, 4)
    expected = pack(np.ascontiguousarray(codes.T), 4)
    np.testing.assert_array_equal(pack(codes.T, 4), expected)
    np.testing.assert_array_equal(pack(torch.from_numpy(codes).T, 4).numpy(), expected)


@on_backends
def test_wide_unsigned_tensors_pack():
    codes = torch.tensor([1, 65535, 300]).to(torch.uint16)
    assert torch.equal(unpack(pack(codes, 16), 16, shape=3), codes)


@pytest.mark.slow
def test_packing_compiles():
    codes = torch.arange(48, dtype=torch.uint8).reshape(6, 8) % 8
    compiled = torch.compile(lambda c: unpack(pack(c, 3), 3, shape=c.shape), fullgraph=True)
    assert torch.equal(compiled(codes), codes)


@pytest.mark.parametrize("bits", [0, 17, -1, 2.0, None])
def test_widths_out_of_range_are_refused(bits):
    with pytest.raises(ValueError, match=r"bits is .*; it must be an integer from 1 to 16"):
        pack(np.array([1]), bits)
    with pytest.raises(ValueError, match="bits is"):
        unpack(np.array([1], dtype=np.uint8), bits, shape=1)


@on_backends
@pytest.mark.parametrize("code", [16, -1])
def test_codes_that_do_not_fit_are_refused(code):
    with pytest.raises(ValueError, match="a width of 4 bits has codes 0 to 15"):
        pack(np.array([3, code]), 4)
    with pytest.raises(ValueError, match="a width of 4 bits has codes 0 to 15"):
        pack(torch.tensor([3, code]), 4)


def test_what_is_not_codes_or_bytes_is_refused():
    for codes in (np.array([1.0]), [1], 1, torch.ones(2)):
        with pytest.raises(TypeError, match=r"^codes (is|are)"):
            pack(codes, 4)
    with pytest.raises(TypeError, match="packed is of type int64; it must be uint8"):
        unpack(np.array([1]), 4, shape=2)


@pytest.mark.parametrize("packed", [np.zeros(2, np.uint8), np.zeros((1, 3), np.uint8)])
def test_a_wrong_number_of_bytes_is_refused(packed):
    with pytest.raises(ValueError, match="5 codes of 4 bits take 3 bytes of shape"):
        unpack(packed, 4, shape=(5,))


@on_backends
@pytest.mark.parametrize("bits", range(1, 17))
@pytest.mark.parametrize("shape", [(5,), (4, 7), (2, 3, 5), (3, 0, 2), (0, 4)])
def test_packing_along_an_axis_packs_every_row_of_it(bits, shape):
    codes = np.random.default_rng(bits).integers(0, 2**bits, shape)
    for axis in range(-len(shape), len(shape)):
        packed = pack(codes, bits, axis=axis)
        stored = list(shape)
        stored[axis] = -(-shape[axis] * bits // 8)
        assert packed.shape == tuple(stored)
        for index in np.ndindex(*np.delete(shape, axis)):
            place = list(index)
            place.insert(axis % len(shape), slice(None))
            np.testing.assert_array_equal(packed[tuple(place)], pack(codes[tuple(place)], bits))
        np.testing.assert_array_equal(unpack(packed, bits, shape=shape, axis=axis), codes)
        tensor = pack(torch.from_numpy(codes), bits, axis=axis)
        np.testing.assert_array_equal(tensor.numpy(), packed)
        np.testing.assert_array_equal(unpack(tensor, bits, shape=shape, axis=axis).numpy(), codes)


@on_backends
@pytest.mark.skipif(not hasattr(torch, "float4_e2m1fn_x2"), reason="torch has no 4-bit dtype")
def test_four_bit_bytes_are_those_of_torch():
    packed = pack(torch.tensor([[1, 2, 3, 4]]), 4, axis=1)
    assert packed.view(torch.float4_e2m1fn_x2).view(torch.uint8).tolist() == [[0x21, 0x43]]


@pytest.mark.parametrize("axis", [2, -3, 1.0, True])
def test_axes_out_of_range_are_refused(axis):
    with pytest.raises(ValueError, match=r"axis is .*; there are 2 dimensions"):
        pack(np.zeros((2, 2), int), 4, axis=axis)
    with pytest.raises(ValueError, match=r"axis is .*; there are 2 dimensions"):
        unpack(np.zeros((2, 1), np.uint8), 4, shape=(2, 2), axis=axis)
