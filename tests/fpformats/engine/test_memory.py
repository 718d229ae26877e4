"""Where inputs and results lie in memory changes nothing, and nothing else is touched."""

import multiprocessing
import os
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fpformats import decode, decode_scaled, encode, pack, parse, quantize, quantize_scaled, unpack
from fpformats.engine.arrays import is_plain_tensor
from fpformats.kernels import native

on_backends = pytest.mark.usefixtures("backend")
E2M1, E4M3 = parse("E2M1"), parse("E4M3")
SIZES = [0, 1, 7, 8, 9, 31, 1023, 1024, 1025, 5000]


def numbers(size, dtype=np.float32, seed=0):
    return np.random.default_rng(seed).normal(0, 3, size).astype(dtype)


@on_backends
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("size", SIZES)
def test_nothing_outside_the_result_is_written(size, dtype):
    x, guarded = numbers(size, dtype), np.full(size + 64, 77, dtype)
    quantize(x, E2M1, out=guarded[32 : 32 + size])
    assert (guarded[:32] == 77).all()
    assert (guarded[32 + size :] == 77).all()
    np.testing.assert_array_equal(guarded[32 : 32 + size], quantize(x, E2M1))


@on_backends
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", ["E2M1U", "E2M1", "E2M2", "E3M2", "E3M3", "E4M3", "E5M7"])
def test_codes_packed_in_the_same_pass_are_those_packed_afterwards(name, size):
    fmt, x = parse(name), numbers(size)
    packed = encode(x, fmt, packed=True)
    np.testing.assert_array_equal(packed, pack(encode(x, fmt), fmt.bits))
    np.testing.assert_array_equal(decode(packed, fmt, shape=size), quantize(x, fmt))
    tensor = encode(torch.from_numpy(x), fmt, packed=True)
    np.testing.assert_array_equal(tensor.numpy(), packed)
    np.testing.assert_array_equal(unpack(packed, fmt.bits, shape=size), encode(x, fmt))


@on_backends
@given(
    shape=st.lists(st.integers(0, 6), min_size=1, max_size=4),
    steps=st.lists(st.sampled_from([1, 2, -1, -3]), min_size=4, max_size=4),
    order=st.randoms(use_true_random=False),
)
def test_strides_change_nothing(shape, steps, order):
    axes = list(range(len(shape)))
    order.shuffle(axes)
    x = numbers(np.prod(shape, dtype=int)).reshape(shape).transpose(axes)
    x = x[tuple(slice(None, None, step) for step in steps[: x.ndim])]
    plain = np.ascontiguousarray(x)
    expected = quantize(plain, E2M1)
    np.testing.assert_array_equal(quantize(x, E2M1), expected)
    np.testing.assert_array_equal(encode(x, E2M1), encode(plain, E2M1))
    target = np.empty_like(x)
    assert quantize(x, E2M1, out=target) is target
    np.testing.assert_array_equal(target, expected)
    if min(steps) > 0:
        np.testing.assert_array_equal(quantize(torch.from_numpy(x), E2M1).numpy(), expected)


@on_backends
@pytest.mark.parametrize("shift", [-7, -1, 0, 1, 5])
def test_a_result_may_overlap_the_input(shift):
    for make in (np.asarray, torch.from_numpy):
        memory = numbers(4096)
        x, out = memory[64:3000], memory[64 + shift : 3000 + shift]
        expected = quantize(x.copy(), E2M1)
        quantize(make(x), E2M1, out=make(out))
        np.testing.assert_array_equal(out, expected)


@on_backends
def test_a_matrix_may_become_its_own_transpose():
    x = numbers(36).reshape(6, 6)
    expected = quantize(x.copy(), E2M1)
    quantize(x, E2M1, out=x.T)
    np.testing.assert_array_equal(x.T, expected)


@on_backends
@pytest.mark.parametrize("make", [np.asarray, torch.from_numpy])
def test_codes_and_values_go_where_they_are_wanted(make):
    x = make(numbers(300).reshape(3, 100))
    codes, packed = make(np.empty((3, 100), np.uint8)), make(np.empty(150, np.uint8))
    assert encode(x, E2M1, out=codes) is codes
    assert encode(x, E2M1, packed=True, out=packed) is packed
    expected = encode(x, E2M1)
    assert (codes == expected).all()
    assert (packed == encode(x, E2M1, packed=True)).all()
    turned = make(np.empty((100, 3), np.uint8)).T
    assert (encode(x, E2M1, out=turned) == expected).all()
    values = make(np.empty((3, 100), np.float32))
    assert decode(codes, E2M1, out=values) is values
    assert (values == decode(codes, E2M1)).all()
    assert decode_scaled(packed, E2M1, 0.5, shape=(3, 100), out=values) is values
    assert (values == decode_scaled(codes, E2M1, 0.5)).all()
    own = make(numbers(64).view(np.uint8) & 15)
    expected = decode(own, E2M1)[:64]
    assert (decode(own[:64], E2M1, out=own.view(values.dtype)) == expected).all()


@pytest.mark.parametrize(
    ("out", "error", "message"),
    [
        (np.empty(4, np.int8), TypeError, "out is ndarray of int8; it must be uint8"),
        (torch.empty(4, dtype=torch.uint8), TypeError, "and a ndarray as the input is"),
        (np.empty(3, np.uint8), ValueError, r"out has shape \(3,\); the result has shape \(4,\)"),
        ([0], TypeError, "out is a list"),
    ],
)
def test_what_cannot_take_the_result_is_refused(out, error, message):
    with pytest.raises(error, match=message):
        encode(np.zeros(4, np.float32), E2M1, out=out)
    frozen = np.empty(4, np.float32)
    frozen.flags.writeable = False
    with pytest.raises(ValueError, match="out is read-only"):
        decode(np.zeros(4, np.uint8), E2M1, out=frozen)


@on_backends
@pytest.mark.parametrize("make", [np.asarray, torch.from_numpy])
def test_a_result_may_overlap_the_scales(make):
    x = make(numbers(64 * 512).reshape(64, 512))
    memory = np.abs(numbers(64 * 512, seed=1)).reshape(64, 512) + np.float32(0.1)
    expected = quantize_scaled(x, E2M1, make(memory[0].copy()))
    out = make(memory.copy())
    assert (quantize_scaled(x, E2M1, out[0], out=out) == expected).all()
    codes = make(encode(np.asarray(x), E2M1))
    expected = decode_scaled(codes, E2M1, make(memory[0].copy()))
    out = make(memory.copy())
    assert (decode_scaled(codes, E2M1, out[0], out=out) == expected).all()


@on_backends
def test_autograd_knows_what_was_written_to():
    w, x = torch.ones(2, requires_grad=True), torch.tensor([0.3, 1.3])
    product = (w * x).sum()
    quantize(x, E2M1, out=x)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()
    leaf = torch.zeros(2, requires_grad=True)
    with pytest.raises(ValueError, match="out requires a gradient"):
        quantize(torch.ones(2), E2M1, out=leaf)
    with pytest.raises(ValueError, match="out requires a gradient"):
        decode(torch.zeros(2, dtype=torch.uint8), E2M1, out=leaf)
    with torch.no_grad():
        quantize(torch.ones(2), E2M1, out=leaf)
    assert leaf.tolist() == [1, 1]
    assert leaf._version > 0


@on_backends
@pytest.mark.parametrize("fmt", [E2M1, parse("E9M2")], ids=str)
def test_numbers_and_arrays_without_dimensions_keep_their_shape(fmt):
    for x in (np.array(1.3), np.float64(1.3), torch.tensor(1.3, dtype=torch.float64)):
        assert quantize(x, fmt).shape == encode(x, fmt).shape == ()
        assert decode(encode(x, fmt), fmt, dtype="float64").shape == ()
    assert isinstance(encode(np.float64(1.3), fmt), np.unsignedinteger)
    out = np.empty((), np.float64)
    assert quantize(np.float64(1.3), fmt, out=out) is out
    codes = np.empty((), encode(np.float64(1.3), fmt).dtype)
    assert encode(np.float64(1.3), fmt, out=codes) is codes
    assert codes == encode(1.3, fmt)


@on_backends
def test_mapped_files_are_read(tmp_path):
    x = np.memmap(tmp_path / "x", np.float32, "w+", shape=100)
    x[:] = numbers(100)
    np.testing.assert_array_equal(quantize(x, E2M1), quantize(np.array(x), E2M1))


@on_backends
@pytest.mark.parametrize("dtype", [np.int8, np.int16, np.int32, np.int64, np.uint16, np.uint64])
def test_codes_of_any_integer_type_are_decoded(dtype):
    codes = np.arange(16, dtype=dtype)
    np.testing.assert_array_equal(decode(codes, E2M1), decode(codes.astype(np.uint8), E2M1))
    with pytest.raises(ValueError, match="codes are 3 to 16; E2M1 has codes 0 to 15"):
        decode(np.array([3, 16], dtype), E2M1)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: encode(np.ones(3), parse("E0M0UNZ"), packed=True), ValueError, "has 0 bits"),
        (
            lambda: decode(np.zeros(0, np.uint8), parse("E0M0UNZ"), shape=3),
            ValueError,
            "bits is 0; it must be",
        ),
        (lambda: decode(np.zeros(2, np.uint8), E2M1, shape=(-1, -3)), ValueError, "shape is "),
        (lambda: decode(np.zeros(2, np.uint8), E2M1, shape=2.5), ValueError, "shape is 2.5"),
        (lambda: encode(np.ones(3), E2M1, nan=1.5), ValueError, "nan is 1.5"),
        (lambda: encode(np.ones(3), E2M1, nan=True), ValueError, "nan is True"),
        (
            lambda: quantize(np.ones(3), 4),
            TypeError,
            "fmt is 4; it must be a FloatFormat or a name",
        ),
        (lambda: quantize(np.ones(3), "E2X1"), ValueError, "'E2X1' is not a format name"),
        (lambda: quantize([1.0], E2M1), TypeError, r"x is of type list; write numpy.array\(x\) or"),
        (lambda: quantize((1.0,), E2M1), TypeError, "x is of type tuple; write"),
        (lambda: quantize(1, E2M1), TypeError, r"x is of type int; write float\(x\)"),
        (lambda: quantize_scaled(np.ones(3), E2M1, 1.0, block_size=2), ValueError, "block_size is"),
        (lambda: decode(np.zeros(2, np.uint8), E2M1, dtype=[1]), TypeError, r"dtype is \[1\]"),
        (
            lambda: decode(np.zeros(2, np.uint8), E2M1, dtype="bfloat16"),
            TypeError,
            "NumPy does not",
        ),
    ],
)
def test_arguments_that_cannot_be_are_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


@on_backends
def test_shapes_may_be_numbers_of_numpy():
    packed = encode(numbers(6), E2M1, packed=True)
    expected = decode(packed, E2M1, shape=(2, 3))
    np.testing.assert_array_equal(decode(packed, E2M1, shape=(np.int64(2), 3)), expected)
    np.testing.assert_array_equal(decode(packed, E2M1, shape=np.int64(6)), expected.ravel())


@pytest.mark.parametrize(("wanted", "expected"), [("3", 3), ("4,2", 4), ("many", None)])
def test_without_torch_the_environment_says_how_many_threads(monkeypatch, wanted, expected):
    monkeypatch.delitem(sys.modules, "torch")
    monkeypatch.setenv("OMP_NUM_THREADS", wanted)
    assert native.threads_for(native.PARALLEL_FROM) == (expected or len(os.sched_getaffinity(0)))
    monkeypatch.delattr(os, "sched_getaffinity")
    assert native.threads_for(native.PARALLEL_FROM) == (expected or os.cpu_count())


@on_backends
def test_misaligned_memory_is_read_and_written():
    raw = np.zeros(4 * 100 + 1, np.uint8)
    x = raw[1:].view(np.float32)
    x[:] = numbers(100)
    assert not x.flags.aligned
    expected = quantize(x.copy(), E2M1)
    np.testing.assert_array_equal(quantize(x, E2M1), expected)
    assert quantize(x, E2M1, out=x) is x
    np.testing.assert_array_equal(x, expected)


@on_backends
def test_read_only_arrays_are_read_and_not_written():
    x = numbers(50)
    x.flags.writeable = False
    assert quantize(x, E2M1).flags.writeable
    with pytest.raises(ValueError, match="out is read-only"):
        quantize(x, E2M1, out=x)


@on_backends
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_the_order_of_dimensions_in_memory_is_kept(layout):
    x = torch.from_numpy(numbers(2 * 5 * 3 * 4)).reshape(2, 5, 3, 4)
    y = quantize(x.contiguous(memory_format=layout), E2M1)
    assert y.is_contiguous(memory_format=layout)
    assert torch.equal(y, quantize(x, E2M1))


@on_backends
def test_lazily_negated_views_are_negated():
    x = torch.view_as_complex(torch.from_numpy(numbers(40)).reshape(20, 2)).conj().imag
    assert x.is_neg()
    assert not is_plain_tensor(x)
    assert torch.equal(quantize(x, E2M1), quantize(x.resolve_neg(), E2M1))


@on_backends
def test_threads_and_streamed_writes_change_nothing(monkeypatch):
    x = numbers(50_000)
    random = {"rounding": "StochasticA", "random": 3}
    scale = np.abs(numbers(500, seed=1)).reshape(500, 1) + 0.5
    rows = x.reshape(500, 100)

    def results():
        return (
            quantize(x, E2M1),
            quantize(x.astype(np.float64), E2M1),
            quantize(x, E2M1, **random),
            encode(x, E2M1, packed=True),
            quantize_scaled(rows, E2M1, scale),
            decode(encode(x, E2M1), E2M1),
        )

    expected = results()
    monkeypatch.setattr(native, "PARALLEL_FROM", 0)
    monkeypatch.setattr(native, "STREAM_FROM", 0)
    monkeypatch.setattr(native, "threads_for", lambda _: 3)
    for one, other in zip(results(), expected, strict=True):
        np.testing.assert_array_equal(one, other)


@on_backends
def test_python_threads_may_call_at_once():
    x, results = numbers(200_000), {}
    expected = quantize(x, E4M3)
    workers = [
        threading.Thread(target=lambda i=i: results.update({i: quantize(x, E4M3)}))
        for i in range(8)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert all((results[i] == expected).all() for i in range(8))


def forked(queue):
    queue.put(quantize(numbers(3_000_000), E2M1).sum())


@on_backends
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_computes_the_same():
    expected = quantize(numbers(3_000_000), E2M1).sum()
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=forked, args=(queue,))
    child.start()
    assert queue.get(timeout=60) == expected
    child.join()


def test_flushing_of_subnormal_numbers_is_no_matter_to_compiled_kernels(backend):
    if backend == "portable":
        pytest.skip("torch flushes in its own operations")
    subnormal = torch.tensor([71362, -2147400000], dtype=torch.int32).view(torch.float32)
    expected = quantize(subnormal, parse("E8M10IEEE")).view(torch.int32)
    torch.set_flush_denormal(True)
    try:
        flushed = quantize(subnormal, parse("E8M10IEEE")).view(torch.int32)
    finally:
        torch.set_flush_denormal(False)
    assert flushed.tolist() == expected.tolist()
    assert all(expected.tolist())


def test_without_compiled_kernels_it_is_said_once_and_all_works():
    code = (
        "import sys, warnings\n"
        "sys.modules['fpformats.kernels._native'] = None\n"
        "import numpy as np, fpformats\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n"
        "    x = np.array([0.3, 1.25])\n"
        "    results = [fpformats.E2M1.quantize(x).tolist() for _ in range(3)]\n"
        "assert results == [[0.5, 1.0]] * 3, results\n"
        "assert len(caught) == 1, caught\n"
        "assert 'without its compiled kernels' in str(caught[0].message)\n"
        "fpformats.show_backends()\n"
    )
    command = [sys.executable, "-c", code]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    assert ran.returncode == 0, ran.stderr
    assert (
        "whole-array operations (the compiled kernels are not built on this machine)" in ran.stdout
    )
