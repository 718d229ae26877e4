"""Adapters of PEFT are merged into the weights of a network, and put back."""

import copy

import pytest
import torch
from peft import LoHaConfig, LoraConfig, inject_adapter_in_model
from torch import nn

from msfp import InputError
from msfp.layers.adapters import adapter_layers, merge_adapters, merged_adapters, merged_names


def network(groups=1):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(4, 6, 3, groups=groups), nn.Flatten(), nn.Linear(24, 5))


def call(network):
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        return network(torch.randn(2, 4, 4, 4, generator=draw))


def lora(**arguments):
    return LoraConfig(r=2, target_modules=["0", "2"], init_lora_weights=False, **arguments)


def adapted(config=None, names=("a",), groups=1):
    """A network with an adapter of random weights for each name."""
    plain = network(groups)
    torch.manual_seed(2)
    for name in names:
        inject_adapter_in_model(lora() if config is None else config, plain, name)
    return plain


def turned(network, method, *arguments):
    for layer in adapter_layers(network).values():
        getattr(layer, method)(*arguments)
    return network


IN_USE = {
    "one": adapted,
    "DoRA": lambda: adapted(lora(use_dora=True)),
    "LoHa": lambda: adapted(LoHaConfig(r=2, target_modules=["0", "2"], init_weights=False)),
    "two with scales": lambda: turned(
        turned(adapted(names=("a", "b")), "set_adapter", ["a", "b"]), "set_scale", "b", 0.3
    ),
    "one of two": lambda: turned(adapted(names=("a", "b")), "set_adapter", ["a"]),
    "fused": lambda: turned(adapted(), "merge"),
    "turned off": lambda: turned(adapted(), "enable_adapters", False),
    "fused and turned off": lambda: turned(turned(adapted(), "merge"), "enable_adapters", False),
}


@pytest.mark.parametrize("case", IN_USE)
def test_a_merged_network_gives_the_outputs_of_its_adapters_and_has_none(case):
    adapted = IN_USE[case]()
    wanted = call(copy.deepcopy(adapted))
    merge_adapters(adapted)
    assert [type(layer) for layer in adapted] == [nn.Conv2d, nn.Flatten, nn.Linear]
    torch.testing.assert_close(call(adapted), wanted)
    assert torch.equal(call(adapted), call(network())) == (case == "turned off")


def test_adapters_are_put_back_with_the_weights_of_before():
    adapted = IN_USE["two with scales"]()
    layers, before = list(adapted), call(adapted)
    weights = {name: value.clone() for name, value in adapted.state_dict().items()}
    adapted.peft_config = {"a": "its config"}
    with pytest.raises(KeyError), merged_adapters(adapted):
        assert not hasattr(adapted, "peft_config")
        raise KeyError
    assert list(adapted) == layers
    assert adapted.peft_config == {"a": "its config"}
    assert torch.equal(call(adapted), before)
    assert all(torch.equal(value, weights[key]) for key, value in adapted.state_dict().items())


def test_names_say_which_adapters_are_in_use():
    assert merged_names(network()) == ([], [])
    assert merged_names(IN_USE["one of two"]()) == (["a"], ["b"])
    assert merged_names(IN_USE["turned off"]()) == ([], ["a"])


@pytest.mark.parametrize("break_it", [
    lambda: adapted(groups=2),
    lambda: turned(adapted(), "scale_layer", float("nan")),
], ids=["of a grouped convolution", "not finite"])  # fmt: skip
def test_an_adapter_that_cannot_be_merged_is_refused_and_nothing_changes(break_it):
    broken = break_it()
    layers = list(broken)
    with pytest.raises(InputError, match=r"adapters of layer '0' \(a\) cannot be merged into its"):
        merge_adapters(broken)
    assert list(broken) == layers
