import pytest
import torch
from oracles import aimed_inputs, assert_same_bits, small_formats
from torch._dynamo.testing import CompileCounterWithBackend

from fpformats import FloatFormat, format_parameters, parse, quantize, quantize_parametric

FORMATS = [fmt for fmt in small_formats() if fmt.subnormals and fmt.exponent_bits < 8]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_format_as_a_tensor_rounds_as_the_format_does(dtype):
    for fmt in FORMATS:
        try:
            x = torch.from_numpy(aimed_inputs(fmt, "float32")).to(dtype)
            expected = quantize(x, fmt)
        except ValueError:  # float16 does not hold it
            assert dtype is not torch.float32
            continue
        assert_same_bits(
            quantize_parametric(x, format_parameters(fmt)).float().numpy(),
            expected.float().numpy(),
        )


def test_one_graph_serves_all_formats_and_gives_the_same_bits():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(quantize_parametric, backend=counter, fullgraph=True)
    x = torch.from_numpy(aimed_inputs(parse("E4M3"), "float32"))
    for fmt in FORMATS[::4]:
        rounded = compiled(x, format_parameters(fmt))
        assert_same_bits(rounded.numpy(), quantize(x, fmt).numpy())
    assert counter.frame_count == 1


def test_the_gradient_passes_straight_through():
    x = torch.tensor([0.3, 9.0], requires_grad=True)
    quantize_parametric(x, format_parameters(parse("E2M1"))).backward(torch.tensor([2.0, 3.0]))
    assert x.grad.tolist() == [2.0, 3.0]


@pytest.mark.parametrize("name", ["E8M7IEEE", "E2M1NS", "E5M23", "E8M0"])
def test_formats_that_float32_has_no_room_for_are_refused(name):
    with pytest.raises(ValueError, match="as parameters go formats with subnormal numbers"):
        format_parameters(parse(name))


def test_what_are_no_parameters_is_refused():
    parameters = format_parameters(FloatFormat(2, 1))
    with pytest.raises(ValueError, match=r"parameters is of torch\.float32 and shape \(7,\)"):
        quantize_parametric(torch.ones(2), parameters[:7])
    with pytest.raises(TypeError, match=r"x is of torch\.float64"):
        quantize_parametric(torch.ones(2, dtype=torch.float64), parameters)
