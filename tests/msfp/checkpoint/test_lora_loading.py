"""LoRAs beside packed layers do what they do beside the same weights in full precision."""

import copy

import diffusers
import pytest
import torch
from denoisers import CASES
from diffusers.loaders import PeftAdapterMixin
from families import images, pipeline
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from torch import nn

from msfp import InputError, QuantizationConfig, pack, quantize, save
from msfp.layers.packed import packed_layers
from msfp.pipelines.trajectories import as_vector

BY_DEFAULT = {
    "CogVideoXTransformer3DModel", "QwenImageTransformer2DModel", "SD3Transformer2DModel",
    "SanaTransformer2DModel", "WanTransformer3DModel",
}  # fmt: skip
KEYWORDS = {"UNetMotionModel": "motion_modules"}
"""Layers that a class calls with keywords, which PEFT does not support."""
LOADED = [
    pytest.param(name, marks=[pytest.mark.slow] * (name not in BY_DEFAULT))
    for name, case in CASES.items()
    if not case.reason and issubclass(getattr(diffusers, name, nn.Module), PeftAdapterMixin)
]
"""Classes into which diffusers loads LoRAs."""
WEIGHTS = QuantizationConfig(activation_bits=None, end_bits=4, refine=None)
"""With inputs in full precision, the dequantized network computes the same."""


def lora(network, names, seed):
    """The tensors of a LoRA of random weights for some layers."""
    torch.manual_seed(seed)
    tensors = {}
    for name in names:
        rows, *columns = network.get_submodule(name).weight.shape
        tensors[f"{name}.lora_A.weight"] = 0.3 * torch.randn(2, *columns)
        up = torch.randn(rows, 2, *(1,) * (len(columns) - 1))
        tensors[f"{name}.lora_B.weight"] = 0.3 * up
    return tensors


def load(tensors, name, **options):
    """A function that loads a LoRA into a denoiser."""
    return lambda network: network.load_lora_adapter(
        dict(tensors), adapter_name=name, prefix=None, **options
    )


def layers_that_ran(network, run):
    """The names of the layers that can have a LoRA, in the order in which they run."""
    ran = {}
    plain = [
        (name, layer) for name, layer in network.named_modules()
        if type(layer) in (nn.Linear, nn.Conv2d) and getattr(layer, "groups", 1) == 1
    ]  # fmt: skip
    hooks = [
        layer.register_forward_hook(lambda *_, name=name: ran.setdefault(name))
        for name, layer in plain
    ]
    run(network)
    for hook in hooks:
        hook.remove()
    return list(ran)


@pytest.mark.parametrize("name", LOADED)
def test_loras_of_every_class_do_the_same_beside_packed_layers(name):
    case = CASES[name]
    packed = case.make(name)
    quantize(packed, WEIGHTS)
    pack(packed)
    plain = copy.deepcopy(packed).dequantize()
    before = as_vector(case.call(plain))
    names = [
        each for each in layers_that_ran(plain, case.call)
        if KEYWORDS.get(name, "nowhere") not in each
    ]  # fmt: skip
    first, second = lora(plain, names[::2], 1), lora(plain, names[::3], 2)
    third = {key: -value for key, value in second.items()}
    steps = {
        "one is loaded": load(first, "a"),
        "another is loaded": load(second, "b"),
        "both with weights": lambda network: network.set_adapters(["a", "b"], [1.0, 0.5]),
        "one alone": lambda network: network.set_adapters("b"),
        "the weights of one": lambda network: network.set_adapters("b", 0.3),
        "another in its place": load(third, "b", hotswap=True),
        "none": lambda network: network.disable_lora(),
        "one again": lambda network: network.enable_lora(),
        "that one is deleted": lambda network: network.delete_adapters("b"),
        "all are unloaded": lambda network: network.unload_lora(),
    }
    seen = {}
    for step, do in steps.items():
        do(packed)
        do(plain)
        found, wanted = as_vector(case.call(packed)), as_vector(case.call(plain))
        torch.testing.assert_close(found, wanted, msg=lambda text, step=step: f"{step}: {text}")
        seen[step] = found
    for step in ("none", "all are unloaded"):
        torch.testing.assert_close(seen[step], before)
    for step in list(steps)[:6]:
        assert not torch.allclose(seen[step], before, atol=1e-5), step
    assert not torch.equal(seen["both with weights"], seen["one alone"])
    assert not torch.equal(seen["the weights of one"], seen["another in its place"])


def test_a_lora_of_a_text_encoder_is_loaded_beside_a_packed_denoiser(tmp_path):
    pipe = pipeline("conditional_unet", tmp_path)
    quantize(pipe, WEIGHTS)
    pack(pipe)
    plain = copy.deepcopy(pipe)
    plain.unet.dequantize()
    unet = lora(plain.unet, layers_that_ran(plain.unet, lambda _: images(plain))[::4], 1)
    encoder = copy.deepcopy(pipe.text_encoder)
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    inject_adapter_in_model(config, encoder)
    type(pipe).save_lora_weights(tmp_path, unet, get_peft_model_state_dict(encoder))
    before = images(pipe)
    seen = []
    for weights in ({"unet": 1.0, "text_encoder": 0.0}, {"unet": 0.5, "text_encoder": 4.0}):
        for each in (pipe, plain):
            each.load_lora_weights(tmp_path, adapter_name="a")
            each.set_adapters("a", weights)
        seen.append(images(pipe))
        torch.testing.assert_close(seen[-1], images(plain))
        with pytest.raises(InputError, match=r"call msfp.fuse_lora, or call dequantize\(\)"):
            pipe.fuse_lora()
        with pytest.raises(InputError, match="text_encoder has LoRAs loaded: call unload_lora_w"):
            save(pipe, tmp_path / "saved")
        for each in (pipe, plain):
            each.unload_lora_weights()
        assert torch.equal(images(pipe), before)
    assert not torch.equal(*seen)
    assert packed_layers(pipe.unet)
