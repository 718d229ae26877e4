"""The loop of fine-tuning: steps, evaluations, saved states."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn

from msfp.errors import InputError
from msfp.layers.lora.talora import routing_of
from msfp.pipelines.trajectories import Trajectories, draw_batch
from msfp.support.progress import Progress, no_progress
from msfp.training.config import FinetuneConfig
from msfp.training.diagnosis import first_nonfinite
from msfp.training.objective import Objective, Predict, recorded
from msfp.training.parameters import ScaleFloors, optimizer_groups, trained_parameters
from msfp.training.processes import accelerator, sum_gradients, summed
from msfp.training.state import History, TrainingState
from msfp.training.teacher import Teacher


@dataclass(frozen=True)
class TrainingInputs:
    """The inputs of a training run.

    Attributes:
        path: Trajectories of the full-precision denoiser.
        objective: The loss.
        teacher: The full-precision denoiser inside the trained one.
        held_out: Trajectories that are not trained on, or None.
        state: The file of the state, or None.
        tensorboard: A folder for TensorBoard, or None.
        fingerprint: The values that must be equal for a run to resume; needed if there is a state.
    """

    path: Trajectories
    objective: Objective
    teacher: Teacher
    held_out: Trajectories | None = None
    state: Path | None = None
    tensorboard: Path | None = None
    fingerprint: dict[str, Any] = field(default_factory=dict)


class Trainer:
    """Trains a denoiser with LoRAs.

    Args:
        denoiser: Quantized, trainable, with hubs; changed in place.
        inputs: The inputs of the run.
        config: How to train.
    """

    def __init__(self, denoiser: nn.Module, inputs: TrainingInputs, config: FinetuneConfig) -> None:
        self.denoiser, self.inputs, self.config = denoiser, inputs, config
        self.objective = inputs.objective
        denoiser.requires_grad_(False)
        if config.checkpointing:
            denoiser.enable_gradient_checkpointing()  # type: ignore[operator]
        rates = trained_parameters(denoiser, config.rates)
        inputs.teacher.keep(rates)
        named = dict(denoiser.named_parameters())
        self.parameters = {name: named[name] for name in rates}
        for parameter in self.parameters.values():
            parameter.requires_grad_(True)
        device = next(iter(self.parameters.values())).device
        self.accelerator = accelerator(device, config.precision, inputs.tensorboard)
        optimizer = torch.optim.AdamW(
            optimizer_groups(self.parameters, rates), betas=(0.9, 0.99), weight_decay=0.0,
            fused=True,
        )  # fmt: skip
        self.optimizer = self.accelerator.prepare_optimizer(optimizer, device_placement=False)
        self.floors = ScaleFloors(denoiser)
        generator = torch.Generator().manual_seed(config.seed)
        self.state = TrainingState(self.parameters, optimizer, generator, inputs.fingerprint)
        if config.ema:
            self.state.average = self.state.current()
        self.saved: int | None = None

    def resume(self) -> None:
        """Restore the saved state.

        Raises:
            InputError: If there is no state, or it is of another run.
        """
        file = self.inputs.state
        if file is None or not file.is_file():
            raise InputError(f"there is no state to resume from: {file} does not exist")
        scaler = self.state.load(file)["scaler"]
        if scaler is not None and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(scaler)
        self.saved = self.state.step

    def run(self, progress: Progress = no_progress) -> History:
        """Train to the last step or until the held-out error stops falling.

        Args:
            progress: Called after each step, with its loss and the last held-out error as a note.

        Returns:
            The losses and held-out errors. The denoiser then has the best parameters.

        Raises:
            InputError: If the loss or its gradient is not finite.
        """
        self._start_logs()
        history = self.state.history
        self._evaluate()
        while self.state.step < self.config.steps and not self._finished():
            loss = self._step()
            self._evaluate()
            if self.state.step % self.config.save_every == 0:
                self._save()
            self.accelerator.log({"loss": loss, **self._last_error()}, step=self.state.step)
            progress("fine-tuning", self.state.step, self.config.steps, self._note(loss))
        self._save()
        if self.config.checkpointing:
            self.denoiser.disable_gradient_checkpointing()  # type: ignore[operator]
        if self.state.best or self.state.average:
            self.state.put(self.state.best or self.state.average)
        if self.inputs.tensorboard is not None:
            self.accelerator.end_training()
        return history

    def _note(self, loss: float) -> str:
        """Return the note for progress: the loss and the last held-out error."""
        errors = (f", held-out error {error:.3g}" for error in self._last_error().values())
        return f"loss {loss:.3g}{''.join(errors)}"

    def _start_logs(self) -> None:
        if self.inputs.tensorboard is not None:
            facts = {key: str(value) for key, value in self.config.to_dict().items()}
            self.accelerator.init_trackers("msfp", config=facts)

    def _last_error(self) -> dict[str, float]:
        errors = list(self.state.history.errors.values())
        return {"held_out_error": errors[-1]} if errors else {}

    def _finished(self) -> bool:
        patience = self.config.patience
        return patience > 0 and self.state.history.evaluations_since_best() >= patience

    def _step(self) -> float:
        """Take one step of the optimizer; return its loss."""
        share = self.state.step / self.config.steps
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * (1 - share)
        if (routing := routing_of(self.denoiser)) is not None:
            routing.turn = self.state.step
        path, targets = self.inputs.path, self._targets()
        count = self.objective.count(path)
        step, sample = draw_batch(
            len(path.timesteps), count, self.config.batch, self.state.generator
        )
        # Samples of one adapter are then contiguous in most layers, which need no copy of them.
        order = step.argsort(stable=True)
        batch = step[order], sample[order]
        process, processes = self.accelerator.process_index, self.accelerator.num_processes
        self.optimizer.zero_grad(set_to_none=False)
        loss = 0.0
        for part in shares(batch, process, processes, self.config.accumulation):
            with self.accelerator.autocast():
                errors = self.objective.errors(self.denoiser, path, targets, *part)
            part_loss = errors.sum() / self.config.batch
            loss += part_loss.item()
            self.accelerator.backward(part_loss)
        loss = summed(loss, self.accelerator)
        sum_gradients(self.parameters.values(), self.accelerator)
        self._check_finite(loss, path, batch)
        if self.config.clip is not None:
            self.accelerator.clip_grad_norm_(list(self.parameters.values()), self.config.clip)
        self.optimizer.step()
        self.floors.apply()
        self._update_average()
        self.state.history.losses.append(loss)
        return loss

    def _targets(self) -> Predict:
        """Return the function that gives the targets of a step."""
        path = self.inputs.path
        if self.config.cache_teacher:
            return recorded(path)

        def compute(step: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
            with self.inputs.teacher.active() as teacher:
                return path.predict(teacher, step, row)

        return compute

    @torch.no_grad()
    def _update_average(self) -> None:
        for name, average in self.state.average.items():
            average.lerp_(self.parameters[name].to(average.dtype), 1 - self.config.ema)

    def _evaluate(self) -> None:
        """Measure the error on held-out trajectories if an evaluation is due."""
        held_out, step = self.inputs.held_out, self.state.step
        every = self.config.evaluate_every
        if held_out is None or not every or step in self.state.history.errors:
            return
        if step % every and step != self.config.steps:
            return
        before = {name: value.detach().clone() for name, value in self.parameters.items()}
        current = self.state.current()
        self.state.put(current)
        process, processes = self.accelerator.process_index, self.accelerator.num_processes
        # Sharded weights need all processes at once: then each process measures all steps.
        times = processes if self.config.shard else 1
        steps = range(0 if times > 1 else process, len(held_out.timesteps), processes // times)
        with self.accelerator.autocast():
            error = self.objective.held_out_error(self.denoiser, held_out, self.config.batch, steps)
        error = summed(error, self.accelerator) / (times * len(held_out.timesteps))
        if not math.isfinite(error):
            self._refuse(
                f"the held-out error is {error}",
                lambda: self.objective.held_out_error(
                    self.denoiser, held_out, self.config.batch, steps
                ),
                "what they are compared with is not",
            )
        self.state.put(before)
        self.state.history.errors[step] = error
        if self.state.history.best == step:
            self.state.best = current

    def _save(self) -> None:
        """Save the state if there is a file for it."""
        if self.inputs.state is None or self.saved == self.state.step:
            return
        if self.accelerator.is_main_process:
            scaler = self.accelerator.scaler
            facts = None if scaler is None else scaler.state_dict()
            self.state.save(self.inputs.state, scaler=facts)
        self.accelerator.wait_for_everyone()
        self.saved = self.state.step

    def _check_finite(
        self, loss: float, path: Trajectories, batch: tuple[torch.Tensor, torch.Tensor]
    ) -> None:
        """Raise InputError unless the loss is finite, and without a scaler its gradient too."""
        nonfinite = [
            name
            for name, parameter in self.parameters.items()
            if parameter.grad is not None and not parameter.grad.isfinite().all()
        ]
        finite = torch.isfinite(torch.tensor(loss))
        if finite and (not nonfinite or self.accelerator.scaler is not None):
            return
        rows = self.objective.rows(*batch)
        otherwise = "what they are trained towards is not"
        if finite:
            otherwise = f"the gradient of {nonfinite[0]} is not"
        self._refuse(f"the loss is {loss}", lambda: path.predict(self.denoiser, *rows), otherwise)

    def _refuse(self, what: str, forward: Callable[[], object], otherwise: str) -> NoReturn:
        """Raise InputError for a number that is not finite.

        Args:
            what: The number that is not finite, in words.
            forward: Repeats the forward pass that led to this number.
            otherwise: What is not finite if the outputs of all layers are finite, in words.
        """
        with self.accelerator.autocast():
            layer = first_nonfinite(self.denoiser, forward)
        where = f"the outputs of all layers are finite: {otherwise}"
        if layer is not None:
            where = f"the first output that is not finite is that of layer {layer}"
        good = "no state was saved"
        if self.saved is not None:
            good = f"the last good state is {self.inputs.state}, of step {self.saved}"
        raise InputError(f"{what} at step {self.state.step}; {where}; {good}")


def shares(
    batch: tuple[torch.Tensor, torch.Tensor], process: int, processes: int, parts: int
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return the parts of a batch that one process takes, one after the other.

    Each part has timesteps from the whole grid of the sampler.

    Example:
        >>> batch = torch.arange(8), torch.arange(8)
        >>> [step.tolist() for step, _ in shares(batch, 1, 2, parts=2)]
        [[1, 5], [3, 7]]
    """
    step, sample = batch
    count = processes * parts
    starts = [process + processes * part for part in range(parts)]
    return [(step[start::count], sample[start::count]) for start in starts]
