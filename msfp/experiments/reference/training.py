"""Training a reference model; a stopped run resumes.

Every random number is drawn from a generator seeded by (seed, step). A stopped run therefore
resumes from its last saved state and reaches the same weights.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.progress import track
from safetensors.torch import load_file, save_file
from torch import nn

from msfp.experiments.reference.models import ReferenceModel, noise_schedule
from msfp.support.files import atomic_file

WARMUP = 200
EMA_DECAY = 0.999
SAVE_EVERY = 200
LABEL_DROPOUT = 0.1


def seeded(seed: int, step: int) -> torch.Generator:
    """Return the generator of one training step."""
    return torch.Generator().manual_seed(seed * 1_000_003 + step)


def set_weights(model: nn.Module, weights: dict[str, torch.Tensor]) -> None:
    """Copy weights by name into a model's parameters, in place."""
    for name, parameter in model.named_parameters():
        parameter.data.copy_(weights[name])


class TrainingState:
    """Weights, their moving average and AdamW's moments, saved as one safetensors file."""

    def __init__(self, reference: ReferenceModel, path: Path, seed: int) -> None:
        torch.manual_seed(seed)
        # Evaluation mode disables dropout, so that all randomness comes from the generators.
        self.model = reference.build().eval()
        self.reference, self.path, self.step = reference, path, 0
        self.average = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        self.optimizer = torch.optim.AdamW(self.model.parameters(), weight_decay=1e-4)
        if path.exists():
            self._load()

    def _load(self) -> None:
        tensors = load_file(self.path)
        self.step = int(tensors["step"])
        for name, parameter in self.model.named_parameters():
            parameter.data.copy_(tensors[f"weight.{name}"])
            self.average[name].copy_(tensors[f"average.{name}"])
            self.optimizer.state[parameter] = {
                "step": tensors["step"].float(),
                "exp_avg": tensors[f"first.{name}"],
                "exp_avg_sq": tensors[f"second.{name}"],
            }

    def save(self) -> None:
        """Write everything that a run needs to resume, atomically."""
        tensors = {"step": torch.tensor(self.step)}
        for name, parameter in self.model.named_parameters():
            moments = self.optimizer.state[parameter]
            tensors[f"weight.{name}"] = parameter.data
            tensors[f"average.{name}"] = self.average[name]
            tensors[f"first.{name}"] = moments["exp_avg"]
            tensors[f"second.{name}"] = moments["exp_avg_sq"]
        with atomic_file(self.path) as partial:
            save_file(tensors, partial)

    def learning_rate(self) -> float:
        """Return the rate of the current step: linear warm-up, then linear decay to a hundredth."""
        peak = self.reference.learning_rate
        if self.step < WARMUP:
            return peak * (self.step + 1) / WARMUP
        return peak * (1 - 0.99 * (self.step - WARMUP) / (self.reference.steps - WARMUP))

    def update(self, loss: torch.Tensor) -> None:
        """Take one AdamW step on the loss, and update the moving average."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate()
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.step += 1
        decay = min(EMA_DECAY, self.step / (self.step + 10))
        for name, parameter in self.model.named_parameters():
            self.average[name].lerp_(parameter.data, 1 - decay)


def denoising_loss(
    model: nn.Module,
    reference: ReferenceModel,
    images: torch.Tensor,
    labels: torch.Tensor,
    draw: torch.Generator,
) -> torch.Tensor:
    """Return DDPM's simple loss (Ho et al., 2020, eq. 14) on images at random timesteps.

    For a model that predicts velocities, the loss is the mean squared error of the velocity.
    """
    noise = torch.randn(images.shape, generator=draw)
    timesteps = torch.randint(1000, (len(images),), generator=draw)
    arguments = {}
    if reference.classes:
        dropped = torch.rand(len(labels), generator=draw) < LABEL_DROPOUT
        arguments["class_labels"] = labels.masked_fill(dropped, reference.classes)
    schedule = noise_schedule(reference.prediction)
    noisy, target = schedule.add_noise(images, noise, timesteps), noise
    if reference.prediction == "v_prediction":
        target = schedule.get_velocity(images, noise, timesteps)
    with torch.autocast("cpu", torch.bfloat16, enabled=reference.autocast):
        prediction = model(noisy, timesteps, **arguments).sample
    return F.mse_loss(prediction.float(), target)


def training_steps(state: TrainingState, seed: int) -> Iterator[float]:
    """Run the remaining steps; yield each loss."""
    images, labels = state.reference.data()
    while state.step < state.reference.steps:
        draw = seeded(seed, state.step)
        batch = torch.randint(len(images), (state.reference.batch,), generator=draw)
        loss = denoising_loss(state.model, state.reference, images[batch], labels[batch], draw)
        state.update(loss)
        if state.step % SAVE_EVERY == 0:
            state.save()
        yield loss.item()


@torch.no_grad()
def held_out_loss(state: TrainingState) -> float:
    """Return the loss of the averaged weights on the held-out images, always with equal noise."""
    if state.reference.held_out is None:
        return float("nan")
    averaged = copy.deepcopy(state.model)
    set_weights(averaged, state.average)
    images, labels = state.reference.held_out()
    return denoising_loss(averaged, state.reference, images, labels, seeded(0, 0)).item()


def train_denoiser(reference: ReferenceModel, folder: Path, seed: int = 0) -> None:
    """Train a reference model and save an ordinary diffusers pipeline folder."""
    state_file = folder.with_suffix(".state.safetensors")
    state = TrainingState(reference, state_file, seed)
    mean = 1.0
    steps = training_steps(state, seed)
    for loss in track(steps, reference.name, total=reference.steps - state.step):
        mean += 0.01 * (loss - mean)
        if state.step % SAVE_EVERY == 0:
            print(f"step {state.step}: loss {mean:.4f}, held out {held_out_loss(state):.4f}")
    set_weights(state.model, state.average)
    schedule = noise_schedule(reference.prediction)
    reference.pipeline(state.model.to(reference.stored), schedule).save_pretrained(folder)
    state_file.unlink(missing_ok=True)
