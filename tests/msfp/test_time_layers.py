import copy

import numpy as np
import torch

from msfp import QuantizationConfig, quantize
from msfp.time_layers import time_inputs, with_exact_times


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
    assert exact.inputs["time_embedding.linear_2"].shape == (4 * 128,)
    known = np.sort(exact.inputs["time_embedding.linear_2"])
    sampled = calibration.inputs["time_embedding.linear_2"]
    after = np.searchsorted(known, sampled).clip(1, len(known) - 1)
    gap = np.minimum(abs(sampled - known[after - 1]), abs(sampled - known[after]))
    assert gap.max() < 1e-4
    assert not reference.unet.conv_in._forward_pre_hooks


def test_no_other_choice_has_less_error_on_what_the_layers_will_read(
    reference, trajectories, calibration
):
    summaries = []
    for values in (calibration, with_exact_times(calibration, reference.unet, trajectories)):
        pipe = copy.deepcopy(reference)
        quantize(pipe, QuantizationConfig(), calibration=values)
        errors = []
        for name, x in time_inputs(reference.unet, trajectories).items():
            quantizer = pipe.unet.get_submodule(name).input_quantizer
            errors.append((quantizer(x) - x).square().sum().item())
        summaries.append(errors)
    for sampled, exact in zip(*summaries, strict=True):
        assert exact <= sampled * (1 + 1e-5)
