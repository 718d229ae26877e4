import math

import pytest
import torch
from diffusers import (
    CMStochasticIterativeScheduler,
    DDIMPipeline,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)

from msfp import InputError, denoising_factors, timestep_weights
from msfp.schedulers.closed_forms import closed_form

# diffusers' own, of NumPy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")

STEPS = 10


def test_factors_follow_the_samplers_grid_and_not_the_training_schedule():
    scheduler = DDIMScheduler(clip_sample=False)
    few, many = denoising_factors(scheduler, 10), denoising_factors(scheduler, 100)
    assert list(few) == list(range(900, -1, -100))
    assert few[900] < 5 * many[900] < 0


def test_grids_that_were_set_with_timesteps_sigmas_or_a_shift_are_taken_as_they_are():
    ddpm = DDPMScheduler(clip_sample=False)
    ddpm.set_timesteps(timesteps=[900, 500, 20])
    assert list(denoising_factors(ddpm)) == [900, 500, 20]
    euler = EulerDiscreteScheduler()
    euler.set_timesteps(sigmas=[10.0, 3.0, 1.0, 0.0])
    assert list(denoising_factors(euler).values()) == pytest.approx([-7.0, -2.0, -1.0])
    flow = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    flow.set_timesteps(4, mu=1.0)
    expected = flow.sigmas.double().diff().tolist()
    assert list(denoising_factors(flow).values()) == pytest.approx(expected)


@pytest.mark.parametrize(
    "scheduler", [DDPMScheduler(clip_sample=False), FlowMatchEulerDiscreteScheduler()]
)
def test_steps_are_needed_where_no_grid_is_set(scheduler):
    with pytest.raises(InputError, match="steps must be given"):
        denoising_factors(scheduler)


def test_a_scheduler_that_has_sampled_is_refused_until_its_grid_is_set_again():
    scheduler = UniPCMultistepScheduler()
    scheduler.set_timesteps(3)
    sample = torch.zeros(1, 1, 4, 4)
    scheduler.step(sample, scheduler.timesteps[0], sample)
    with pytest.raises(InputError, match="called again after sampling"):
        denoising_factors(scheduler)
    scheduler.set_timesteps(3)
    assert denoising_factors(scheduler) == denoising_factors(scheduler, 3)


@pytest.mark.parametrize(
    ("scheduler", "steps", "message"),
    [
        (DDIMScheduler(clip_sample=False), 0, "steps must be a whole number from 1 on, not 0"),
        (DDIMScheduler(clip_sample=False), 2.5, "steps must be a whole number from 1 on, not 2.5"),
        (DDIMScheduler(clip_sample=False), "5", "steps must be a whole number from 1 on, not '5'"),
        (DDIMScheduler(clip_sample=False), True, "steps must be a whole number"),
        (DDIMScheduler(clip_sample=False), 1001, "steps=1001"),
        (FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), 4, "mu.*omit steps"),
    ],
)
def test_steps_that_the_scheduler_does_not_take_are_refused(scheduler, steps, message):
    with pytest.raises(InputError, match=message):
        denoising_factors(scheduler, steps)


@pytest.mark.parametrize(
    ("scheduler", "flag"),
    [
        (DDIMScheduler(clip_sample=True), "clip_sample"),
        (DPMSolverMultistepScheduler(thresholding=True), "thresholding"),
        (CMStochasticIterativeScheduler(), "clip_denoised"),
    ],
)
def test_clipping_samplers_are_refused_unless_it_is_to_be_ignored(scheduler, flag):
    with pytest.raises(InputError, match=f"{flag}: turn that off.*clipping='ignore'"):
        denoising_factors(scheduler, STEPS)
    found = denoising_factors(scheduler, STEPS, clipping="ignore")
    assert scheduler.config[flag]
    scheduler.register_to_config(**{flag: False})
    assert found == denoising_factors(scheduler, STEPS)


def test_eta_of_ddim_shrinks_what_the_output_has_of_the_direction():
    scheduler = DDIMScheduler(clip_sample=False)
    none, some = (denoising_factors(scheduler, STEPS, eta=eta) for eta in (0.0, 1.0))
    assert none == denoising_factors(scheduler, STEPS)
    assert all(some[t] < none[t] < 0 for t in range(100, 1000, 100))
    ddpm = denoising_factors(DDPMScheduler(clip_sample=False), STEPS)
    assert some == pytest.approx(ddpm, rel=1e-6)


@pytest.mark.parametrize(
    "change", [{"eta": 0.5}, {"model_output": 1}, {"generator": None}], ids=str
)
def test_arguments_that_step_does_not_take_are_refused(change):
    with pytest.raises(InputError, match=r"step_arguments must be among \['s_churn'"):
        denoising_factors(EulerDiscreteScheduler(), STEPS, **change)


@pytest.mark.parametrize("eta", ["x", None, math.nan, math.inf])
def test_an_eta_that_is_no_number_is_refused(eta):
    with pytest.raises(InputError, match="eta must be a finite number, not"):
        denoising_factors(DDIMScheduler(clip_sample=False), STEPS, eta=eta)


@pytest.mark.parametrize("given", [DDIMPipeline(None, DDIMScheduler()), "ddim", None])
def test_what_is_no_scheduler_is_refused(given):
    with pytest.raises(InputError, match=f"scheduler must be .*, not {type(given).__name__}"):
        denoising_factors(given, STEPS)


@pytest.mark.parametrize("choice", ["target", "clipping"])
def test_unknown_choices_are_refused(choice):
    with pytest.raises(InputError, match=f"{choice} must be one of .*, not 'both'"):
        denoising_factors(DDIMScheduler(clip_sample=False), STEPS, **{choice: "both"})


def test_factors_that_are_not_finite_are_refused():
    """An output of noise tells nothing of x0 where the sample is nothing but noise."""
    config = {
        "clip_sample": False,
        "rescale_betas_zero_snr": True,
        "timestep_spacing": "trailing",
    }
    with pytest.raises(InputError, match="DDIMScheduler has -inf at 999"):
        denoising_factors(DDIMScheduler(**config), STEPS)
    with pytest.raises(InputError, match="DDIMScheduler has nan at"):
        denoising_factors(DDIMScheduler(clip_sample=False), STEPS, eta=20.0)
    denoising_factors(DDIMScheduler(prediction_type="v_prediction", **config), STEPS)


def test_x0_target_is_the_error_of_the_predicted_image():
    factors = denoising_factors(DDIMScheduler(clip_sample=False), STEPS, target="x0")
    bars = DDIMScheduler().alphas_cumprod.double()
    expected = {t: -math.sqrt((1 - bars[t]) / bars[t]) for t in range(0, 1000, 100)}
    assert factors == pytest.approx(expected)


@pytest.mark.parametrize("scheduler", [HeunDiscreteScheduler(), PNDMScheduler()])
def test_a_timestep_that_is_visited_twice_has_the_root_mean_square(scheduler):
    found = denoising_factors(scheduler, 5)
    scheduler.set_timesteps(5)
    assert list(found) == list(dict.fromkeys(scheduler.timesteps.tolist()))
    assert len(found) < len(scheduler.timesteps)
    if isinstance(scheduler, PNDMScheduler):
        visits = [f for t, f in closed_form(scheduler, "next_sample", {}) if t == 700]
        assert found[700] == pytest.approx(-math.sqrt(sum(f * f for f in visits) / len(visits)))
        assert len(visits) == 2


@pytest.mark.parametrize(
    "scheduler", [DDPMScheduler(clip_sample=False), EulerAncestralDiscreteScheduler()]
)
def test_factors_are_the_same_always_and_leave_no_trace(scheduler):
    before, state = dict(scheduler.__dict__), torch.get_rng_state()
    first = denoising_factors(scheduler, STEPS)
    torch.rand(3)
    assert denoising_factors(scheduler, STEPS) == first
    torch.set_rng_state(state)
    denoising_factors(scheduler, STEPS)
    assert torch.equal(torch.get_rng_state(), state)
    assert scheduler.__dict__.keys() == before.keys()
    assert all(value is before[name] for name, value in scheduler.__dict__.items())


@pytest.mark.parametrize("power", [0.0, 1.0, 2.0])
def test_weights_have_mean_one_and_the_ratio_of_the_powers(power):
    weights = timestep_weights({9: -4.0, 5: 2.0, 0: 1.0}, power)
    assert sum(weights.values()) / 3 == pytest.approx(1)
    assert weights[9] / weights[0] == pytest.approx(4**power)


def test_weights_without_normalisation_are_the_powers_themselves():
    assert timestep_weights({9: -4.0, 0: 0.5}, 2, normalisation="none") == {9: 16.0, 0: 0.25}


def test_power_two_weighs_an_error_by_what_it_does_to_the_next_sample():
    scheduler = DDIMScheduler(clip_sample=False)
    weights = timestep_weights(denoising_factors(scheduler, STEPS), 2, normalisation="none")
    scheduler.set_timesteps(STEPS)
    draw = torch.Generator().manual_seed(0)
    sample, output, error = torch.randn(3, 1, 3, 8, 8, generator=draw)
    for timestep in scheduler.timesteps:
        right = scheduler.step(output, timestep, sample).prev_sample
        wrong = scheduler.step(output + error, timestep, sample).prev_sample
        moved = (wrong - right).square().sum().item()
        assert moved == pytest.approx(
            weights[timestep.item()] * error.square().sum().item(), rel=1e-3
        )


@pytest.mark.parametrize(
    ("factors", "power", "normalisation", "message"),
    [
        ({1: 1.0}, -1, "mean", "power must be 0 or above"),
        ({1: 1.0}, math.inf, "mean", "power must be 0 or above"),
        ({1: 1.0}, math.nan, "mean", "power must be 0 or above"),
        ({1: 1.0}, "1", "mean", "power must be 0 or above and finite, not '1'"),
        ({1: 1.0}, 1, "max", "normalisation must be one of"),
        ({2: 1.0, 1: math.nan}, 1, "mean", "factors must be finite numbers, not nan as at"),
        ({1: -math.inf}, 0, "mean", "factors must be finite numbers, not -inf as at timestep 1"),
        ({1: "1"}, 1, "mean", "factors must be finite numbers, not '1' as at timestep 1"),
        ({}, 1, "mean", "factors must be given"),
        ({1: 0.0}, 1, "mean", "factors must be given"),
    ],
)
def test_weights_of_nothing_or_of_strange_powers_are_refused(
    factors, power, normalisation, message
):
    with pytest.raises(InputError, match=message):
        timestep_weights(factors, power, normalisation)
