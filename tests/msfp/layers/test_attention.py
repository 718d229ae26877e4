import copy

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import AttnProcessor

from msfp import InputError, QuantizationConfig, quantize, quantize_attention
from msfp.layers.attention import OPERANDS, attention, attention_modules


def as_given(_name, x):
    return x


@pytest.mark.parametrize("kind", ["none", "added", "boolean"])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_without_rounding_it_is_scaled_dot_product_attention(kind, scale):
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(2, 3, length, 8, generator=generator, dtype=torch.float64)
        for length in (5, 7, 7)
    )
    mask = torch.randn(2, 1, 5, 7, generator=generator, dtype=torch.float64)
    mask = {"none": None, "added": mask, "boolean": mask > -0.5}[kind]
    expected = F.scaled_dot_product_attention(query, key, value, mask, scale=scale)
    torch.testing.assert_close(attention(query, key, value, mask, scale, as_given), expected)


def test_each_operand_is_rounded_once_under_its_name():
    seen = []

    def note(name, x):
        seen.append((name, tuple(x.shape)))
        return x

    attention(torch.ones(1, 2, 4), torch.ones(1, 3, 4), torch.ones(1, 3, 5), None, None, note)
    assert sorted(seen) == sorted(
        zip(OPERANDS, [(1, 2, 4), (1, 3, 4), (1, 2, 3), (1, 3, 5)], strict=True)
    )


def test_every_attention_of_the_model_is_quantized_with_unsigned_probabilities(
    quantized, trajectories
):
    denoiser = quantized()[0].unet
    quantize_attention(denoiser, 4, trajectories=trajectories, samples=8)
    modules = attention_modules(denoiser)
    assert len(modules) == 4
    for module in modules.values():
        formats = {name: q.format for name, q in module.products.items()}
        assert {fmt.bits for fmt in formats.values()} == {4}
        assert not formats["probabilities"].signed
        assert module.products["probabilities"].zero_point is None


def test_the_prediction_moves_by_less_the_more_bits_there_are(quantized, trajectories):
    sample, timestep = trajectories.samples[1, :8], trajectories.timesteps[1]
    errors = []
    for bits in (4, 6, 8):
        denoiser = quantized(weight_bits=8, activation_bits=None)[0].unet
        with torch.no_grad():
            before = denoiser(sample, timestep).sample
            quantize_attention(denoiser, bits, trajectories=trajectories, samples=8)
            moved = denoiser(sample, timestep).sample - before
        errors.append(moved.square().mean().item())
    assert 0 < errors[2] < errors[1] < errors[0] < 0.01


def test_a_processor_that_computes_attention_by_itself_is_refused_and_nothing_is_changed(
    quantized, trajectories
):
    denoiser = quantized()[0].unet
    modules = attention_modules(denoiser)
    last = list(modules.values())[-1]
    last.set_processor(AttnProcessor())
    with pytest.raises(InputError, match="AttnProcessor does not call scaled dot-product"):
        quantize_attention(denoiser, 4, trajectories=trajectories, samples=2)
    assert not any(hasattr(module, "products") for module in modules.values())
    assert not any(module._forward_hooks for module in modules.values())


def test_rounding_ends_with_the_module_even_after_an_error(quantized, trajectories):
    denoiser = quantized()[0].unet
    quantize_attention(denoiser, 4, trajectories=trajectories, samples=2)
    module = next(iter(attention_modules(denoiser).values()))
    with pytest.raises(RuntimeError):
        module(torch.ones(1, 5, 3))
    assert torch.overrides._get_current_function_mode_stack() == []


def test_arguments_of_a_call_reach_the_processor(quantized, trajectories):
    denoiser = quantized()[0].unet
    quantize_attention(denoiser, 4, trajectories=trajectories, samples=2)
    module = next(iter(attention_modules(denoiser).values()))
    seen = {}
    processor = module.processor

    class Listening:
        def __call__(self, attn, hidden_states, temb=None, **kwargs):
            seen["temb"] = temb
            return processor(attn, hidden_states, temb=temb, **kwargs)

    module.set_processor(Listening())
    with torch.no_grad():
        module(torch.randn(1, 64, 8, 8), temb=torch.ones(1))
    assert seen["temb"] is not None


def test_a_copy_has_quantizers_of_its_own(quantized, trajectories):
    denoiser = quantized()[0].unet
    quantize_attention(denoiser, 4, trajectories=trajectories, samples=2)
    twin = copy.deepcopy(denoiser)
    call = trajectories.samples[1, :2], trajectories.timesteps[1]
    with torch.no_grad():
        before = denoiser(*call).sample
        assert torch.equal(twin(*call).sample, before)
        for module in attention_modules(twin).values():
            module.products["value"].scale.mul_(1.5)
        assert not torch.equal(twin(*call).sample, before)
        assert torch.equal(denoiser(*call).sample, before)


def test_the_config_that_is_saved_says_that_products_were_quantized(quantized, trajectories):
    pipe = quantized()[0]
    quantize_attention(pipe, 5, trajectories=trajectories, samples=2)
    config = pipe.unet.hf_quantizer.quantization_config
    saved = pipe.unet.config.quantization_config
    assert config.request.attention_bits == saved.request.attention_bits == 5
    assert config.products.keys() == attention_modules(pipe.unet).keys()


@pytest.mark.parametrize("bits", [2, 4.0])
def test_products_of_bits_that_cannot_be_are_refused(bits, quantized, trajectories):
    with pytest.raises(InputError, match=f"bits must be .* not {bits}"):
        quantize_attention(quantized()[0].unet, bits, trajectories=trajectories)


def test_a_denoiser_without_attention_quantized_twice_or_not_at_all_is_refused(
    reference, quantized, trajectories
):
    network = torch.nn.Sequential(torch.nn.Linear(2, 2))
    quantize(network, QuantizationConfig(activation_bits=None, end_bits=4))
    with pytest.raises(InputError, match="Sequential has no attention module"):
        quantize_attention(network, 4, trajectories=trajectories)
    with pytest.raises(InputError, match="must have been quantized"):
        quantize_attention(reference.unet, 4, trajectories=trajectories)
    denoiser = quantized()[0].unet
    quantize_attention(denoiser, 4, trajectories=trajectories, samples=2)
    with pytest.raises(InputError, match="quantized already"):
        quantize_attention(denoiser, 4, trajectories=trajectories)
