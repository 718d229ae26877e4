import math

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import grad, vmap

from fpformats import (
    E2M1,
    E2M1U,
    MXFP4,
    decode,
    decode_scaled,
    encode,
    format_parameters,
    parse,
    quantize,
    quantize_blocks,
    quantize_parametric,
    quantize_scaled,
)
from fpformats.engine import backends

X = torch.tensor([-9.0, -1.3, -0.2, 0.0, 0.3, 1.27, 2.6, 5.9, 6.0, 6.1, 20.0])


def gradients(function, *inputs):
    inputs = [x.clone().requires_grad_() for x in inputs]
    result = function(*inputs)
    weights = torch.linspace(1, 2, result.numel(), dtype=result.dtype).reshape(result.shape)
    (result * weights).sum().backward()
    return weights, [x.grad for x in inputs]


@pytest.mark.parametrize("name", ["E2M1", "E2M1U"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_gradient_passes_straight_through_or_only_in_range(name, dtype):
    fmt, x = parse(name), X.to(dtype)
    weights, (grad,) = gradients(lambda x: quantize(x, fmt), x)
    assert torch.equal(grad, weights)
    weights, (grad,) = gradients(lambda x: quantize(x, fmt, clip_gradient=True), x)
    assert torch.equal(grad, weights * ((x >= fmt.min) & (x <= fmt.max)))


def test_values_do_not_depend_on_gradients():
    fmt, x = parse("E2M1"), X.clone().requires_grad_()
    assert torch.equal(quantize(x, fmt).detach(), quantize(X, fmt))
    scaled = quantize_scaled(x, fmt, 0.3, 0.1)
    assert torch.equal(scaled.detach(), quantize_scaled(X, fmt, 0.3, 0.1))
    with torch.no_grad():
        assert not quantize(x, fmt).requires_grad
        assert not quantize_scaled(x, fmt, 0.3).requires_grad


@pytest.mark.parametrize("name", ["E2M1", "E2M1U"])
@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("shape", [(), (1,), (11,), (3, 1), (3, 11)])
def test_scaled_gradients_are_those_of_learned_step_sizes(name, clip, shape):
    fmt, generator = parse(name), torch.Generator().manual_seed(0)
    x = torch.stack([X, X * 0.7, -X])
    scale = torch.rand(shape, generator=generator) + 0.5
    zero_point = -torch.rand(shape, generator=generator)
    weights, grads = gradients(
        lambda x, s, z: quantize_scaled(x, fmt, s, z, clip_gradient=clip), x, scale, zero_point
    )
    v = (x - zero_point) / scale
    q = quantize(v, fmt)
    inside = (v >= fmt.min) & (v <= fmt.max)
    assert inside.any()
    assert not inside.all()
    assert torch.equal(grads[0], weights * inside if clip else weights)
    slope = torch.where(inside, q - v, q)
    torch.testing.assert_close(grads[1], (weights * slope).sum_to_size(shape))
    torch.testing.assert_close(grads[2], (weights * ~inside).sum_to_size(shape))


@pytest.mark.parametrize("name", ["E2M1", "E2M1U", "E3M0", "E5M10"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("rounding", ["NearestTiesToEven", "TowardZero", "StochasticA"])
@pytest.mark.parametrize("learned", [(0,), (1,), (2,), (0, 1, 2)])
def test_every_kernel_gives_the_bits_of_whole_tensor_operations(
    name, dtype, clip, rounding, learned
):
    fmt, draw = parse(name), torch.Generator().manual_seed(0)
    x = torch.randn(9, 4, 5, 5, generator=draw, dtype=dtype).mul(8)
    x.view(-1)[:4] = torch.tensor([math.nan, math.inf, -math.inf, -0.0])
    given = torch.randn(x.shape, generator=draw, dtype=dtype)
    scale = torch.rand(4, 1, 1, generator=draw, dtype=dtype) + 0.5
    options = {"clip_gradient": clip, "rounding": rounding}
    if rounding == "StochasticA":
        options["random"] = 7

    def outcome(backend, x):
        inputs = [t.clone() for t in (x, scale, -scale)]
        for index in learned:
            inputs[index].requires_grad_()
        with backends.using(backend):
            y = quantize_scaled(inputs[0], fmt, *inputs[1:], **options)
            y.backward(given)
        return [y.detach(), *(inputs[index].grad for index in learned)]

    for values in (x, x.to(memory_format=torch.channels_last), x.flip(0).transpose(2, 3)):
        expected = outcome("portable", values)
        for backend in backends.available():
            for ours, theirs in zip(outcome(backend, values), expected, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


def test_a_gradient_of_the_gradient_passes_through():
    fmt, scale = parse("E2M1"), torch.tensor(0.7, requires_grad=True)
    x = X.clone().requires_grad_()
    y = quantize_scaled(x, fmt, scale, clip_gradient=True)
    weights = torch.ones_like(X).requires_grad_()
    first, slope = torch.autograd.grad(y, (x, scale), weights, create_graph=True)
    (second,) = torch.autograd.grad(first.sum() + slope, weights)
    v = X / 0.7
    inside = v.abs() <= 6
    expected = inside + torch.where(inside, quantize(v, fmt) - v, quantize(v, fmt))
    torch.testing.assert_close(second, expected)


def test_parameters_learn_without_a_gradient_for_the_input():
    fmt, scale = parse("E2M1"), torch.tensor(0.7, requires_grad=True)
    quantize_scaled(X, fmt, scale).sum().backward()
    v = X / 0.7
    q, inside = quantize(v, fmt), v.abs() <= 6
    torch.testing.assert_close(scale.grad, torch.where(inside, q - v, q).sum())
    zero_point = torch.tensor(0.2, requires_grad=True)
    quantize_scaled(X, fmt, 0.7, zero_point).sum().backward()
    assert zero_point.grad == (((X - 0.2) / 0.7).abs() > 6).sum()


def test_bfloat16_gradients_keep_each_inputs_dtype():
    fmt = parse("E2M1U")
    x, scale = X.bfloat16(), torch.tensor(0.7)
    _, grads = gradients(lambda x, s: quantize_scaled(x, fmt, s), x, scale)
    assert [grad.dtype for grad in grads] == [torch.bfloat16, torch.float32]


def test_an_output_would_cut_the_gradient_off():
    x = X.clone().requires_grad_()
    with pytest.raises(ValueError, match="out is given, but an input requires a gradient"):
        quantize_scaled(x, parse("E2M1"), 0.5, out=torch.empty_like(X))
    scale = torch.tensor(0.5, requires_grad=True)
    with pytest.raises(ValueError, match="out is given, but an input requires a gradient"):
        quantize_scaled(X, parse("E2M1"), scale, out=torch.empty_like(X))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_gradients_are_the_same(dtype):
    fmt = parse("E2M1U")
    inputs = [X.to(dtype), torch.tensor(0.7), torch.tensor(-0.2)]

    def function(x, s, z):
        return quantize_scaled(quantize(x, fmt, clip_gradient=True), fmt, s, z, clip_gradient=True)

    _, eager = gradients(function, *inputs)
    _, compiled = gradients(torch.compile(function, fullgraph=True), *inputs)
    for ours, theirs in zip(compiled, eager, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_vmap_gives_the_same_values_and_codes():
    fmt, x = parse("E2M1"), torch.stack([X, -0.7 * X, 3 * X])
    assert torch.equal(vmap(lambda x: quantize(x, fmt))(x), quantize(x, fmt))
    away = vmap(lambda x: quantize(x, fmt, rounding="NearestTiesToAway"), in_dims=1, out_dims=1)
    assert torch.equal(away(x), quantize(x, fmt, rounding="NearestTiesToAway"))
    codes = vmap(lambda x: encode(x, fmt, nan=0))(x)
    assert torch.equal(codes, encode(x, fmt))
    assert torch.equal(vmap(lambda c: decode(c, fmt))(codes), quantize(x, fmt))
    assert torch.equal(vmap(lambda x: quantize_blocks(x, MXFP4))(x), quantize_blocks(x, MXFP4))
    words = torch.arange(x.numel()).reshape(x.shape)
    draw = {"rounding": "StochasticA", "random_bits": 6}
    drawn = vmap(lambda x, w: quantize(x, fmt, random=w, **draw))(x, words)
    assert torch.equal(drawn, quantize(x, fmt, random=words, **draw))
    with pytest.raises(ValueError, match=r"torch\.compile and vmap need nan= as a code"):
        vmap(lambda x: encode(x, fmt))(x)


@pytest.mark.parametrize("name", ["E2M1", "E2M1U"])
@pytest.mark.parametrize("clip", [False, True])
def test_vmap_gives_the_same_gradients(name, clip):
    fmt, generator = parse(name), torch.Generator().manual_seed(0)
    inputs = [torch.stack([X, X * 0.7, -X]), *torch.rand((2, 3), generator=generator) + 0.5]
    weights = torch.linspace(1, 2, X.numel())

    def loss(x, s, z):
        return (quantize_scaled(x, fmt, s, z, clip_gradient=clip) * weights).sum()

    leaves = [t.clone().requires_grad_() for t in inputs]
    for x, s, z in zip(*leaves, strict=True):
        loss(x, s, z).backward()
    expected = [t.grad for t in leaves]
    for ours, theirs in zip(vmap(grad(loss, (0, 1, 2)))(*inputs), expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    leaves = [t.clone().requires_grad_() for t in inputs]
    vmap(loss)(*leaves).sum().backward()
    for ours, theirs in zip(leaves, expected, strict=True):
        torch.testing.assert_close(ours.grad, theirs)


def test_a_parameter_that_is_not_mapped_may_be_rounded_inside():
    fmt, draw = parse("E2M1"), torch.Generator().manual_seed(0)
    weight = torch.randn(4, 4, generator=draw).requires_grad_()
    rows = torch.randn(3, 4, generator=draw)
    mapped = vmap(lambda row: quantize_scaled(weight, fmt, 0.5) @ row)(rows)
    torch.testing.assert_close(mapped, rows @ quantize_scaled(weight, fmt, 0.5).T)


def test_what_changes_before_the_backward_pass_is_kept_or_refused():
    fmt, x = parse("E2M1"), X.clone().requires_grad_()
    scale = torch.tensor(0.7, requires_grad=True)
    (expected,) = torch.autograd.grad(quantize_scaled(x, fmt, scale).sum(), scale)
    y = quantize_scaled(x, fmt, scale)
    with torch.no_grad():
        scale.mul_(3)
    assert torch.equal(torch.autograd.grad(y.sum(), scale)[0], expected)
    words = torch.arange(X.numel())
    y = quantize_scaled(x, fmt, scale, rounding="StochasticA", random=words)
    words.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_a_scale_alone_may_be_mapped():
    fmt, scales = parse("E2M1"), torch.rand(4) + 0.5
    mapped = vmap(lambda s: quantize_scaled(X, fmt, s, 0.1))(scales)
    assert torch.equal(mapped, torch.stack([quantize_scaled(X, fmt, s, 0.1) for s in scales]))


def test_scales_of_blocks_learn():
    fmt, x = parse("E2M1"), torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    scale = (torch.rand(3, 2) + 0.3).requires_grad_()
    zero_point = torch.zeros(3, 2, requires_grad=True)
    options = {"block_size": (2, 4)}
    (quantize_scaled(x, fmt, scale, zero_point, **options) * x).sum().backward()
    full = scale.detach().repeat_interleave(2, 0)[:5].repeat_interleave(4, 1)[:, :7]
    v = x / full
    slope = torch.where(v.abs() <= 6, quantize(v, fmt) - v, quantize(v, fmt)) * x
    padded = torch.nn.functional.pad(slope, (0, 1, 0, 1)).reshape(3, 2, 2, 4)
    torch.testing.assert_close(scale.grad, padded.sum((1, 3)))
    assert zero_point.grad.shape == (3, 2)


@pytest.mark.parametrize("name", ["E2M1", "E3M0", "E4M3"])
def test_the_gradient_of_the_scale_is_the_slope_between_roundings(name):
    # With the codes held fixed, s * q - the part of x that straight-through keeps is linear in s.
    fmt, x = parse(name), X[(X.abs() < 5)].double()
    scale, step = torch.tensor(0.9, dtype=torch.float64), 1e-6
    q = quantize(x / scale, fmt)

    def surrogate(s):
        return (s * (x / s + (q - x / scale))).sum()

    slope = (surrogate(scale + step) - surrogate(scale - step)) / (2 * step)
    leaf = scale.clone().requires_grad_()
    quantize_scaled(x, fmt, leaf).sum().backward()
    torch.testing.assert_close(leaf.grad, slope, rtol=1e-6, atol=1e-6)


def test_what_is_saved_in_a_narrow_dtype_gives_the_gradients_of_what_is_left():
    x = torch.linspace(-4, 4, 33).requires_grad_()
    scale = torch.tensor(0.75, requires_grad=True)
    narrow = torch.autograd.graph.saved_tensors_hooks(lambda t: t.bfloat16(), lambda t: t)
    with narrow:
        y = quantize_scaled(x, E2M1, scale, clip_gradient=True)
    y.sum().backward()
    assert torch.equal(x.grad, torch.ones(33))
    assert scale.grad.isfinite()


ROUNDINGS = {
    "plain": lambda x, *_: quantize(x, E2M1),
    "clipped": lambda x, *_: quantize(x, E2M1, clip_gradient=True),
    "scaled": lambda x, scale, zero: quantize_scaled(x, E2M1U, scale, zero),
    "blocks": lambda x, *_: quantize_blocks(x, MXFP4),
    "parametric": lambda x, *_: quantize_parametric(x, format_parameters(E2M1)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ROUNDINGS)
def test_forward_mode_gives_the_derivatives_of_reverse_mode(name, dtype):
    x = torch.tensor([0.3, 1.2, -2.0, 9.0]).to(dtype)
    inputs = (x, torch.tensor([0.7]), torch.tensor([0.1]))
    forward = torch.func.jacfwd(ROUNDINGS[name], argnums=(0, 1, 2))(*inputs)
    reverse = torch.func.jacrev(ROUNDINGS[name], argnums=(0, 1, 2))(*inputs)
    for one, other in zip(forward, reverse, strict=True):
        assert torch.equal(one, other.to(one.dtype))
    with torch.no_grad(), forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.ones_like(x))
        value, tangent = forward_ad.unpack_dual(ROUNDINGS[name](dual, *inputs[1:]))
        assert torch.equal(tangent, forward[0].sum(1))
    assert torch.equal(value, ROUNDINGS[name](*inputs))


@pytest.mark.parametrize("name", ROUNDINGS)
def test_a_result_may_be_changed_in_place(name):
    x = torch.tensor([0.3, 1.2, -2.0, 9.0], dtype=torch.bfloat16, requires_grad=True)
    y = ROUNDINGS[name](x, torch.tensor(0.7), torch.tensor(0.1))
    y.mul_(2.0).sum().backward()
    inside = torch.ones(4) if name != "clipped" else torch.tensor([1.0, 1.0, 1.0, 0.0])
    assert torch.equal(x.grad.float(), 2 * inside)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_scales_of_codes_learn(dtype):
    codes = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 9]])
    scale = torch.tensor([[0.5], [0.3]], requires_grad=True)
    zero = torch.tensor([[0.1], [0.2]], requires_grad=True)
    y = decode_scaled(codes, E2M1, scale, zero, dtype=dtype, block_size=(1, 4))
    plain = decode_scaled(
        codes, E2M1, scale.detach(), zero.detach(), dtype=dtype, block_size=(1, 4)
    )
    assert torch.equal(y, plain)
    y.sum().backward()
    assert torch.equal(scale.grad, decode(codes, E2M1).sum(1, keepdim=True))
    assert torch.equal(zero.grad, torch.full((2, 1), 4.0))
