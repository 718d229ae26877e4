import numpy as np
import torch

from msfp import Sampler, calibrate
from msfp.calibration import SAMPLES_PER_CALL
from msfp.denoiser import quantizable_layers


def test_every_layer_is_seen_at_every_step(reference, calibration, sampler):
    assert list(calibration.inputs) == list(quantizable_layers(reference.unet))
    for values in calibration.inputs.values():
        assert values.shape == (sampler.steps * (SAMPLES_PER_CALL + 2),)
        assert np.isfinite(values).all()


def test_the_extremes_of_every_call_are_kept(reference):
    seen = []

    def hook(_module, args):
        seen.append(torch.stack(args[0].aminmax()))

    handle = reference.unet.conv_out.register_forward_pre_hook(hook)
    calibration = calibrate(reference, Sampler(3, 4), count=4)
    handle.remove()
    extremes = torch.stack(seen)
    values = calibration.inputs["conv_out"]
    assert values.min() == extremes.min().item()
    assert values.max() == extremes.max().item()


def test_values_after_silu_lie_above_its_minimum(calibration):
    for name, values in calibration.inputs.items():
        if name.endswith(("conv1", "conv2", "conv_out")):
            assert values.min() >= -0.2785


def test_it_is_reproduced_by_its_seed_and_leaves_no_hooks(reference):
    first, second = (calibrate(reference, Sampler(2, 4), count=4, seed=9) for _ in range(2))
    for name, values in first.inputs.items():
        assert np.array_equal(values, second.inputs[name])
    assert not reference.unet.conv_in._forward_pre_hooks
