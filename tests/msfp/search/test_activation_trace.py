import torch
import torch.nn.functional as F

from msfp.search.activation_trace import ActivationTrace


def test_activation_functions_are_known_however_they_are_called():
    x = torch.linspace(-2, 2, 24).view(2, 3, 4)
    with ActivationTrace() as trace:
        outputs = [
            torch.nn.SiLU()(x),
            F.gelu(x, approximate="tanh"),
            x.relu(),
            x.softmax(dim=-1),
            torch.nn.SiLU(inplace=True)(x.clone()),
        ]
        names = [trace.function_of(y) for y in outputs]
    assert names == ["SiLU", "GELU", "ReLU", "softmax", "SiLU"]


def test_a_name_stays_with_views_and_goes_with_what_is_computed():
    x = torch.linspace(-2, 2, 24).view(2, 3, 4)
    with ActivationTrace() as trace:
        y = F.silu(x)
        kept = [y.flatten(), y.transpose(1, 2), F.dropout(y, 0.5, training=False), y[:, 1]]
        assert [trace.function_of(each) for each in kept] == ["SiLU"] * 4
        for computed in (y * 2, y @ y.mT, F.interpolate(y, scale_factor=2)):
            assert trace.function_of(computed) is None


def test_memory_that_another_function_writes_is_forgotten():
    with ActivationTrace() as trace:
        y = F.silu(torch.ones(3))
        again = torch.add(torch.ones(3), 1, out=y)
        assert again.data_ptr() == y.data_ptr()
        assert trace.function_of(y) is None


def test_nothing_is_known_once_the_block_has_ended():
    with ActivationTrace() as trace:
        y = F.silu(torch.ones(3))
    assert trace.function_of(y) is None
    assert trace.function_of(F.silu(torch.ones(3))) is None
