import copy
import json
from dataclasses import replace

import pytest
import torch
from accelerate import DistributedType
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import SAMPLER, SHORT, tuned

from msfp import (
    FinetuneConfig,
    InputError,
    QuantizationConfig,
    denoising_factors,
    finetune,
    quantize,
    record_trajectories,
)
from msfp.support.container import KEY


def refused(student, path, message, config=None, **more):
    before = copy.deepcopy(student.unet.state_dict())
    with pytest.raises(InputError, match=message):
        finetune(student.unet, config or FinetuneConfig(**SHORT), trajectories=path, **more)
    after = student.unet.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], value) for name, value in after.items())


def test_what_cannot_work_is_refused_before_anything_is_changed(full, student, path, tmp_path):
    power = FinetuneConfig(**SHORT, dfa_power=1.0)
    factors = denoising_factors(full.scheduler, 5)
    refused(student, path, "factors must be given for every recorded timestep", power)
    refused(student, path, "with the sampler and step count", power, factors=factors)
    evaluated = FinetuneConfig(**SHORT, evaluate_every=2)
    refused(student, path, "held_out must be given", evaluated)
    other = record_trajectories(full, calls=replace(SAMPLER, steps=2).calls(4, seed=0))
    refused(student, path, "held_out must have been recorded with", evaluated, held_out=other)
    double = replace(path, samples=path.samples.repeat(1, 1, 2, 1, 1))
    refused(student, path, "held_out must be recorded from a", evaluated, held_out=double)
    nan = replace(path, predictions=path.predictions.clone())
    nan.predictions[1, 2] = torch.nan
    refused(student, nan, "trajectories must have finite predictions")
    frozen = dict.fromkeys(("adapters", "weight_scales", "input_scales", "biases", "norms"), 0)
    nothing = FinetuneConfig(**SHORT, rates=frozen)  # but a router that a hub of 1 does not have
    refused(student, path, "at least one rate must be above 0", nothing)
    segments = FinetuneConfig(**SHORT, hub=5, routing="segments")
    refused(student, path, "hub must be at most 4 where routing is by segments", segments)
    refused(student, path, "precision must be 'no'", FinetuneConfig(**SHORT, precision="fp16"))
    network = torch.nn.Sequential(student.unet.mid_block.resnets[0].conv1)
    with pytest.raises(InputError, match="checkpointing must be False: Sequential does not"):
        finetune(network, FinetuneConfig(**SHORT, checkpointing=True), trajectories=path)
    wide = replace(path, samples=path.samples.repeat(1, 1, 2, 1, 1))
    refused(student, wide, "must be recorded from a denoiser like this one")
    small = replace(path, predictions=path.predictions[..., :4])
    shapes = r"have shape \(1, 8, 4\), this denoiser's have shape \(1, 8, 8\)"
    refused(student, small, shapes)
    nowhere = tmp_path / "absent" / "state.safetensors"
    refused(student, path, "absent is not a folder to write in", state=nowhere)
    refused(student, path, "there is no state to resume from", state=tmp_path / "s", resume=True)
    refused(student, path, "resume needs state, the file to resume from", resume=True)
    (tmp_path / "old").write_text("")
    refused(student, path, "tensorboard .*old must be a folder", tensorboard=tmp_path / "old")
    refused(student, path, "holds the state of a run: give resume=True", state=tmp_path / "old")


def test_arguments_of_other_types_are_refused_by_their_names(student, path):
    with pytest.raises(InputError, match="config must be of the type FinetuneConfig, not Traject"):
        finetune(student, path, trajectories=path)
    with pytest.raises(InputError, match="trajectories must be of the type Trajectories, not list"):
        finetune(student, trajectories=[path])


def other_weights(pipe):
    """A copy of a pipeline, quantized or not, with other weights."""
    other = copy.deepcopy(pipe)
    for name, value in other.unet.named_parameters():
        if name.endswith("conv1.weight"):
            value.data *= 1.5
    return other


def test_trajectories_of_another_model_are_refused(full, student, path):
    own = record_trajectories(other_weights(full), calls=SAMPLER.calls(8, seed=5))
    refused(student, own, r"trajectories must have been recorded from the teacher.* \d+\.\d % off")
    config = FinetuneConfig(**SHORT, evaluate_every=2)
    refused(student, path, "held_out must have been recorded from", config, held_out=own)


def test_a_refined_denoiser_takes_its_own_trajectories_and_not_just_any(full, path):
    """It does not hold the full-precision weights any more."""
    pipe = copy.deepcopy(full)
    quantize(pipe, QuantizationConfig(refine={"samples": 8}), calibration=SAMPLER.calls(4, seed=1))
    negative = replace(path, predictions=-path.predictions)
    refused(pipe, negative, "trajectories must have been recorded from the teacher")
    computed = FinetuneConfig(**SHORT, cache_teacher=False)
    refused(pipe, path, "trajectories must have been recorded from the teacher", computed)
    _, history = tuned(pipe, path, FinetuneConfig(**SHORT))
    assert len(history.losses) == 6


def test_the_state_of_a_run_with_other_inputs_is_refused_by_the_input(
    full, student, path, held_out, tmp_path
):
    file = tmp_path / "state.safetensors"
    config = FinetuneConfig(**SHORT, evaluate_every=3, dfa_power=1.0)
    factors = denoising_factors(full.scheduler, 4)
    given = {"held_out": held_out, "factors": factors}
    _, history = tuned(student, path, config, state=file, **given)
    by_other_kernels = replace(path, predictions=path.predictions * (1 + 1e-4))
    _, resumed = tuned(student, by_other_kernels, config, state=file, resume=True, **given)
    assert resumed == history

    def differs(message, path=path, student=student, **more):
        message = f"is a state of fine-tuning of another run: its {message}"
        refused(student, path, message, config, state=file, resume=True, **given | more)

    differs("trajectories differ", record_trajectories(full, calls=SAMPLER.calls(8, seed=6)))
    more = record_trajectories(full, calls=SAMPLER.calls(8, seed=77))
    differs("held-out rows is 4, not 8", held_out=more)
    other = record_trajectories(full, calls=SAMPLER.calls(4, seed=78))
    differs("trajectories held out differ", held_out=other)
    differs("loss weights is", factors=factors | {0: 1.0})
    changed = other_weights(student)
    differs("weights is", student=changed)
    scaled = copy.deepcopy(student)
    scaled.unet.conv_in.weight_quantizer.scale.data *= 1.01
    differs("weights is", student=scaled)


def test_a_state_that_does_not_say_its_trajectories_is_refused(student, path, tmp_path):
    """As one that an earlier version than 0.2.0 wrote."""
    file = tmp_path / "state.safetensors"
    config = FinetuneConfig(**SHORT)
    tuned(student, path, config, state=file)
    with safe_open(file, framework="pt") as opened:
        description = json.loads(opened.metadata()[KEY])
    del description["fingerprint"]["trajectories"]
    save_file(load_file(file), file, metadata={KEY: json.dumps(description)})
    message = "it has no trajectories; this run has a list of 64$"
    refused(student, path, message, config, state=file, resume=True)


def test_the_state_of_another_run_is_refused_by_what_differs(student, path, tmp_path):
    file = tmp_path / "state.safetensors"
    tuned(student, path, FinetuneConfig(**SHORT), state=file)
    wide = FinetuneConfig(**SHORT | {"rank": 3})
    refused(
        student,
        path,
        "state of fine-tuning of another run: its rank is 2",
        wide,
        state=file,
        resume=True,
    )
    other = copy.deepcopy(student)
    layer = other.unet.mid_block.resnets[0].conv1
    layer.input_quantizer = None
    name = "layer mid_block.resnets.0.conv1"
    refused(
        other,
        path,
        f"its {name} is weight=E1M2, input=E2M2U",
        FinetuneConfig(**SHORT),
        state=file,
        resume=True,
    )
    file.write_bytes(b"something else")
    refused(student, path, "cannot be read as a state of fine-tuning", state=file, resume=True)


def test_a_state_is_that_of_the_same_run_whether_weights_are_shared_out_or_not(
    student, path, tmp_path
):
    file = tmp_path / "state.safetensors"
    config = FinetuneConfig(**SHORT)
    _, history = tuned(student, path, config, state=file)
    _, resumed = tuned(student, path, replace(config, shard=True), state=file, resume=True)
    assert resumed.losses == history.losses


@pytest.mark.parametrize("wrapper", ["FSDP", "DEEPSPEED", "MEGATRON_LM"])
def test_launches_that_wrap_the_denoiser_are_refused(student, path, monkeypatch, wrapper):
    found = property(lambda _self: DistributedType[wrapper])
    monkeypatch.setattr("accelerate.Accelerator.distributed_type", found)
    refused(student, path, f"launched without {wrapper}, which wraps what is trained")


def test_logs_without_tensorboard_are_refused(student, path, tmp_path, monkeypatch):
    monkeypatch.setattr("msfp.training.processes.is_tensorboard_available", lambda: False)
    refused(student, path, "tensorboard must be installed", tensorboard=tmp_path)
