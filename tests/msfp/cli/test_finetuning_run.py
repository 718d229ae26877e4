import copy
import dataclasses

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, FlowMatchEulerDiscreteScheduler
from families import make, pipeline

import msfp
from msfp import FinetuneConfig, InputError, QuantizationConfig, Sampler
from msfp.cli.finetuning_run import Extent, FinetuningRun, ablation
from msfp.pipelines.denoiser import denoiser_of
from msfp.support.progress import no_progress

STEPS = 4
EXTENT = Extent(2, 2, seed=0)


def embedded(prompt, **_):
    """Embeddings of as many prompts, and no positions of their words."""
    draw = torch.Generator().manual_seed(0)
    words = torch.randn(1, 5, 8, generator=draw).expand(len(prompt), -1, -1)
    return words, words[:, 0], torch.zeros(5, 3)


def flux(folder, **scheduling):
    pipe = pipeline("flux", folder)
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(**scheduling)
    pipe.default_sample_size, pipe.encode_prompt = 8, embedded
    return pipe


def run_of(pipe, sampler, config=None, progress=no_progress):
    """With weights of 4 bits, which take no calibration."""
    packed = copy.deepcopy(pipe)
    denoiser = denoiser_of(packed)
    msfp.quantize(denoiser, QuantizationConfig(activation_bits=None, end_bits=4, refine=None))
    msfp.pack(denoiser)
    return FinetuningRun(pipe, packed, sampler, EXTENT, config, progress=progress)


@pytest.mark.parametrize("dynamic", [False, True])
def test_factors_are_those_of_the_grid_that_the_pipeline_set(dynamic, tmp_path):
    sampler = Sampler(STEPS, 2, ("a",))
    pipe = flux(tmp_path, use_dynamic_shifting=dynamic)
    config = FinetuneConfig(steps=1, batch=4, rank=2, dfa_power=1.0)
    run = run_of(pipe, sampler, config)
    sigmas = run.path.timesteps.tolist()
    assert sigmas[0] == 1.0
    assert (sigmas != [1.0, 0.75, 0.5, 0.25]) == dynamic
    steps = [after - before for before, after in zip(sigmas, [*sigmas[1:], 0.0], strict=True)]
    assert list(run.factors) == sigmas
    assert list(run.factors.values()) == pytest.approx(steps)
    row = run.measured("quantized", run.quantized)
    moved = [error * step**2 for error, step in zip(row.errors, steps, strict=True)]
    assert row.step_errors == pytest.approx(moved)
    _, history, _ = run.finetuned(config)
    assert len(history.losses) == 1


def no_stage(*told):
    raise AssertionError(told)


class Squaring(DDPMScheduler):
    """Has no factors: its step is not affine in the model output."""

    def step(self, model_output, *args, **kwargs):
        return super().step(model_output**2, *args, **kwargs)


def unsteady():
    return DDPMPipeline(make("unet"), Squaring())


def test_what_has_no_factors_is_measured_but_for_its_next_sample():
    run = run_of(unsteady(), Sampler(2, 2), FinetuneConfig())
    assert run.factors is None
    assert run.measured("quantized", run.quantized).cells()[2] == ""


ALL = dict.fromkeys((field.name for field in dataclasses.fields(msfp.LearningRates)), 0.0)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"dfa_power": 1.0}, r"dfa_power must be 0, not 1\.0: .*Squaring does not at timestep"),
        ({"rates": ALL, "hub": 2}, "at least one rate must be above 0"),
        ({"rates": ALL | {"router": 0.1}}, "at least one rate must be above 0"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_anything_is_recorded(config, message):
    with pytest.raises(InputError, match=message):
        run_of(unsteady(), Sampler(2, 2), FinetuneConfig(**config), no_stage)


def test_a_denoiser_that_cannot_save_memory_is_refused_before_anything_is_recorded(
    monkeypatch, tmp_path
):
    pipe = pipeline("unet", tmp_path)
    monkeypatch.setattr(type(pipe.unet), "_supports_gradient_checkpointing", False)
    with pytest.raises(InputError, match="checkpointing must be False: UNet2DModel does not"):
        run_of(pipe, Sampler(2, 2), FinetuneConfig(checkpointing=True), no_stage)


def test_timesteps_that_are_not_the_samplers_have_no_factors(monkeypatch, tmp_path):
    pipe = pipeline("unet", tmp_path)
    monkeypatch.setattr(
        "msfp.cli.finetuning_run.denoising_factors", lambda *_, **__: {3.0: -1.0, 2.0: -1.0}
    )
    assert run_of(pipe, Sampler(2, 2)).factors is None
    with pytest.raises(
        InputError,
        match=r"dfa_power must be 0, not 2\.0: the denoiser is given the timesteps \[501",
    ):
        run_of(pipe, Sampler(2, 2), FinetuneConfig(dfa_power=2.0))


def test_the_ablation_leaves_out_what_would_train_nothing():
    frozen = dict.fromkeys(("weight_scales", "input_scales", "biases", "norms"), 0.0)
    config = FinetuneConfig(hub=2, rates=frozen)
    assert [name for name, _ in ablation(config)] == ["single LoRA"]
