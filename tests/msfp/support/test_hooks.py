import pytest
import torch
from torch import nn

from msfp.support.hooks import hooked


def hooks_of(layers, seen):
    for name, layer in layers.items():
        yield layer.register_forward_pre_hook(lambda *_, name=name: seen.append(name))


def assert_bare(layers):
    assert not any(layer._forward_pre_hooks for layer in layers.values())


@pytest.fixture
def layers():
    return {"first": nn.Linear(1, 1), "second": nn.Linear(1, 1)}


def test_hooks_are_there_inside_the_block_and_gone_after_it(layers):
    seen = []
    with hooked(hooks_of(layers, seen)):
        for layer in layers.values():
            layer(torch.ones(1))
    assert seen == ["first", "second"]
    assert_bare(layers)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_hooks_are_gone_after_an_error_in_the_block(layers, error):
    with pytest.raises(error), hooked(hooks_of(layers, [])):
        raise error
    assert_bare(layers)


def test_hooks_are_gone_where_a_later_one_cannot_be_registered(layers):
    def failing():
        yield from hooks_of(layers, [])
        raise RuntimeError

    with pytest.raises(RuntimeError), hooked(failing()):
        pytest.fail("the block was entered")
    assert_bare(layers)


def test_other_hooks_stay(layers):
    seen = []
    layers["first"].register_forward_pre_hook(lambda *_: seen.append("own"))
    with hooked(hooks_of(layers, [])):
        pass
    layers["first"](torch.ones(1))
    assert seen == ["own"]
