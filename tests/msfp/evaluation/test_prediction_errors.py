import copy
from dataclasses import replace

import pytest
import torch
from families import make, pipeline

import msfp
from msfp import InputError, QuantizationConfig, Sampler, record_trajectories
from msfp.cli.finetuning_run import Extent, FinetuningRun
from msfp.evaluation.prediction_errors import noise_errors
from msfp.pipelines.trajectories import Trajectories
from msfp.training.objective import Objective


@pytest.fixture
def paths():
    pipe = pipeline("unet", None)
    pipe.unet.conv_out.weight.data *= 1.5
    return record_trajectories(pipe, calls=Sampler(steps=3, batch=7).calls(7, seed=0))


def forwards(denoiser):
    """The rows of each forward that follows."""
    rows = []
    denoiser.register_forward_hook(lambda _module, args, _output: rows.append(len(args[0])))
    return rows


def all_at_once(denoiser, paths):
    """The errors by a forward of all rows for each timestep."""
    rows = torch.arange(paths.samples.shape[1])
    with torch.no_grad():
        return [
            (paths.predict(denoiser, torch.full_like(rows, step), rows) - prediction)
            .square()
            .mean()
            .item()
            for step, prediction in enumerate(paths.predictions)
        ]


@pytest.mark.parametrize("batch", [7, 64])
def test_rows_that_fit_into_one_forward_have_the_bits_of_their_mean(batch, paths):
    denoiser = make("unet")
    assert noise_errors(denoiser, trajectories=paths, batch=batch) == all_at_once(denoiser, paths)


@pytest.mark.parametrize("batch", [1, 3, 6])
def test_errors_depend_on_the_rows_of_a_forward_by_rounding_alone(batch, paths):
    denoiser = make("unet")
    rows = forwards(denoiser)
    found = noise_errors(denoiser, trajectories=paths, batch=batch)
    assert max(rows) == batch
    assert sum(rows) == 3 * 7
    assert found == pytest.approx(all_at_once(denoiser, paths), rel=1e-5)


def test_a_variance_that_is_predicted_beside_the_noise_does_not_count():
    torch.manual_seed(0)
    path = Trajectories(
        torch.tensor([9, 1]), torch.randn(2, 4, 3, 8, 8), torch.randn(2, 4, 6, 8, 8)
    )
    own = replace(path, predictions=torch.randn(2, 4, 6, 8, 8))

    def errors(channels):
        class Denoiser(torch.nn.Module):
            def forward(self, x, timestep):
                step = (own.timesteps == timestep[0]).nonzero().item()
                return own.predictions[step][: len(x), :channels]

        denoiser = Denoiser()
        some = replace(path, predictions=path.predictions[:, :, :channels])
        objective = Objective(torch.ones(2), (-1.0, 2.0))
        return noise_errors(denoiser, trajectories=some), objective.held_out_error(
            denoiser, some, 2, range(2)
        )

    (both, guided), (noise, guided_noise) = errors(6), errors(3)
    assert both == noise
    assert guided == guided_noise


def test_at_least_one_row_must_be_in_a_forward(paths):
    with pytest.raises(InputError, match="batch must be at least 1, not 0"):
        noise_errors(make("unet"), trajectories=paths, batch=0)


def test_held_out_rows_are_taken_as_many_at_once_as_a_call_has(tmp_path):
    full = pipeline("conditional_unet", tmp_path)
    sampler = Sampler(2, 2, ("a", "a a"), guidance_scale=3.0)
    quantized = copy.deepcopy(full)
    msfp.quantize(quantized, QuantizationConfig(refine=None), calibration=sampler.calls(2, 0))
    msfp.pack(quantized.unet)
    tuning = FinetuningRun(full, quantized, sampler, Extent(4, 6, 0))
    rows = forwards(quantized.unet)
    measured = tuning.measured("quantized", quantized)
    assert set(rows) == {4}  # two images in two branches
    assert measured.errors == pytest.approx(
        noise_errors(quantized.unet, trajectories=tuning.held_out), rel=1e-5
    )
