import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
)

from msfp import InputError, denoising_factors, timestep_weights

STEPS = 10


def ddim_closed_form(scheduler, prediction):
    """d(next)/d(output) of DDIM with eta = 0, written from its update rule."""
    scheduler.set_timesteps(STEPS)
    times = scheduler.timesteps.tolist()
    bars = scheduler.alphas_cumprod.double()
    stride = scheduler.config.num_train_timesteps // STEPS
    factors = {}
    for t in times:
        bar = bars[t]
        following = bars[t - stride] if t >= stride else scheduler.final_alpha_cumprod.double()
        alpha, s, alpha_next, s_next = (
            bar**0.5,
            (1 - bar) ** 0.5,
            following**0.5,
            (1 - following) ** 0.5,
        )
        factors[t] = {
            "epsilon": s_next - alpha_next * s / alpha,
            "v_prediction": alpha * s_next - alpha_next * s,
            "sample": alpha_next - s_next * alpha / s,
        }[prediction].item()
    return factors


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_factors_of_ddim_are_its_closed_form(prediction, spacing):
    scheduler = DDIMScheduler(
        clip_sample=False, prediction_type=prediction, timestep_spacing=spacing
    )
    expected = ddim_closed_form(scheduler, prediction)
    assert denoising_factors(scheduler, STEPS) == pytest.approx(expected, rel=1e-6)


def test_factors_of_ddpm_are_those_of_its_posterior_mean():
    scheduler = DDPMScheduler(clip_sample=False)
    scheduler.set_timesteps(STEPS)
    bars, stride = scheduler.alphas_cumprod.double(), 1000 // STEPS
    expected = {}
    for t in scheduler.timesteps.tolist():
        following = bars[t - stride] if t >= stride else torch.tensor(1.0, dtype=torch.float64)
        a = bars[t] / following
        expected[t] = (-(1 - a) / (a**0.5 * (1 - bars[t]) ** 0.5)).item()
    assert denoising_factors(scheduler, STEPS) == pytest.approx(expected, rel=1e-5)


def test_factors_of_euler_are_the_differences_of_its_noise_levels():
    scheduler = EulerDiscreteScheduler()
    scheduler.set_timesteps(STEPS)
    sigmas = scheduler.sigmas.double()
    expected = (sigmas[1:] - sigmas[:-1]).tolist()
    assert list(denoising_factors(scheduler, STEPS).values()) == pytest.approx(expected, rel=1e-5)


def test_second_order_steps_have_the_factor_of_their_extrapolation():
    """DPM-Solver++ 2M multiplies the first-order factor by 1 + h / (2 h_prev)."""
    first = DPMSolverMultistepScheduler(solver_order=1, final_sigmas_type="sigma_min")
    second = DPMSolverMultistepScheduler(solver_order=2, final_sigmas_type="sigma_min")
    second.set_timesteps(STEPS)
    sigmas = second.sigmas.double()
    steps = -sigmas.log().diff()
    one, two = denoising_factors(first, STEPS), denoising_factors(second, STEPS)
    times = list(two)
    assert two[times[0]] == pytest.approx(one[times[0]], rel=1e-6)
    for i in range(1, STEPS - 1):
        ratio = 1 + (steps[i] / (2 * steps[i - 1])).item()
        assert two[times[i]] / one[times[i]] == pytest.approx(ratio, rel=1e-4)


def test_multistep_samplers_of_the_pndm_kind_are_measured_with_their_history():
    plms = denoising_factors(PNDMScheduler(skip_prk_steps=True), STEPS)
    ddim = denoising_factors(DDIMScheduler(clip_sample=False, set_alpha_to_one=False), STEPS)
    assert plms[700] / ddim[700] == pytest.approx(23 / 12, rel=1e-5)
    assert plms[300] / ddim[300] == pytest.approx(55 / 24, rel=1e-5)


def test_clipping_samplers_are_refused_with_the_option_to_turn_off():
    with pytest.raises(InputError, match="clip_sample"):
        denoising_factors(DDIMScheduler(clip_sample=True), STEPS)


def test_measuring_changes_neither_the_scheduler_nor_the_random_state():
    scheduler = DDPMScheduler(clip_sample=False)
    before, state = dict(scheduler.__dict__), torch.get_rng_state()
    denoising_factors(scheduler, STEPS)
    assert scheduler.__dict__.keys() == before.keys()
    assert scheduler.num_inference_steps == before["num_inference_steps"]
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("power", [0.0, 1.0, 2.0])
def test_weights_have_mean_one_and_the_ratio_of_the_powers(power):
    weights = timestep_weights({9: -4.0, 5: 2.0, 0: 1.0}, power)
    assert sum(weights.values()) / 3 == pytest.approx(1)
    assert weights[9] / weights[0] == pytest.approx(4**power)
