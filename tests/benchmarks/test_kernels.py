"""Speed of rounding, encoding and decoding against a copy of the same tensor.

pytest tests/benchmarks/test_kernels.py --benchmark-enable -s --benchmark-json kernels.json
python docs/render_benchmarks.py kernels.json
"""

import numpy as np
import pytest
import torch
from race import race

from fpformats import (
    Blocks,
    StepEncoder,
    decode,
    decode_blocks,
    encode,
    encode_steps,
    hadamard,
    parse,
    quantize,
    quantize_blocks,
    quantize_scaled,
    search_blocks,
    unpack,
)
from fpformats.engine import backends

E2M1, E2M2U, E4M3, BF16 = (parse(name) for name in ("E2M1", "E2M2U", "E4M3", "BF16"))
SIZES = {10_000: (200, 20), 1_000_000: (40, 1), 64_000_000: (3, 1)}


def operations(x):
    """Everything that one pass over memory does, with results put where they are wanted."""
    y, z = torch.empty_like(x), x.clone()
    scale, zero = torch.tensor(0.37), torch.tensor(-0.11)
    channels = torch.rand(100, 1) + 0.5
    groups = torch.rand(x.numel() // 16, 1) + 0.5
    narrow, steps = x.bfloat16(), torch.empty_like(x, dtype=torch.uint8)
    scaled_steps, shifted_steps = StepEncoder(E2M1, 0.37), StepEncoder(E2M2U, 0.37, -0.11)
    rows, wide = x.view(100, -1), x.view(-1, 16)
    rows_out, wide_out = y.view(100, -1), y.view(-1, 16)
    codes, packed = encode(x, E2M1), encode(x, E2M1, packed=True)
    six = encode(x, parse("E3M2"), packed=True)
    return {
        "copy": lambda: y.copy_(x),
        "quantize": lambda: quantize(x, E2M1, out=y),
        "quantize in place": lambda: quantize(z, E2M1, out=z),
        "quantize to a new result": lambda: quantize(x, E2M1),
        "quantize to E4M3": lambda: quantize(x, E4M3, out=y),
        "quantize to E3M0": lambda: quantize(x, parse("E3M0"), out=y),
        "quantize to bfloat16": lambda: quantize(x, BF16, out=y),
        "scaled": lambda: quantize_scaled(x, E2M1, scale, out=y),
        "scaled with zero point": lambda: quantize_scaled(x, E2M1, scale, zero, out=y),
        "scaled by channel": lambda: quantize_scaled(rows, E2M1, channels, out=rows_out),
        "scaled by groups of 16": lambda: quantize_scaled(wide, E2M1, groups, out=wide_out),
        "encode": lambda: encode(x, E2M1, out=codes),
        "encode, packed": lambda: encode(x, E2M1, packed=True, out=packed),
        "encode to 6 bits, packed": lambda: encode(x, parse("E3M2"), packed=True, out=six),
        "steps": lambda: encode_steps(x, E2M1, out=steps),
        "steps, scaled": lambda: scaled_steps(x),
        "steps, scaled with zero point": lambda: shifted_steps(x),
        "steps of bfloat16, scaled": lambda: scaled_steps(narrow),
        "decode": lambda: decode(codes, E2M1, out=y),
        "decode, packed": lambda: decode(packed, E2M1, shape=x.shape, out=y),
        "toward zero": lambda: quantize(x, E2M1, rounding="TowardZero", out=y),
        "stochastic": lambda: quantize(x, E2M1, rounding="StochasticA", random=1, out=y),
    }


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("backend", backends.available())
def test_one_pass_against_a_copy(benchmark, backend, size):
    if not benchmark.enabled:
        size = 9_600  # of which nothing is timed
    elif backend != backends.available()[0] and size > 1_000_000:
        pytest.skip("large sizes are timed with the fastest instructions only")
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(size, generator=generator)
    with backends.using("portable"):
        expected, codes = quantize(x, E2M1), encode(x, E2M1)
    with backends.using(backend):
        assert torch.equal(quantize(x, E2M1), expected)
        assert torch.equal(unpack(encode(x, E2M1, packed=True), 4, shape=size), codes)
        assert torch.equal(decode(codes, E2M1), expected)
        rounds, repeats = SIZES.get(size, (1, 1))
        benchmark.extra_info.update(table="passes", backend=backend, size=size)
        race(benchmark, operations(x), rounds, repeats=repeats)


def test_a_small_call(benchmark):
    x = torch.randn(10_000, generator=torch.Generator().manual_seed(0))
    array, y = x.numpy(), torch.empty_like(x)
    contenders = {
        "copy": lambda: y.copy_(x),
        "torch": lambda: quantize(x, E2M1),
        "NumPy": lambda: quantize(array, E2M1),
    }
    benchmark.extra_info.update(table="call", backend=backends.available()[0], size=10_000)
    race(benchmark, contenders, rounds=200, repeats=20)


@pytest.mark.parametrize("size", [10_000, 1_000_000])
def test_blocks_of_channels(benchmark, size):
    size = size if benchmark.enabled else 9_600
    x = torch.randn(size // 80, 80, generator=torch.Generator().manual_seed(0))
    y = torch.empty_like(x)
    codes, scales, whole = search_blocks(x, "NVFP4")

    def given():
        return quantize_blocks(x, "NVFP4", scales=scales, tensor_scale=whole, out=y)

    assert torch.equal(given(), decode_blocks(Blocks(codes, scales, whole), "NVFP4"))
    contenders = {
        "copy": lambda: y.copy_(x),
        "MXFP4": lambda: quantize_blocks(x, "MXFP4", out=y),
        "NVFP4": lambda: quantize_blocks(x, "NVFP4", out=y),
        "NVFP4_INT4": lambda: quantize_blocks(x, "NVFP4_INT4", out=y),
        "NVFP4, given scales": given,
        "NVFP4, scales searched": lambda: search_blocks(x, "NVFP4"),
    }
    benchmark.extra_info.update(table="blocks", backend=backends.available()[0], size=size)
    race(benchmark, contenders, rounds=20)


@pytest.mark.parametrize("group", [16, 64, 256])
def test_hadamard_transforms_against_a_product_with_the_matrix(benchmark, group):
    rows = 4096 if benchmark.enabled else 32
    x = torch.randn(rows, 256, generator=torch.Generator().manual_seed(0))
    y, matrix = torch.empty_like(x), hadamard(torch.eye(group), group)
    images = x.view(-1, 256, 4, 4)

    def product():
        return torch.matmul(x.view(-1, group), matrix)

    assert torch.allclose(product().view_as(x), hadamard(x, group), atol=1e-4)
    contenders = {
        "copy": lambda: y.copy_(x),
        "channels last": lambda: hadamard(x, group),
        "channels of images": lambda: hadamard(images, group, axis=1),
        "product with the matrix": product,
    }
    benchmark.extra_info.update(table="hadamard", backend=backends.available()[0], size=group)
    race(benchmark, contenders, rounds=20)


@pytest.mark.parametrize("size", [10_000, 1_000_000])
def test_a_learned_step_forwards_and_backwards(benchmark, size):
    size = size if benchmark.enabled else 9_600
    x = torch.randn(size, generator=torch.Generator().manual_seed(0)).requires_grad_()
    y, given = torch.empty(size), torch.ones(size)
    scale, zero = torch.tensor(0.37), torch.tensor(-0.11)
    learned = [x, scale.requires_grad_(), zero.requires_grad_()]

    def step(backend):
        with backends.using(backend):
            result = quantize_scaled(x, parse("E2M2U"), scale, zero, clip_gradient=True)
            return torch.autograd.grad(result, learned, given)

    fastest = backends.available()[0]
    for ours, theirs in zip(step(fastest), step("portable"), strict=True):
        assert torch.equal(ours, theirs)
    contenders = {"copy": lambda: y.copy_(given)}
    contenders |= {name: lambda name=name: step(name) for name in (fastest, "portable")}
    benchmark.extra_info.update(table="gradients", backend=fastest, size=size)
    race(benchmark, contenders, rounds=40)


def float8_round_trip(x):
    return x.to(torch.float8_e4m3fn).float()


def torchao_round_trip(x):
    kernels = pytest.importorskip("torchao.prototype.mx_formats.kernels")
    return kernels.f4_unpacked_to_f32(kernels.f32_to_f4_unpacked(x))


def qtorch_rounded(x):
    quantization = pytest.importorskip("qtorch.quant")
    return quantization.float_quantize(x, 2, 1, rounding="nearest")


def ml_dtypes_round_trip(x):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    return torch.from_numpy(x.numpy().astype(ml_dtypes.float4_e2m1fn).astype(np.float32))


def gfloat_rounded(x):
    gfloat = pytest.importorskip("gfloat")
    formats = pytest.importorskip("gfloat.formats")
    return torch.from_numpy(
        gfloat.round_ndarray(formats.format_info_ocp_e2m1, x.numpy(), sat=True).astype(np.float32)
    )


def microxcaling_rounded(x):
    elementwise = pytest.importorskip("mx.elemwise_ops")
    return elementwise._quantize_elemwise_core(
        x, bits=3, exp_bits=2, max_norm=6.0, round="even", saturate_normals=True
    )


PEERS = {
    "torch float8": (float8_round_trip, E4M3),
    "torchao": (torchao_round_trip, E2M1),
    "qtorch": (qtorch_rounded, E2M1),
    "ml_dtypes": (ml_dtypes_round_trip, E2M1),
    "gfloat": (gfloat_rounded, E2M1),
    "microxcaling": (microxcaling_rounded, E2M1),
}


@pytest.mark.parametrize("size", [100_000, 1_000_000])
@pytest.mark.parametrize("peer", PEERS)
def test_against_a_peer(benchmark, peer, size):
    if peer == "qtorch" and not benchmark.enabled:
        pytest.skip("slow: qtorch is compiled first")
    theirs, fmt = PEERS[peer]
    size = size if benchmark.enabled else 9_600
    x = torch.randn(size, generator=torch.Generator().manual_seed(0)).clamp(-6, 6)
    y = torch.empty_like(x)
    agreement = (theirs(x) == quantize(x, fmt)).double().mean().item()
    # qtorch rounds ties away, subnormal numbers twice, and has no subnormal at all of this format.
    assert agreement == 1 or (peer == "qtorch" and agreement > 0.5)
    benchmark.extra_info.update(table="peers", backend=backends.available()[0], size=size)
    contenders = {
        "copy": lambda: y.copy_(x),
        "fpformats": lambda: quantize(x, fmt, out=y),
        "fpformats, whole-array": lambda: portable(x, fmt, y),
        peer: lambda: theirs(x),
    }
    race(benchmark, contenders, rounds=10)


def portable(x, fmt, out):
    with backends.using("portable"):
        return quantize(x, fmt, out=out)
