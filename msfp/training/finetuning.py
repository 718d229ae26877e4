"""Fine-tuning a quantized denoiser: the checks before, and the packing after."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from torch import nn

from msfp.checkpoint.diffusers_quantizer import attach_again
from msfp.errors import InputError
from msfp.layers.block import refuse_block_layers
from msfp.layers.lora.talora import routing_of
from msfp.layers.trainable import untrained_layers
from msfp.pipelines.denoiser import denoiser_of
from msfp.pipelines.trajectories import Trajectories
from msfp.ptq.quantization import pack
from msfp.support.checks import check_factors, check_path, check_type
from msfp.support.container import check_fingerprint
from msfp.support.files import check_folder
from msfp.support.progress import Progress, shown_progress
from msfp.training.config import FinetuneConfig
from msfp.training.fingerprint import run_fingerprint
from msfp.training.objective import Objective, loss_weights
from msfp.training.parameters import add_hubs, check_rates
from msfp.training.processes import accelerator
from msfp.training.state import STATE, History
from msfp.training.teacher import Teacher
from msfp.training.trainer import Trainer, TrainingInputs

MAX_TEACHER_ERROR = 0.02
"""Largest relative difference of predictions from recorded ones: the rounding of bfloat16."""
CHECKED = 4
"""Number of timesteps at which full-precision predictions are compared with recorded ones."""


def finetune(
    model: DiffusionPipeline | nn.Module,
    config: FinetuneConfig | None = None,
    *,
    trajectories: Trajectories,
    factors: dict[float, float] | None = None,
    held_out: Trajectories | None = None,
    original: DiffusionPipeline | nn.Module | None = None,
    state: str | Path | None = None,
    resume: bool = False,
    tensorboard: str | Path | None = None,
    progress: Progress = shown_progress,
) -> History:
    """Train a quantized denoiser towards recorded predictions and pack it, in place.

    Each step lowers `w(t) * ||prediction - quantized prediction||^2` over a batch of recorded
    noisy samples, where w are the `timestep_weights` of the denoising factors. For guided samples,
    the loss is that of the guided prediction, plus a share of the loss of each guidance branch. The
    LoRAs and the router are trained. The scales and zero points (LSQ, Esser et al., ICLR 2020),
    biases and norms are trained with small learning rates.

    Args:
        model: A pipeline or its denoiser, quantized by `quantize` or unpacked by `unpack`.
        config: What is trained and how; None for the defaults.
        trajectories: Recorded from the full-precision denoiser.
        factors: The sampler's `denoising_factors`; needed unless `dfa_power` is 0.
        held_out: Other trajectories of the same sampler, to measure the error on.
        original: The full-precision denoiser, or a pipeline with it. Needed if the trainable
            denoiser no longer holds the full-precision weights. None after `quantize`.
        state: A safetensors file to save the state to from time to time.
        resume: Whether to resume from that file.
        tensorboard: A folder for the logs of TensorBoard.
        progress: Called after each step.

    Returns:
        The losses and held-out errors.

    Raises:
        InputError: If the denoiser has no trainable quantized layer, something that the config
            needs is missing, nothing is to be trained, the trajectories or factors are of another
            denoiser or sampler, or the state cannot be written or is of another run. These errors
            are raised before anything is changed. Also if the loss or a held-out error is not
            finite.
    """
    denoiser = denoiser_of(model)
    config = FinetuneConfig() if config is None else config
    check_type("config", config, FinetuneConfig)
    check_type("trajectories", trajectories, Trajectories)
    if held_out is not None:
        check_type("held_out", held_out, Trajectories)
    if factors is not None:
        check_factors(factors)
    refuse_block_layers(denoiser)
    untrained_layers(denoiser)
    weights = loss_weights(trajectories.timesteps, factors, config.dfa_power)
    objective = Objective(weights, config.guidance_branches, config.guidance_rows)
    state = None if state is None else check_path("state", state)
    tensorboard = None if tensorboard is None else check_path("tensorboard", tensorboard)
    _check_state(state, resume=resume)
    if tensorboard is not None:
        check_folder("tensorboard", tensorboard)
    check_checkpointing(denoiser, config)
    if config.evaluate_every and held_out is None:
        raise InputError("held_out must be given where evaluate_every is above 0")
    _check_choices(denoiser, config, trajectories.timesteps)
    fingerprint = {}
    if state is not None:
        fingerprint = run_fingerprint(denoiser, trajectories, config, weights, held_out)
        if resume:
            check_fingerprint(state, STATE, fingerprint)
    teacher = Teacher(denoiser, None if original is None else denoiser_of(original, "original"))
    exact = not config.cache_teacher
    _check_trajectories(teacher, objective, trajectories, held_out, exact=exact)
    inputs = TrainingInputs(
        trajectories, objective, teacher, held_out, state, tensorboard, fingerprint,
    )  # fmt: skip
    # Created before the denoiser is changed, because it can refuse the precision or the logs.
    processes = accelerator(
        trajectories.samples.device, config.precision, inputs.tensorboard
    ).num_processes
    add_hubs(denoiser, config, trajectories.timesteps)
    if config.shard and processes > 1:
        teacher.shard()
    trainer = Trainer(denoiser, inputs, config)
    if resume:
        trainer.resume()
    history = trainer.run(progress)
    routing = routing_of(denoiser)
    if routing is not None:
        routing.clear()
    pack(denoiser)
    attach_again(denoiser)  # the measured error was that before training
    denoiser.requires_grad_(False)
    return history


def _check_state(file: Path | None, *, resume: bool) -> None:
    """Raise InputError unless the state can be written without overwriting another one."""
    if file is None:
        if resume:
            raise InputError("resume needs state, the file to resume from")
        return
    if not file.parent.is_dir() or not os.access(file.parent, os.W_OK):
        raise InputError(
            f"state {file} cannot be written: {file.parent} is not a folder to write in"
        )
    if resume and not file.is_file():
        raise InputError(f"there is no state to resume from: {file} does not exist")
    if file.exists() and not resume:
        raise InputError(f"{file} holds the state of a run: give resume=True, or delete the file")


def _check_choices(denoiser: nn.Module, config: FinetuneConfig, timesteps: torch.Tensor) -> None:
    """Raise InputError unless something is trained, and every LoRA is used at some timestep."""
    check_rates(denoiser, config)
    steps = len(timesteps.unique())
    if config.routing == "segments" and config.hub > steps:
        raise InputError(
            f"hub must be at most {steps} where routing is by segments: the trajectories have no "
            f"more timesteps; not {config.hub}"
        )


def check_checkpointing(denoiser: nn.Module, config: FinetuneConfig) -> None:
    """Raise InputError if the config asks for checkpointing but the denoiser has none."""
    if config.checkpointing and not getattr(denoiser, "_supports_gradient_checkpointing", False):
        raise InputError(
            f"checkpointing must be False: {type(denoiser).__name__} does not support gradient "
            "checkpointing"
        )


def _check_trajectories(
    teacher: Teacher,
    objective: Objective,
    trajectories: Trajectories,
    held_out: Trajectories | None,
    *,
    exact: bool,
) -> None:
    """Raise InputError unless the full-precision denoiser recorded the trajectories.

    Args:
        teacher: The full-precision denoiser.
        objective: The loss.
        trajectories: Trajectories to train on.
        held_out: Trajectories to measure errors on, or None.
        exact: Whether the teacher predicts during training, and so must be exact.
    """
    exact = exact or teacher.is_whole
    objective.count(trajectories)
    _check_path("trajectories", teacher, trajectories, exact=exact)
    if held_out is None:
        return
    objective.count(held_out)
    if not torch.equal(held_out.timesteps.cpu(), trajectories.timesteps.cpu()):
        raise InputError("held_out must have been recorded with the sampler of the trajectories")
    _check_path("held_out", teacher, held_out, exact=exact)


@torch.no_grad()
def _check_path(name: str, teacher: Teacher, path: Trajectories, *, exact: bool) -> None:
    """Raise InputError unless the full-precision denoiser is the one that recorded a path."""
    step = torch.linspace(0, len(path.timesteps) - 1, min(CHECKED, len(path.timesteps))).long()
    row = torch.zeros_like(step)
    wanted = path.predictions[step, row]
    try:
        with teacher.active() as denoiser:
            predicted = path.predict(denoiser, step, row)
    except (RuntimeError, TypeError, ValueError) as error:
        raise InputError(
            f"{name} must be recorded from a denoiser like this one: {error}"
        ) from error
    if predicted.shape != wanted.shape:
        raise InputError(
            f"{name} must be recorded from a denoiser like this one: the recorded predictions have "
            f"shape {tuple(wanted.shape[1:])}, this denoiser's have shape "
            f"{tuple(predicted.shape[1:])}"
        )
    if not path.predictions.isfinite().all():
        raise InputError(f"{name} must have finite predictions")
    off = _distance(predicted, wanted)
    most = MAX_TEACHER_ERROR
    if off > most and not exact:
        # Refined weights are nearest to the original when everything is quantized.
        off, most = _distance(path.predict(teacher.denoiser, step, row), wanted), 1.0
    if not off <= most:
        raise InputError(
            f"{name} must have been recorded from the teacher, the full-precision denoiser: its "
            f"predictions are {100 * off:.1f} % off"
        )


def _distance(predicted: torch.Tensor, wanted: torch.Tensor) -> float:
    """Return the norm of the difference of predictions, relative to that of the wanted ones."""
    norm = wanted.float().norm().clamp(min=torch.finfo(torch.float32).tiny)
    return float((predicted.float() - wanted.float()).norm() / norm)
