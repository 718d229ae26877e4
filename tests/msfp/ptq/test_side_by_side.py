import copy

import pytest
import torch

from msfp import InputError, pack
from msfp.layers.base import quantized_layers
from msfp.ptq.side_by_side import visit_layers

STEP, ROW = torch.tensor([0, 1, 3]).repeat_interleave(3), torch.arange(3).repeat(3)


@pytest.fixture
def batch(trajectories):
    return trajectories.samples[STEP, ROW], trajectories.timesteps[STEP]


def look(_visit):
    """A visit that changes nothing."""


def doubled(denoiser, trajectories, visitor):
    return visit_layers(denoiser, trajectories, STEP, ROW, visitor).chunk(2)


def test_the_halves_are_the_two_models(quantized, reference, trajectories, batch):
    denoiser = quantized()[0].unet
    with torch.no_grad():
        alone = [model(*batch).sample for model in (reference.unet, denoiser)]
    together = doubled(denoiser, trajectories, look)
    # Sums in another order may send a value to the next one of its grid, now and then.
    apart = (alone[0] - alone[1]).square().mean()
    for expected, half in zip(alone, together, strict=True):
        assert (half - expected).square().mean() < 0.01 * apart


def test_every_layer_is_visited_once_in_running_order_with_its_own_inputs_and_outputs(
    quantized, reference, trajectories, batch
):
    denoiser = quantized()[0].unet
    seen, outputs, visits = {}, {}, []

    def read(name):
        return lambda _module, args: seen.setdefault(name, args[0])

    def give(name):
        return lambda _module, _args, output: outputs.setdefault(name, output)

    plain = copy.deepcopy(reference.unet)
    for name, layer in quantized_layers(denoiser).items():
        layer.register_forward_pre_hook(read(name))
        plain.get_submodule(name).register_forward_hook(give(name))
    with torch.no_grad():
        denoiser(*batch)
        plain(*batch)
    for layer in quantized_layers(denoiser).values():
        layer._forward_pre_hooks.clear()
    doubled(denoiser, trajectories, visits.append)
    assert sorted(visit.name for visit in visits) == sorted(quantized_layers(denoiser))
    assert visits[0].name == "time_embedding.linear_1"
    assert visits[-1].name == "conv_out"
    for visit in visits:
        inputs = seen[visit.name]
        assert (visit.inputs - inputs).square().mean() < 0.01 * inputs.square().mean()
        torch.testing.assert_close(visit.outputs, outputs[visit.name], rtol=1e-3, atol=1e-3)


def test_what_a_visit_changes_holds_for_the_quantized_half_alone(quantized, trajectories):
    denoiser = quantized()[0].unet

    def silence(visit):
        if visit.name == "conv_out":
            visit.layer.weight = torch.nn.Parameter(torch.zeros_like(visit.layer.weight))

    full, _ = doubled(denoiser, trajectories, look)
    same, silent = doubled(denoiser, trajectories, silence)
    assert torch.equal(same, full)
    assert torch.equal(silent, denoiser.conv_out.bias.view(1, -1, 1, 1).expand_as(silent))


def test_layers_are_as_before_after_the_block_and_after_an_error(quantized, trajectories, batch):
    denoiser = quantized()[0].unet
    with torch.no_grad():
        before = denoiser(*batch).sample

    def fail(_visit):
        raise KeyError

    with pytest.raises(KeyError):
        doubled(denoiser, trajectories, fail)
    with torch.no_grad():
        assert torch.equal(denoiser(*batch).sample, before)


def test_a_plain_or_a_packed_denoiser_is_refused(quantized, reference, trajectories):
    packed = quantized()[0].unet
    pack(packed)
    for denoiser in (reference.unet, packed):
        with pytest.raises(InputError, match="must have been quantized and not yet packed"):
            doubled(denoiser, trajectories, look)
