import copy

import families
import pytest
import torch

from msfp import QuantizationConfig, quantize, record_trajectories
from msfp.pipelines.denoiser import denoiser_of
from msfp.ptq.time_layers import time_inputs, with_exact_times


def test_the_layers_found_are_those_of_the_time_embedding(reference, trajectories):
    names = list(time_inputs(reference.unet, trajectories))
    expected = [
        name
        for name, module in reference.unet.named_modules()
        if isinstance(module, torch.nn.Linear) and "time_emb" in name
    ]
    assert names == expected
    assert len(names) == 13


def test_their_inputs_are_what_any_sample_gives_at_that_timestep(reference, trajectories):
    inputs = time_inputs(reference.unet, trajectories)
    seen = []
    layer = reference.unet.mid_block.resnets[0].time_emb_proj
    handle = layer.register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    with torch.no_grad():
        for timestep in trajectories.timesteps:
            reference.unet(torch.randn(1, 1, 16, 16), timestep)
    handle.remove()
    torch.testing.assert_close(
        torch.cat(seen), inputs["mid_block.resnets.0.time_emb_proj"], rtol=1e-5, atol=1e-5
    )


def test_a_calibration_takes_them_all_once_and_keeps_the_rest(reference, trajectories, calibration):
    exact = with_exact_times(calibration, reference.unet, trajectories)
    assert list(exact.inputs) == list(calibration.inputs)
    assert exact.inputs["conv_in"] is calibration.inputs["conv_in"]
    known, sampled = (each.inputs["time_embedding.linear_2"] for each in (exact, calibration))
    assert known.count == 4 * 128
    assert sampled.count == 4 * 128 * 8  # every sample of the batch reads the same
    assert (known.min, known.max) == (sampled.min, sampled.max)
    assert not reference.unet.conv_in._forward_pre_hooks


def test_no_other_choice_has_less_error_on_what_the_layers_will_read(
    reference, trajectories, calibration
):
    summaries = []
    for seen in (calibration, with_exact_times(calibration, reference.unet, trajectories)):
        pipe = copy.deepcopy(reference)
        quantize(pipe, QuantizationConfig(refine=None), calibration=seen)
        errors = []
        for name, x in time_inputs(reference.unet, trajectories).items():
            quantizer = pipe.unet.get_submodule(name).input_quantizer
            errors.append((quantizer(x) - x).square().sum().item())
        summaries.append(errors)
    for sampled, exact in zip(*summaries, strict=True):
        assert exact <= sampled * (1 + 1e-3)


@pytest.mark.parametrize("family", ["conditional_unet", "pixart"])
def test_layers_that_read_samples_or_conditions_are_none_of_them(family, tmp_path):
    pipe = families.pipeline(family, tmp_path)
    paths = record_trajectories(pipe, families.images)
    names = list(time_inputs(denoiser_of(pipe), paths))
    assert len(names) > 2
    assert all("time_emb" in name or name.startswith("adaln_single.") for name in names)
