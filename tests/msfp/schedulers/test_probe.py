"""The probe on every scheduler that diffusers has, against autograd and against algebra."""

import diffusers.schedulers
import numpy as np
import pytest
import torch
from diffusers import (
    CogVideoXDPMScheduler,
    DDIMScheduler,
    DDPMWuerstchenScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
    RePaintScheduler,
    UnCLIPScheduler,
    UniPCMultistepScheduler,
)
from diffusers.utils.import_utils import OptionalDependencyNotAvailable

from msfp import InputError, denoising_factors
from msfp.schedulers.closed_forms import FORMULAS, closed_form
from msfp.schedulers.denoising_factors import REFUSED
from msfp.schedulers.probe import model_calls, probe

# diffusers' own, of NumPy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")

SCHEDULERS = sorted(name for name in dir(diffusers.schedulers) if name.endswith("Scheduler"))
CONFIGS = {
    "HeliosDMDScheduler": {"stages": 1},
    "HeliosScheduler": {"stages": 1},
    "RFD4ProteinaScheduler": {
        "schedule_mode": "log",
        "noise_mode": "1/t",
        "tsr_k": 2.0,
        "tsr_sigma": 1.0,
    },
}
STEPS = {"ConsistencyDecoderScheduler": 2, "RFD4ProteinaScheduler": 30, "SCMScheduler": 2}
PLAIN = [
    "CMStochasticIterativeScheduler",
    "CogVideoXDDIMScheduler",
    "DDIMInverseScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepInverseScheduler",
    "EDMDPMSolverMultistepScheduler",
    "EDMEulerScheduler",
    "EulerAncestralDiscreteScheduler",
    "FlowMapEulerDiscreteScheduler",
    "FlowMatchHeunDiscreteScheduler",
    "FlowMatchLCMScheduler",
    "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LCMScheduler",
    "LMSDiscreteScheduler",
    "LTXEulerAncestralRFScheduler",
    "MiniMaxH3Scheduler",
    "SASolverScheduler",
    "TCDScheduler",
    "UniPCMultistepScheduler",
]


def fresh(name, **config):
    """Return a scheduler that clips nothing."""
    scheduler = getattr(diffusers.schedulers, name)(**CONFIGS.get(name, {}), **config)
    flags = [flag for flag in ("clip_sample", "clip_denoised") if flag in scheduler.config]
    scheduler.register_to_config(**dict.fromkeys(flags, False))
    return scheduler


def probed(scheduler, steps, target="next_sample", **arguments):
    scheduler.set_timesteps(steps)
    return [factor for _, factor in probe(scheduler, target, arguments)]


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_has_factors_or_a_reason(name):
    steps = STEPS.get(name, 6)
    if name in REFUSED:
        scheduler = object.__new__(getattr(diffusers.schedulers, name))
        with pytest.raises(InputError, match=f"{name} has none: .*{REFUSED[name]}"):
            denoising_factors(scheduler, steps)
        return
    try:
        scheduler = fresh(name)
    except (ImportError, OptionalDependencyNotAvailable) as error:
        pytest.skip(str(error))
    factors = denoising_factors(scheduler, steps)
    scheduler.set_timesteps(steps)
    assert list(factors) == list(dict.fromkeys(t.item() for t in model_calls(scheduler)))
    assert np.isfinite(list(factors.values())).all()
    assert sum(factor != 0 for factor in factors.values()) >= len(factors) - 1
    known = closed_form(scheduler, "next_sample", {}) is not None
    assert known == (type(scheduler) in FORMULAS)


@pytest.mark.parametrize("name", PLAIN)
def test_probe_agrees_with_autograd_through_the_untouched_float32_scheduler(name):
    steps = STEPS.get(name, 6)
    found = probed(fresh(name), steps)
    scheduler = fresh(name)
    scheduler.set_timesteps(steps)
    torch.manual_seed(3)
    for timestep, factor in zip(scheduler.timesteps, found, strict=True):
        sample = torch.randn(1, 3, 8, 8)
        output = torch.randn(1, 3, 8, 8, requires_grad=True)
        if hasattr(scheduler, "scale_model_input"):
            scheduler.scale_model_input(sample, timestep)
        following = scheduler.step(output, timestep, sample).prev_sample
        (gradient,) = torch.autograd.grad(following.sum(), output, retain_graph=True)
        torch.testing.assert_close(
            gradient, torch.full_like(gradient, factor), rtol=2e-3, atol=1e-6
        )


def test_factors_of_ancestral_euler_go_to_the_level_before_the_noise():
    scheduler = EulerAncestralDiscreteScheduler()
    factors = probed(scheduler, 6)
    sigmas = scheduler.sigmas.numpy()
    now, then = sigmas[:-1], sigmas[1:]
    np.testing.assert_allclose(factors, then**2 / now - now, rtol=1e-6)


@pytest.mark.parametrize("kind", [FlowMatchHeunDiscreteScheduler, HeunDiscreteScheduler])
def test_heun_moves_by_the_whole_step_and_then_corrects_by_half(kind):
    scheduler = kind()
    factors = probed(scheduler, 5)
    sigmas = scheduler.sigmas.double().numpy()
    steps = np.diff(np.unique(sigmas)[::-1])
    expected = np.stack([steps, steps / 2], axis=1).flatten()[: len(factors)]
    np.testing.assert_allclose(factors, expected, rtol=1e-6)


def test_churn_of_euler_is_probed_at_the_raised_level():
    scheduler = EulerDiscreteScheduler()
    scheduler.set_timesteps(5)
    sigmas = scheduler.sigmas.double().numpy()
    factors = denoising_factors(scheduler, 5, s_churn=1.0)
    expected = sigmas[1:] - sigmas[:-1] * (1 + 1.0 / 5)
    np.testing.assert_allclose(list(factors.values()), expected, rtol=1e-6)


def test_factors_of_lcm_are_those_of_its_boundary_condition():
    scheduler = LCMScheduler()
    factors = probed(scheduler, 4)
    times = scheduler.timesteps.numpy()
    bars = scheduler.alphas_cumprod.double().numpy()
    scaled = times * scheduler.config.timestep_scaling
    c_out = scaled / np.sqrt(scaled**2 + 0.5**2)
    x0 = -np.sqrt((1 - bars[times]) / bars[times]) * c_out
    expected = x0 * np.append(np.sqrt(bars[times[1:]]), 1.0)
    np.testing.assert_allclose(factors, expected, rtol=1e-6)


@pytest.mark.parametrize("kind", [UnCLIPScheduler, DDPMWuerstchenScheduler])
def test_ddpm_of_other_makes_steps_to_the_next_point_of_its_grid(kind):
    scheduler = fresh(kind.__name__)
    factors = probed(scheduler, 5)
    if kind is UnCLIPScheduler:
        bars = scheduler.alphas_cumprod[scheduler.timesteps].double().numpy()
    else:
        bars = scheduler._alpha_cumprod(scheduler.timesteps.double(), "cpu").numpy()
    a = bars[:-1] / bars[1:]
    expected = -(1 - a) / np.sqrt(a * (1 - bars[:-1]))
    np.testing.assert_allclose(factors[: len(expected)], expected, rtol=1e-5)


def test_repaint_has_the_factors_of_ddim_where_it_paints():
    found = denoising_factors(RePaintScheduler(clip_sample=False), 20)
    expected = denoising_factors(DDIMScheduler(clip_sample=False), 20)
    assert found == pytest.approx(expected, rel=1e-6)


def test_cogvideox_extrapolates_from_the_last_x0():
    """Its second-order SDE step: the first-order factor times 1 + 1 / (2 r)."""
    scheduler = CogVideoXDPMScheduler(clip_sample=False)
    factors = probed(scheduler, 5)
    bars = scheduler.alphas_cumprod[scheduler.timesteps].double().numpy()
    lambdas = np.log(bars / (1 - bars)) / 2
    h = np.diff(lambdas)
    first = np.sqrt(bars[1:]) * (1 - np.exp(-2 * h)) * -np.sqrt((1 - bars) / bars)[:-1]
    np.testing.assert_allclose(factors[0], first[0], rtol=1e-6)
    np.testing.assert_allclose(factors[1:-1], (first * (1 + np.append(0, h[1:] / h[:-1] / 2)))[1:])


def test_x0_of_a_probed_scheduler_is_what_its_step_returns():
    scheduler = EulerAncestralDiscreteScheduler()
    factors = probed(scheduler, 5, target="x0")
    np.testing.assert_allclose(factors, -scheduler.sigmas[:-1].double().numpy(), rtol=1e-9)


def test_x0_is_refused_where_the_step_does_not_return_it():
    with pytest.raises(InputError, match="UniPCMultistepScheduler does not return its x0"):
        denoising_factors(UniPCMultistepScheduler(), 5, target="x0")


class Bent(DDIMScheduler):
    """Clips without a flag in its config."""

    def step(self, model_output, timestep, sample, return_dict=True):
        return super().step(model_output.clamp(-1, 1), timestep, sample, return_dict=return_dict)


class Stretched(DDIMScheduler):
    """Affine at every single value, but each has its own slope."""

    def step(self, model_output, timestep, sample, return_dict=True):
        slopes = torch.linspace(1, 1.001, model_output.numel()).reshape(model_output.shape)
        return super().step(model_output * slopes, timestep, sample, return_dict=return_dict)


class Broken(DDIMScheduler):
    def step(self, **given):
        raise KeyError(f"nothing for {len(given)}")


@pytest.mark.parametrize("kind", [Bent, Stretched])
def test_steps_that_are_not_affine_are_refused_at_their_timestep(kind):
    with pytest.raises(InputError, match=f"affinely.*{kind.__name__} does not at timestep 800"):
        denoising_factors(kind(clip_sample=False), 5)


def test_steps_that_cannot_be_called_say_why():
    with pytest.raises(InputError, match=r"Broken\.step cannot be called .*800: 'nothing for 3'"):
        denoising_factors(Broken(), 5, clipping="ignore")
