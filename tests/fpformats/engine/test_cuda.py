"""Tensors of a CUDA device go through Triton, with nothing for the caller to choose.

Where there is no GPU, tensors of the host are taken for ones of the device, and Triton interprets.
"""

import numpy as np
import pytest
import torch
from oracles import aimed_inputs

from fpformats import decode, decode_scaled, encode, encode_scaled, parse, quantize, quantize_scaled
from fpformats.engine import backends, cpu, cuda

pytestmark = pytest.mark.skipif(cuda.launches() is None, reason="Triton 3.6 is not there")
E2M1, E4M3 = parse("E2M1"), parse("E4M3")


@pytest.fixture(scope="module")
def launches():
    """Count what is launched, so that a test knows that the kernels did the work."""
    counted = []
    original = cuda.launches().triton_kernels
    with pytest.MonkeyPatch.context() as patch, cpu.disabled():
        if not torch.cuda.is_available():
            patch.setattr(cuda, "is_there", torch.is_tensor)
        launch = cuda.launches()._launch
        patch.setattr(
            cuda.launches(), "_launch", lambda *a, **k: (counted.append(a[0]), launch(*a, **k))
        )
        yield counted
    assert original is cuda.launches().triton_kernels


def there(x):
    tensor = torch.from_numpy(x) if isinstance(x, np.ndarray) else x
    return tensor.cuda() if torch.cuda.is_available() else tensor


def same(tensor, expected):
    np.testing.assert_array_equal(tensor.cpu().numpy(), expected)


def test_every_operation_is_one_launch_with_the_bits_of_numpy(launches):
    x = aimed_inputs(E2M1, "float32")
    x = x[np.isfinite(x)].reshape(-1, 2)[:, :1].repeat(6, axis=1)
    scale = np.float32(0.3) + np.arange(len(x), dtype=np.float32)[:, None]
    zero = np.float32(-0.25)
    operations = [
        lambda a, _: quantize(a, E2M1),
        lambda a, _: quantize(a, E2M1, rounding="TowardZero", saturation="SatNone"),
        lambda a, _: quantize(a, E2M1, rounding="StochasticB", random=7, random_bits=9),
        lambda a, _: encode(a, E2M1),
        lambda a, _: encode(a, E2M1, packed=True),
        lambda a, _: encode(a, parse("E3M2"), packed=True),
        lambda a, s: quantize_scaled(a, E2M1, s, float(zero)),
        lambda a, s: encode_scaled(a, E2M1, s),
        lambda a, _: decode(encode(a, E2M1, packed=True), E2M1, shape=tuple(a.shape)),
        lambda a, s: decode_scaled(encode(a, E4M3), E4M3, s),
    ]
    for operation in operations:
        before = len(launches)
        with backends.using("portable"):
            expected = operation(x, scale)
        same(operation(there(x), there(scale)), expected)
        assert len(launches) > before


def test_codes_of_other_widths_are_packed_afterwards(launches):
    x, fmt = np.linspace(-3, 3, 41, dtype=np.float32), parse("E2M2")
    with backends.using("portable"):
        expected = encode(x, fmt, packed=True)
        values = decode(expected, fmt, shape=41)
    packed = encode(there(x), fmt, packed=True)
    same(packed, expected)
    same(decode(packed, fmt, shape=41), values)
    assert launches


def test_strides_and_results_that_overlap_change_nothing(launches):
    memory = torch.linspace(-7, 7, 200)
    with backends.using("portable"):
        expected = quantize(memory.clone(), E2M1)
    x = there(memory.clone())
    assert torch.equal(quantize(x[::3], E2M1).cpu(), expected[::3])
    quantize(x[:-1], E2M1, out=x[1:])
    assert torch.equal(x[1:].cpu(), expected[:-1])
    y = there(memory.clone())
    assert quantize(y, E2M1, out=y) is y
    assert torch.equal(y.cpu(), expected)
    assert launches


def test_nan_without_a_code_is_refused(launches):
    x = there(np.array([1.0, np.nan], np.float32))
    with pytest.raises(ValueError, match="x contains NaN, which E2M1 has no code for"):
        encode(x, E2M1)
    with pytest.raises(ValueError, match="x goes beyond E2M1U, which SatNone makes NaN"):
        encode(there(np.array([-3.0], np.float32)), parse("E2M1U"), saturation="SatNone")
    with pytest.raises(ValueError, match="codes are 0 to 16; E2M1 has codes 0 to 15"):
        decode(there(np.array([0, 16], np.uint8)), E2M1)
    assert encode(x, E2M1, nan=3).tolist() == [2, 3]
    assert launches


def test_gradients_pass_and_wide_formats_take_whole_array_operations(launches):
    x = there(np.array([0.3, 9.0], np.float32)).requires_grad_()
    quantize(x, E2M1).sum().backward()
    assert x.grad.tolist() == [1, 1]
    before = len(launches)
    wide = there(np.array([0.1]))
    same(quantize(wide, parse("E10M30")), quantize(np.array([0.1]), parse("E10M30")))
    assert len(launches) == before
