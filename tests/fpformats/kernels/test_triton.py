"""The Triton kernels: compiled where there is a GPU, else in Triton's interpreter."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import oracles
import pytest
import torch
from oracles import (
    MODES,
    SATURATIONS,
    STOCHASTIC,
    aimed_inputs,
    assert_same_bits,
    definition_by_table,
    dtypes_of,
    edge_formats,
    every_format,
    wide_formats,
)

import fpformats
from fpformats import FloatFormat, Specials, parse
from fpformats.kernels import philox
from fpformats.kernels.grid import FLOAT_DTYPES
from fpformats.kernels.layout import Layout
from fpformats.kernels.plan import make_plan
from fpformats.rounding import FINITE, NEAREST

cuda = pytest.importorskip(
    "fpformats.kernels.cuda", reason="Triton 3.6 is not installed", exc_type=ImportError
)

import triton  # noqa: E402
import triton.language as tl  # noqa: E402

from fpformats.kernels import triton_kernels  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
POLICIES = [(mode, saturation) for mode in MODES for saturation in SATURATIONS]
# Of each kind: specials, no sign, no mantissa, no exponent, no subnormals, no zero, no infinity.
KINDS = [
    "E2M1",
    "E2M1U",
    "E3M0",
    "E0M3",
    "E2M2NS",
    "E4M3",
    "E5M2",
    "E8M0",
    "E4M3FNUZ",
    "Binary6p3se",
    "Binary6p1ue",
]


@pytest.fixture(autouse=True)
def _one_program_in_the_interpreter(monkeypatch):
    if DEVICE == "cpu":
        monkeypatch.setattr(cuda, "BLOCK", 1 << 13)
    with np.errstate(all="ignore"):
        yield


def plan_of(fmt, dtype="float32", rounding=NEAREST, saturation=FINITE):
    return make_plan(fmt, FLOAT_DTYPES[dtype], rounding, saturation)


def on_device(array):
    return torch.as_tensor(array).to(DEVICE)


def quantized(x, plan, **options):
    given = on_device(x)
    return cuda.quantize(given, plan, torch.empty_like(given), **options).cpu()


def assert_same(actual, expected):
    """Assert that two tensors agree bit for bit, but for the payload of NaN."""
    assert actual.dtype == expected.dtype
    if actual.dtype in (torch.float16, torch.bfloat16):
        actual, expected = actual.float(), expected.float()  # NumPy has no bfloat16
    assert_same_bits(actual.cpu().numpy(), expected.numpy())


def check_policy(fmt, dtype, rounding, saturation):
    x = aimed_inputs(fmt, dtype)
    plan = plan_of(fmt, dtype, rounding, saturation)
    expected = definition_by_table(x, fmt, rounding, saturation).astype(dtype)
    assert_same_bits(quantized(x, plan).numpy(), expected)
    nan = fmt.nan_code if fmt.has_nan else 0
    policy = {"rounding": rounding, "saturation": saturation}
    codes, _ = cuda.encode(on_device(x), plan, nan)
    assert_same_bits(codes.cpu().numpy(), fpformats.encode(x, fmt, **policy, nan=nan))


def check_default(fmt, dtype):
    check_policy(fmt, dtype, NEAREST, FINITE)
    codes = np.arange(fmt.code_count).astype(fpformats.encode(np.zeros(1), fmt, nan=0).dtype)
    out = torch.empty(fmt.code_count, dtype=getattr(torch, dtype), device=DEVICE)
    values = cuda.decode(on_device(codes), plan_of(fmt, dtype), out)
    assert_same_bits(values.cpu().numpy(), fpformats.decode(codes, fmt, dtype=dtype))
    check_steps(fmt, torch.from_numpy(aimed_inputs(fmt, dtype)))


def check_steps(fmt, x, scaling=None, scales=1.0, shifts=None):
    """Values as numbers of steps are those of the portable way, where they fit a byte."""
    if fmt.max_steps > (127 if fmt.signed else 255):
        return
    x, plan = x.masked_fill(x.isnan(), 0), plan_of(fmt, str(x.dtype).removeprefix("torch."))
    offset = 128 if fmt.signed else 0
    steps, nan_seen = cuda.count_steps(on_device(x), plan, offset, torch.uint8, scaling=scaling)
    assert int(nan_seen) == 0
    assert torch.equal(steps.cpu(), fpformats.encode_steps(x, fmt, scales, shifts))


@pytest.mark.parametrize("bits", [1, 2, *(pytest.param(n, marks=pytest.mark.slow) for n in (3, 4))])
def test_small_formats_round_encode_and_decode_as_defined(bits):
    for index, fmt in enumerate(every_format(bits)):
        if fmt.magnitude_bits == bits:
            names = dtypes_of(fmt)
            check_default(fmt, names[index % len(names)])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("bits", range(1, 9))
def test_every_format_rounds_encodes_and_decodes_as_defined(bits, dtype):
    for fmt in every_format(8):
        if fmt.magnitude_bits == bits and dtype in dtypes_of(fmt):
            check_default(fmt, dtype)


@pytest.mark.parametrize("name", KINDS)
def test_formats_of_every_kind_follow_every_policy(name):
    for index, (rounding, saturation) in enumerate(POLICIES):
        dtype = ("float32", "float64")[index % 2]
        check_policy(parse(name), dtype, rounding, saturation)


@pytest.mark.slow
@pytest.mark.parametrize(("rounding", "saturation"), POLICIES)
def test_every_format_follows_every_policy(rounding, saturation):
    for fmt in every_format(8):
        check_policy(fmt, dtypes_of(fmt)[0], rounding, saturation)


@pytest.mark.parametrize("fmt", edge_formats(), ids=str)
def test_formats_at_the_ends_of_float32_round_as_defined(fmt):
    check_default(fmt, "float32")


FAR_FORMATS = [
    FloatFormat(3, 5, bias=-890),
    FloatFormat(2, 3, bias=896),
    FloatFormat(2, 3, bias=895, subnormals=False),
    FloatFormat(3, 2, bias=896, specials=Specials.FNUZ),
]


@pytest.mark.parametrize("fmt", FAR_FORMATS, ids=str)
def test_formats_at_the_ends_of_what_a_plan_takes_follow_every_policy(fmt):
    assert plan_of(fmt, "float64") is not None
    for rounding, saturation in POLICIES:
        check_policy(fmt, "float64", rounding, saturation)


LONG_FORMATS = [fmt for fmt in wide_formats() if plan_of(fmt, "float64") is not None]


@pytest.mark.parametrize("fmt", LONG_FORMATS, ids=str)
def test_formats_of_many_codes_agree_with_the_portable_way(fmt):
    generator = np.random.default_rng(0)
    codes = generator.integers(0, fmt.code_count, 3000)
    near = fpformats.decode(codes, fmt, dtype="float64")
    x = near * (1 + generator.integers(-2, 3, near.size) * 2.0 ** -(fmt.mantissa_bits + 2))
    nan = fmt.code_count - 1
    for rounding, saturation in ((NEAREST, FINITE), ("ToOdd", "SatNone")):
        plan = plan_of(fmt, "float64", rounding, saturation)
        policy = {"rounding": rounding, "saturation": saturation}
        assert_same_bits(quantized(x, plan).numpy(), fpformats.quantize(x, fmt, **policy))
        ours, _ = cuda.encode(on_device(x), plan, nan)
        assert_same_bits(ours.cpu().numpy(), fpformats.encode(x, fmt, **policy, nan=nan))
    out = torch.empty(codes.shape, dtype=torch.float64, device=DEVICE)
    assert_same_bits(cuda.decode(on_device(codes), plan, out).cpu().numpy(), near)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", ["E2M1", "E3M0U", "E4M3", "E5M2", "E2M2NS"])
def test_every_half_precision_number_rounds_and_encodes_alike(name, dtype):
    fmt = parse(name)
    x = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(getattr(torch, dtype))
    for policy in ({}, {"rounding": "TowardNegative", "saturation": "SatNone"}):
        plan = plan_of(fmt, dtype, **policy)
        assert_same(quantized(x, plan), fpformats.quantize(x, fmt, **policy))
        codes, _ = cuda.encode(on_device(x), plan, 0)
        assert_same(codes, fpformats.encode(x, fmt, **policy, nan=0))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("name", ["E2M1U", "E4M3", "E5M2", "Binary8p3se", "E3M2"])
def test_every_code_decodes_alike_in_every_dtype(name, dtype):
    fmt = parse(name)
    codes = torch.arange(fmt.code_count).to(torch.uint8)
    out = torch.empty(fmt.code_count, dtype=getattr(torch, dtype), device=DEVICE)
    values = cuda.decode(on_device(codes), plan_of(fmt, dtype), out)
    assert_same(values, fpformats.decode(codes, fmt, dtype=dtype))


@pytest.mark.parametrize("mode", STOCHASTIC)
@pytest.mark.parametrize("name", ["E2M1", "E3M0", "E2M2NS", "E8M0", "Binary6p1ue"])
def test_given_words_and_seeds_draw_alike(name, mode):
    fmt, generator = parse(name), np.random.default_rng(0)
    for bits, dtype in ((1, "float32"), (13, "float64"), (32, "float32")):
        x = generator.choice(aimed_inputs(fmt, dtype), 500)
        x = np.where(generator.random(500) < 0.3, x, x * generator.random(500)).astype(dtype)
        words = generator.integers(0, 2**bits, 500)
        plan = plan_of(fmt, dtype, mode, "SatNone")
        for random in (words, 0, 2**32 + 7, 2**64 - 1):
            policy = {"rounding": mode, "saturation": "SatNone", "random_bits": bits}
            given_words = random if isinstance(random, int) else on_device(random)
            drawn = quantized(x, plan, random=given_words, random_bits=bits)
            assert_same_bits(drawn.numpy(), fpformats.quantize(x, fmt, **policy, random=random))
    codes, _ = cuda.encode(on_device(x), plan, 0, random=9, random_bits=bits)
    expected = fpformats.encode(x, fmt, **policy, random=9, nan=0)
    assert_same_bits(codes.cpu().numpy(), expected)


@triton.jit
def _words_kernel(places, out, seed_low, seed_high, random_bits, block: tl.constexpr):
    lanes = tl.arange(0, block)
    offsets = tl.load(places + lanes)
    word = triton_kernels._random_word(offsets, True, None, seed_low, seed_high, random_bits)
    tl.store(out + lanes, word)


def test_elements_beyond_2_to_the_32_have_words_of_their_own():
    places = np.array([0, 1, 2**31, 2**32 - 1, 2**32, 2**33 + 5, 2**40, 3 * 2**50])
    seed = 0x0123456789ABCDEF
    counter = (places & philox.LOW, places >> 32, places * 0, places * 0)
    expected, *_ = philox.philox(counter, (seed & philox.LOW, seed >> 32))
    out = torch.empty(8, dtype=torch.int64, device=DEVICE)
    random = cuda._random_arguments(seed, 32)
    del random["words"]
    _words_kernel[(1,)](on_device(places), out, **random, block=8)
    np.testing.assert_array_equal(out.cpu().numpy(), expected)


LAYOUTS = {
    "one for the tensor": (300, 300, 1),
    "one for each of 6 channels": (300, 50, 6),
    "one for each of 5 channels of 4 images": (75, 15, 0),
    "one for each of 5 columns": (5, 1, 0),
    "groups of 15": (60, 15, 4),
    "groups of 16, the last one cut short": (60, 16, 4),
}


def spread(values, layout, count):
    row_length, run_length, row_stride = layout
    place = np.arange(count)
    return values[place // row_length * row_stride + place % row_length // run_length]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_scales_of_every_layout_are_those_of_the_portable_way(layout, dtype):
    generator = np.random.default_rng(1)
    fmt, working = parse("E2M1"), "float64" if dtype == "float64" else "float32"
    scales = generator.uniform(0.01, 3, 20).astype(working)
    shifts = generator.normal(0, 1, 20).astype(working)
    near = generator.choice(aimed_inputs(fmt, working), 300)
    for zero_points in (None, shifts):
        full_scales = torch.from_numpy(spread(scales, layout, 300))
        full_shifts = None
        x = near * spread(scales, layout, 300)
        if zero_points is not None:
            full_shifts = torch.from_numpy(spread(shifts, layout, 300))
            x = x + spread(shifts, layout, 300)
        x = torch.from_numpy(x).to(getattr(torch, dtype))
        given_shifts = None if zero_points is None else on_device(zero_points)
        scaling = cuda.Scaling(on_device(scales), given_shifts, Layout(*layout))
        check_scaled(fmt, x, scaling, full_scales, full_shifts)


def check_scaled(fmt, x, scaling, scales, shifts):
    plan, name = plan_of(fmt, str(x.dtype).removeprefix("torch.")), x.dtype
    expected = fpformats.quantize_scaled(x, fmt, scales, shifts)
    assert_same(quantized(x, plan, scaling=scaling), expected)
    codes, _ = cuda.encode(on_device(x), plan, 0, scaling=scaling)
    assert_same(codes, fpformats.encode_scaled(x, fmt, scales, shifts, nan=0))
    values = cuda.decode(
        codes, plan, torch.empty(x.shape, dtype=name, device=DEVICE), scaling=scaling
    )
    assert_same(values, fpformats.decode_scaled(codes.cpu(), fmt, scales, shifts, dtype=name))
    check_steps(fmt, x, scaling, scales, shifts)


def test_float32_division_products_and_sums_are_rounded_one_by_one():
    generator = np.random.default_rng(2)
    fmt = parse("E5M2")
    x = torch.from_numpy(generator.integers(-(2**31), 2**31, 6000).astype(np.int32))
    x = x.view(torch.float32)  # of any exponent, subnormal numbers too
    scales = torch.from_numpy(np.exp2(generator.uniform(-140, 120, 6000)).astype(np.float32))
    shifts = x.roll(1).nan_to_num(0, 0, 0)
    scaling = cuda.Scaling(scales.to(DEVICE), shifts.to(DEVICE), Layout(6000, 1, 6000))
    check_scaled(fmt, x, scaling, scales, shifts)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_scaled_results_halfway_between_narrow_numbers_go_to_the_even_one(dtype):
    odd = torch.arange(1, 64, 2)
    scales = 1 + odd * torch.finfo(dtype).eps / 2
    x = torch.ones(odd.shape, dtype=dtype)
    scaling = cuda.Scaling(scales.to(DEVICE), None, Layout(odd.numel(), 1, odd.numel()))
    check_scaled(parse("E2M1"), x, scaling, scales, None)


@pytest.mark.parametrize("name", ["E8M0", "E2M2NS", "E3M0"])
def test_scaled_formats_of_other_kinds_agree_with_the_portable_way(name):
    x = torch.from_numpy(np.random.default_rng(3).normal(0, 4, 1000).astype(np.float32))
    scale = torch.tensor(0.3)
    scaling = cuda.Scaling(scale.to(DEVICE), None, Layout(1000, 1000, 1))
    check_scaled(parse(name), x, scaling, scale, None)


@triton.jit
def _scales_kernel(
    places,
    out,
    scales,
    zero_points,
    row_length,
    run_length,
    row_stride,
    index: tl.constexpr,
    block: tl.constexpr,
):
    lanes = tl.arange(0, block)
    offsets = tl.load(places + lanes)
    inside = offsets >= 0
    scale, _ = triton_kernels._scale_at(
        offsets, inside, scales, zero_points, row_length, run_length, row_stride, index
    )
    tl.store(out + lanes, scale)


@pytest.mark.parametrize(
    "layout", [(3 << 40, 1 << 40, 0), (1 << 43, 1 << 40, 8), (3 << 39, 1 << 40, 2)]
)
def test_elements_beyond_2_to_the_32_find_their_scales(layout):
    places = np.array([0, 1, 2**32 - 1, 2**33, 2**40 - 1, 2**40, 3 * 2**41 - 1, 2**43 - 1])
    arguments = cuda._scaling_arguments(cuda.Scaling(None, None, Layout(*layout)), 1 << 43)
    scales = np.arange(32, dtype=np.float32)
    arguments |= {"scales": on_device(scales)}
    out = torch.empty(8, dtype=torch.float32, device=DEVICE)
    _scales_kernel[(1,)](on_device(places), out, **arguments, block=8)
    row, column = places // layout[0], places % layout[0]
    np.testing.assert_array_equal(out.cpu().numpy(), scales[row * layout[2] + column // layout[1]])


@pytest.mark.parametrize("bits", cuda.PACKED_BITS)
@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 511, 512, 1023, 1027, 2050])
def test_packed_codes_are_those_of_pack(bits, count, monkeypatch):
    monkeypatch.setattr(cuda, "BLOCK", 1024)
    fmt = parse("E2M1" if bits == 4 else "E3M2")
    x = np.random.default_rng(count).normal(0, 3, count).astype(np.float32)
    x[-1] = np.nan
    packed, _ = cuda.encode(on_device(x), plan_of(fmt), 5, packed_bits=bits)
    expected = fpformats.pack(fpformats.encode(x, fmt, nan=5), bits)
    assert_same_bits(packed.cpu().numpy(), expected)
    for dtype in (torch.float32, torch.bfloat16):
        out = torch.empty(count, dtype=dtype, device=DEVICE)
        values = cuda.decode(packed, plan_of(fmt), out, packed_bits=bits).cpu()
        codes = torch.from_numpy(fpformats.unpack(expected, bits, shape=count))
        assert_same(values, fpformats.decode(codes, fmt, dtype=dtype))


def test_scaled_codes_are_packed_and_decoded_in_one_launch():
    fmt, scaling = parse("E2M1"), (64, 16, 4)
    x = torch.from_numpy(np.random.default_rng(4).normal(0, 1, 256).astype(np.float32))
    scales = np.random.default_rng(5).uniform(0.1, 1, 16).astype(np.float32)
    full = torch.from_numpy(spread(scales, scaling, 256))
    given = cuda.Scaling(on_device(scales), None, Layout(*scaling))
    packed, _ = cuda.encode(on_device(x), plan_of(fmt), 0, packed_bits=4, scaling=given)
    codes = fpformats.encode_scaled(x, fmt, full)
    assert_same(packed, fpformats.pack(codes, 4))
    out = torch.empty(256, device=DEVICE)
    values = cuda.decode(packed, plan_of(fmt), out, packed_bits=4, scaling=given)
    assert_same(values, fpformats.decode_scaled(codes, fmt, full))


@pytest.mark.parametrize(
    ("x", "saturation", "seen"),
    [
        ([1.0, -2.0, 9.0], "SatFinite", 0),
        ([1.0, np.nan, 9.0], "SatFinite", 2),
        ([1.0, -2.0, 9.0], "OverflowNaN", 1),
        ([np.nan, -2.0, 9.0], "OverflowNaN", 2),
        ([1.0, np.inf], "OverflowNaN", 1),
    ],
)
def test_nan_without_a_code_is_reported_with_where_it_came_from(x, saturation, seen):
    plan = plan_of(parse("E2M1"), saturation=saturation)
    x = np.array(x, np.float32)
    for options in ({}, {"packed_bits": 4}):
        _, nan_seen = cuda.encode(on_device(x), plan, None, **options)
        assert int(nan_seen) == seen


def test_nan_is_reported_where_steps_are_counted():
    x = np.array([1.0, np.nan, 9.0], np.float32)
    for numbers, seen in ((x, 1), (x[::2].copy(), 0)):
        _, nan_seen = cuda.count_steps(on_device(numbers), plan_of(parse("E2M1")), 0, torch.int8)
        assert int(nan_seen) == seen


def test_what_follows_the_last_element_is_not_reported_as_nan():
    plan = plan_of(parse("E3M0UNZ"), saturation="SatNone")  # 0 is out of its range
    _, nan_seen = cuda.encode(on_device(np.ones(3, np.float32)), plan, None)
    assert int(nan_seen) == 0


@pytest.mark.parametrize("policy", [(NEAREST, FINITE), ("ToOdd", "SatNone")])
def test_tensors_of_many_programs_are_rounded_whole_and_in_place(policy, monkeypatch):
    monkeypatch.setattr(cuda, "BLOCK", 1024)
    fmt = parse("E4M3")
    x = np.random.default_rng(6).normal(0, 100, 4 * 1024 + 17).astype(np.float32)
    given = on_device(x.copy())
    result = cuda.quantize(given, plan_of(fmt, "float32", *policy), given)
    assert result is given
    expected = fpformats.quantize(x, fmt, rounding=policy[0], saturation=policy[1])
    assert_same_bits(given.cpu().numpy(), expected)


def test_tensors_without_elements_are_left_alone():
    plan, x = plan_of(parse("E2M1")), torch.empty((0, 3), device=DEVICE)
    assert cuda.quantize(x, plan, torch.empty_like(x)).shape == (0, 3)
    codes, nan_seen = cuda.encode(x, plan, None)
    assert codes.shape == (0, 3)
    assert int(nan_seen) == 0
    packed, _ = cuda.encode(x, plan, 0, packed_bits=6)
    assert packed.shape == (0,)
    assert cuda.decode(packed, plan, torch.empty_like(x), packed_bits=6).shape == (0, 3)


@pytest.fixture(scope="module")
def gpu_code(tmp_path_factory):
    """The PTX of kernels by what they compute, and of lists of launches that share one."""
    if "nvidia" not in triton.backends.backends:
        pytest.skip("this Triton does not compile for NVIDIA GPUs")
    cache = str(tmp_path_factory.mktemp("triton"))
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": cache}
    run = subprocess.run(  # noqa: S603
        [sys.executable, str(Path(oracles.__file__).with_name("ptx.py"))],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def operations(code):
    """Give the instructions of PTX on floating-point numbers."""
    return set(re.findall(r"\b([a-z]+(?:\.[a-z0-9]+)*\.b?f(?:16|32|64)(?:x2)?)\b", code))


def test_code_for_the_gpu_rounds_every_operation_once(gpu_code):
    for name, code in gpu_code["code"].items():
        found = operations(code)
        assert {"add.rn.f32", "add.rn.f64", "mul.rn.f32", "mul.rn.f64"} & found, name
        inexact = r"(add|sub|mul|div)\.(?!rn\.)|fma|mad|rcp|.*\.(ftz|approx|full)\b"
        assert not [operation for operation in found if re.match(inexact, operation)], name


def test_code_for_the_gpu_divides_exactly_where_there_are_scales(gpu_code):
    for name, code in gpu_code["code"].items():
        divisions = {operation for operation in operations(code) if operation.startswith("div")}
        expected = set()
        if "scaled" in name and "values" not in name:
            expected = {"div.rn.f64" if name.startswith("float64") else "div.rn.f32"}
        assert divisions == expected, name


def test_code_for_the_gpu_stays_in_float32_where_that_is_enough(gpu_code):
    for name, code in gpu_code["code"].items():
        if name.startswith("narrow"):
            assert ".f64" not in code, name


def test_formats_and_seeds_share_the_compiled_kernels(gpu_code):
    for name, launches in gpu_code["shared"].items():
        assert len(launches) > 1, name
        assert len(set(launches)) == 1, name
