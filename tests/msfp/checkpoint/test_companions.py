"""Quantized denoisers with what else is done to denoisers: LoRA, offloading, compiling."""

import copy

import accelerate
import pytest
import torch
from families import call, make, quantized
from peft import LoraConfig

from msfp import InputError, QuantConv2d, QuantLinear, cache_weights
from msfp.layers.base import quantized_layers

TARGETS = ["to_q", "conv1", "conv_in", "proj_in", "linear_1"]


@pytest.fixture(scope="module")
def untouched():
    return quantized(make("conditional_unet"))


@pytest.fixture
def unet(untouched):
    return copy.deepcopy(untouched)


@pytest.fixture
def adapted(unet):
    torch.manual_seed(0)
    unet.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=TARGETS))
    return unet


def loss_of(unet):
    draw = torch.Generator().manual_seed(2)
    x, text = (torch.randn(*shape, generator=draw) for shape in ((2, 4, 8, 8), (2, 5, 8)))
    return unet(x, 500, text).sample.square().mean()


def test_a_new_lora_changes_nothing_and_leaves_the_packed_layers_below(adapted, untouched):
    assert torch.equal(call(adapted), call(untouched))
    assert isinstance(adapted.conv_in.base_layer, QuantConv2d)
    assert isinstance(adapted.time_embedding.linear_1.base_layer, QuantLinear)
    assert quantized_layers(adapted).keys() == {
        f"{name}.base_layer" if name.split(".")[-1] in TARGETS else name
        for name in quantized_layers(untouched)
    }


def test_a_lora_is_trained_on_top_and_taken_off_again(adapted, untouched):
    trained = [p for p in adapted.parameters() if p.requires_grad]
    assert {p.dtype for p in trained} == {torch.float32}
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    losses = []
    for _ in range(8):
        losses.append(loss_of(adapted))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    assert not torch.equal(call(adapted), call(untouched))
    adapted.disable_adapters()
    assert torch.equal(call(adapted), call(untouched))
    adapted.delete_adapters("default")
    adapted.unload_lora()
    assert torch.equal(call(adapted), call(untouched))


def test_a_lora_is_not_merged_into_packed_weights_but_into_dequantized_ones(adapted):
    with pytest.raises(InputError, match=r"nothing can be merged into it.*dequantize\(\)"):
        adapted.fuse_lora()
    plain = quantized(make("conditional_unet")).dequantize()
    plain.add_adapter(LoraConfig(r=2, target_modules=TARGETS))
    plain.fuse_lora()


def test_a_denoiser_with_a_lora_is_not_saved_as_if_it_had_none(adapted, tmp_path):
    with pytest.raises(InputError, match=r"'conv_in' has no packed codes.*save LoRA adapters by"):
        adapted.save_pretrained(tmp_path)
    adapted.save_lora_adapter(tmp_path / "lora")
    assert (tmp_path / "lora" / "pytorch_lora_weights.safetensors").is_file()


def test_checkpointing_of_gradients_does_not_change_them(adapted):
    adapted.train()
    gradients = []
    for _ in range(2):
        loss_of(adapted).backward()
        gradients.append([p.grad for p in adapted.parameters() if p.grad is not None])
        adapted.zero_grad()
        adapted.enable_gradient_checkpointing()
    assert len(gradients[0]) > 10
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("buffers", [False, True])
def test_offloaded_codes_are_loaded_for_each_layer(unet, untouched, buffers):
    accelerate.cpu_offload(unet, torch.device("cpu"), offload_buffers=buffers)
    assert unet.conv_in.codes.is_meta
    assert unet.conv_in.weight_scale.is_meta == buffers
    assert torch.equal(call(unet), call(untouched))


def test_group_offloading_keeps_the_prediction(unet, untouched):
    cpu = torch.device("cpu")
    unet.enable_group_offload(cpu, cpu, "leaf_level")
    assert torch.equal(call(unet), call(untouched))


def test_casting_layer_by_layer_leaves_packed_layers_as_they_are(unet, untouched):
    cache_weights(unet)
    unet.enable_layerwise_casting(torch.float8_e5m2, torch.float32)
    assert unet.mid_block.resnets[0].conv1.bias.dtype == torch.float32
    assert torch.equal(call(unet), call(untouched))


def test_channels_last_and_cached_weights_keep_the_prediction(unet, untouched):
    cache_weights(unet)
    assert torch.equal(call(unet), call(untouched))
    torch.testing.assert_close(call(unet.to(memory_format=torch.channels_last)), call(untouched))


@pytest.mark.parametrize("cached", [False, True])
def test_a_denoiser_runs_under_autocast(unet, untouched, cached):
    cache_weights(unet, enabled=cached)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        prediction = call(unet)
        assert torch.equal(prediction, call(untouched))
    assert prediction.dtype == torch.bfloat16


@pytest.mark.slow
def test_a_compiled_denoiser_gives_the_same_bits(unet):
    torch.compiler.reset()
    unet.compile(fullgraph=True)
    arguments = torch.randn(2, 4, 8, 8), torch.tensor(500), torch.randn(2, 5, 8)
    with torch.no_grad():
        compiled = unet(*arguments).sample
        assert torch.equal(compiled, unet.forward(*arguments).sample)
