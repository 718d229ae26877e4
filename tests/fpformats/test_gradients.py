import pytest
import torch

from fpformats import parse, quantize, quantize_scaled

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
