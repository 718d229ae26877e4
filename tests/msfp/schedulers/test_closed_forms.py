"""Every formula against the probe of the scheduler's own step, and against independent algebra."""

import copy
import itertools

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMParallelScheduler,
    DDIMScheduler,
    DDPMParallelScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
)

from msfp import InputError, denoising_factors
from msfp.schedulers.closed_forms import FORMULAS, closed_form
from msfp.schedulers.probe import probe

# diffusers' own, of NumPy 2 and of algorithms that it will drop.
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*algorithm_type:FutureWarning"),
]

PREDICTIONS = ("epsilon", "v_prediction", "sample")


def product(**choices):
    """Return a dictionary for each combination of choices."""
    return [dict(zip(choices, each, strict=True)) for each in itertools.product(*choices.values())]


def both(scheduler, steps, target="next_sample", **arguments):
    """Return the factors of all model calls by formula and by probe, as two arrays."""
    scheduler = copy.deepcopy(scheduler)
    scheduler.set_timesteps(steps)
    formula = closed_form(scheduler, target, arguments)
    measured = probe(scheduler, target, arguments)
    assert [t for t, _ in formula] == [t for t, _ in measured]
    return np.array([f for _, f in formula]), np.array([f for _, f in measured])


def assert_agree(scheduler, steps, target="next_sample", **arguments):
    formula, measured = both(scheduler, steps, target, **arguments)
    assert np.isfinite(formula).all()
    np.testing.assert_allclose(formula, measured, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize(
    "config",
    [
        *product(prediction_type=PREDICTIONS, timestep_spacing=("leading", "trailing", "linspace")),
        {"variance_type": "learned_range"},
        {"variance_type": "fixed_large"},
        {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
    ],
)
def test_formula_of_ddpm_agrees_with_its_step(config):
    for target in ("next_sample", "x0"):
        assert_agree(DDPMScheduler(clip_sample=False, **config), 7, target)


@pytest.mark.parametrize("kind", [DDPMParallelScheduler, DDIMParallelScheduler])
def test_formulas_hold_for_the_parallel_twins(kind):
    for prediction in PREDICTIONS:
        assert_agree(kind(clip_sample=False, prediction_type=prediction), 7)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(
    "config",
    [
        *product(
            prediction_type=PREDICTIONS,
            timestep_spacing=("leading", "trailing"),
            set_alpha_to_one=(True, False),
        ),
        {
            "prediction_type": "v_prediction",
            "timestep_spacing": "trailing",
            "rescale_betas_zero_snr": True,
        },
    ],
)
def test_formula_of_ddim_agrees_with_its_step_at_any_eta(eta, config):
    for target in ("next_sample", "x0"):
        assert_agree(DDIMScheduler(clip_sample=False, **config), 7, target, eta=eta)


def test_formula_and_probe_agree_where_steps_are_so_small_that_their_terms_cancel():
    assert_agree(DDIMScheduler(clip_sample=False), 500)


@pytest.mark.parametrize(
    "config",
    product(
        prediction_type=("epsilon", "v_prediction"),
        skip_prk_steps=(True, False),
        set_alpha_to_one=(True, False),
        timestep_spacing=("leading", "trailing"),
    ),
)
def test_formula_of_pndm_agrees_with_its_step_on_runge_kutta_and_multistep_calls(config):
    assert_agree(PNDMScheduler(**config), 9)


MULTISTEP = [
    config
    for config in product(
        algorithm_type=("dpmsolver++", "sde-dpmsolver++", "dpmsolver", "sde-dpmsolver"),
        solver_order=(1, 2, 3),
        solver_type=("midpoint", "heun"),
        prediction_type=(*PREDICTIONS, "flow_prediction"),
    )
    if (config["algorithm_type"], config["solver_order"]) != ("sde-dpmsolver", 3)
    and (config["algorithm_type"].endswith("++") or config["prediction_type"] != "flow_prediction")
]


@pytest.mark.parametrize(
    "config", MULTISTEP, ids=lambda config: "-".join(map(str, config.values()))
)
def test_formula_of_multistep_dpm_solver_agrees_with_its_step(config):
    assert_agree(DPMSolverMultistepScheduler(final_sigmas_type="sigma_min", **config), 6)


@pytest.mark.parametrize("steps", [1, 3, 16])
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize(
    "config",
    [
        {},
        {"euler_at_final": True, "final_sigmas_type": "sigma_min"},
        {"lower_order_final": False, "final_sigmas_type": "sigma_min"},
        {"final_sigmas_type": "sigma_min"},
        {"use_karras_sigmas": True},
        {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0},
        {
            "timestep_spacing": "trailing",
            "rescale_betas_zero_snr": True,
            "variance_type": "learned_range",
        },
    ],
)
def test_formula_of_multistep_dpm_solver_knows_its_ends_and_its_grids(steps, order, config):
    assert_agree(DPMSolverMultistepScheduler(solver_order=order, **config), steps)


@pytest.mark.parametrize(
    "config",
    [config for config in MULTISTEP if config["algorithm_type"] != "sde-dpmsolver"],
    ids=lambda config: "-".join(map(str, config.values())),
)
def test_formula_of_singlestep_dpm_solver_agrees_with_its_step(config):
    assert_agree(DPMSolverSinglestepScheduler(final_sigmas_type="sigma_min", **config), 6)


@pytest.mark.parametrize("steps", [2, 3, 8])
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("config", [{}, {"lower_order_final": True}, {"use_karras_sigmas": True}])
def test_formula_of_singlestep_dpm_solver_knows_its_ends_and_its_grids(steps, order, config):
    assert_agree(DPMSolverSinglestepScheduler(solver_order=order, **config), steps)


@pytest.mark.parametrize(
    "config",
    [
        *product(
            prediction_type=PREDICTIONS,
            interpolation_type=("linear", "log_linear"),
            use_karras_sigmas=(False, True),
            final_sigmas_type=("zero", "sigma_min"),
        ),
        *product(
            interpolation_type=("linear", "log_linear"),
            timestep_spacing=("leading", "trailing"),
            beta_schedule=("scaled_linear", "squaredcos_cap_v2"),
            steps_offset=(0, 1),
        ),
        *product(
            interpolation_type=("linear", "log_linear"),
            prediction_type=("v_prediction",),
            timestep_type=("continuous",),
        ),
        {"interpolation_type": "log_linear", "use_exponential_sigmas": True},
        {"interpolation_type": "log_linear", "use_beta_sigmas": True},
        {"interpolation_type": "log_linear", "rescale_betas_zero_snr": True},
    ],
)
def test_formula_of_euler_agrees_with_its_step(config):
    for target in ("next_sample", "x0"):
        assert_agree(EulerDiscreteScheduler(**config), 7, target)


@pytest.mark.parametrize(
    "config",
    [{}, {"shift": 3.0}, {"invert_sigmas": True}, {"stochastic_sampling": True, "shift": 3.0}],
)
def test_formula_of_flow_matching_agrees_with_its_step(config):
    assert_agree(FlowMatchEulerDiscreteScheduler(**config), 7)


def test_factors_of_ddpm_and_ddim_are_those_of_the_page():
    """The formulas of the table in docs/denoising-factors.md, with alpha, s and their primes."""
    steps, stride = 10, 100
    bars = DDIMScheduler().alphas_cumprod.double().numpy()
    times = np.arange(900, 0, -stride)
    alpha, s = bars[times] ** 0.5, (1 - bars[times]) ** 0.5
    next_alpha, next_s = bars[times - stride] ** 0.5, (1 - bars[times - stride]) ** 0.5
    a = (alpha / next_alpha) ** 2
    expected = {
        (DDPMScheduler, "epsilon"): -(1 - a) / (a**0.5 * s),
        (DDPMScheduler, "v_prediction"): -next_alpha * (1 - a) / s,
        (DDPMScheduler, "sample"): next_alpha * (1 - a) / s**2,
        (DDIMScheduler, "epsilon"): next_s - next_alpha * s / alpha,
        (DDIMScheduler, "v_prediction"): alpha * next_s - next_alpha * s,
        (DDIMScheduler, "sample"): next_alpha - next_s * alpha / s,
    }
    for (kind, prediction), factors in expected.items():
        scheduler = kind(clip_sample=False, prediction_type=prediction)
        found = list(denoising_factors(scheduler, steps).values())[:-1]
        np.testing.assert_allclose(found, factors, rtol=1e-9)


def test_second_order_steps_have_the_factor_of_their_extrapolation():
    """DPM-Solver++ 2M multiplies the first-order factor by 1 + h / (2 h_prev)."""
    first = DPMSolverMultistepScheduler(solver_order=1, final_sigmas_type="sigma_min")
    second = DPMSolverMultistepScheduler(solver_order=2, final_sigmas_type="sigma_min")
    second.set_timesteps(10)
    h = -second.sigmas.double().log().diff().numpy()
    one = np.array(list(denoising_factors(first, 10).values()))
    two = np.array(list(denoising_factors(second, 10).values()))
    np.testing.assert_allclose(two[1:-1] / one[1:-1], (1 + h[1:] / (2 * h[:-1]))[:-1], rtol=1e-9)
    assert two[[0, -1]] == pytest.approx(one[[0, -1]])


def test_plms_multiplies_the_factor_of_ddim_by_its_latest_weight():
    scheduler = PNDMScheduler(skip_prk_steps=True)
    scheduler.set_timesteps(10)
    plms = np.array([factor for _, factor in closed_form(scheduler, "next_sample", {})])
    ddim = denoising_factors(DDIMScheduler(clip_sample=False, set_alpha_to_one=False), 10)
    ddim = np.array(list(ddim.values()))[:-1]  # the last step of both stays where it is
    weights = plms[[0, *range(2, 10)]] / ddim
    np.testing.assert_allclose(weights, [1, 3 / 2, 23 / 12] + [55 / 24] * 6, rtol=1e-9)
    assert plms[1] / ddim[0] == pytest.approx(1 / 2)


def test_flow_matching_without_shift_has_one_factor_but_for_the_last_step():
    factors = list(denoising_factors(FlowMatchEulerDiscreteScheduler(), 10).values())
    assert factors[:-1] == pytest.approx([-0.111] * 9, rel=1e-5)
    assert factors[-1] == pytest.approx(-0.001, rel=1e-5)


@pytest.mark.parametrize("prediction", [*PREDICTIONS, "flow_prediction"])
@pytest.mark.parametrize("kind", [DPMSolverMultistepScheduler, DPMSolverSinglestepScheduler])
def test_x0_of_dpm_solver_is_the_one_its_conversion_makes(kind, prediction):
    scheduler = kind(prediction_type=prediction)
    factors = denoising_factors(scheduler, 5, target="x0")
    scheduler.set_timesteps(5)
    zero, one = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    for call, timestep in enumerate(scheduler.timesteps):
        scheduler._step_index = call
        slope = scheduler.convert_model_output(one, sample=zero).item()
        assert factors[timestep.item()] == pytest.approx(slope, rel=1e-5)


def test_x0_of_pndm_is_that_of_ddim():
    plms = denoising_factors(PNDMScheduler(skip_prk_steps=True), 10, target="x0")
    ddim = denoising_factors(DDIMScheduler(clip_sample=False), 10, target="x0")
    assert plms == pytest.approx(ddim)


@pytest.mark.parametrize("config", [{"shift": 3.0}, {"invert_sigmas": True}])
def test_x0_of_flow_matching_is_one_euler_step_to_the_end(config):
    scheduler = FlowMatchEulerDiscreteScheduler(**config)
    factors = list(denoising_factors(scheduler, 5, target="x0").values())
    scheduler.set_timesteps(5)
    np.testing.assert_allclose(factors, scheduler.sigmas[-1] - scheduler.sigmas[:-1], rtol=1e-6)


def test_subclasses_and_unknown_arguments_have_no_formula():
    class Mine(DDIMScheduler):
        pass

    for scheduler, arguments in (
        (Mine(), {}),
        (EulerDiscreteScheduler(), {"s_churn": 1.0}),
        (DDIMScheduler(), {"use_clipped_model_output": True}),
    ):
        scheduler.set_timesteps(3)
        assert closed_form(scheduler, "next_sample", arguments) is None
    assert DDIMScheduler in FORMULAS


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (DDIMScheduler(clip_sample=False, prediction_type="flow"), "prediction_type"),
        (PNDMScheduler(prediction_type="sample "), "prediction_type"),
        (
            DPMSolverMultistepScheduler(
                algorithm_type="sde-dpmsolver", solver_order=3, final_sigmas_type="sigma_min"
            ),
            "solver_order must be 1 or 2",
        ),
        (
            DPMSolverMultistepScheduler(
                algorithm_type="dpmsolver",
                final_sigmas_type="sigma_min",
                prediction_type="flow_prediction",
            ),
            "prediction_type",
        ),
    ],
)
def test_what_the_scheduler_cannot_do_is_refused(scheduler, message):
    with pytest.raises(InputError, match=message):
        denoising_factors(scheduler, 5)
