"""Train the reference model and its classifier from scratch: `python -m msfp.reference.train`.

Every random number is drawn from a generator seeded by (seed, step), so a run that is stopped
continues from its last saved state to the same weights.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from rich.progress import track
from safetensors.torch import load_file, save_file
from torch import nn

from msfp.reference.classifier import DigitClassifier
from msfp.reference.digits import IMAGE_SIZE, digits

STEPS = 4000
BATCH = 64
LEARNING_RATE = 1.5e-3
WARMUP = 200
EMA_DECAY = 0.999
SAVE_EVERY = 200


def build_denoiser() -> UNet2DModel:
    """Return the untrained denoiser: a UNet of 1.74 million parameters with one attention level."""
    return UNet2DModel(
        sample_size=IMAGE_SIZE,
        in_channels=1,
        out_channels=1,
        block_out_channels=(32, 64, 96),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
        attention_head_dim=8,
        act_fn="silu",
    )


def build_scheduler() -> DDPMScheduler:
    """Return the noise schedule: 1000 linear steps, epsilon prediction, no clipping of samples."""
    return DDPMScheduler(num_train_timesteps=1000, beta_schedule="linear", clip_sample=False)


def seeded(seed: int, step: int) -> torch.Generator:
    """Return the generator of one training step."""
    return torch.Generator().manual_seed(seed * 1_000_003 + step)


def learning_rate(step: int) -> float:
    """Return the linear warm-up and linear decay to a hundredth at a step."""
    if step < WARMUP:
        return LEARNING_RATE * (step + 1) / WARMUP
    return LEARNING_RATE * (1 - 0.99 * (step - WARMUP) / (STEPS - WARMUP))


class TrainingState:
    """Weights, their moving average and AdamW's moments, saved as one safetensors file."""

    def __init__(self, model: nn.Module, path: Path) -> None:
        self.model, self.path, self.step = model, path, 0
        self.average = {name: p.detach().clone() for name, p in model.named_parameters()}
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=1e-4)
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
        """Write everything needed to continue, atomically."""
        tensors = {"step": torch.tensor(self.step)}
        for name, parameter in self.model.named_parameters():
            moments = self.optimizer.state[parameter]
            tensors[f"weight.{name}"] = parameter.data
            tensors[f"average.{name}"] = self.average[name]
            tensors[f"first.{name}"] = moments["exp_avg"]
            tensors[f"second.{name}"] = moments["exp_avg_sq"]
        partial = self.path.with_suffix(".partial")
        save_file(tensors, partial)
        partial.replace(self.path)

    def update(self, loss: torch.Tensor) -> None:
        """Take one AdamW step on the loss and move the average."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step)
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.step += 1
        decay = min(EMA_DECAY, self.step / (self.step + 10))
        for name, parameter in self.model.named_parameters():
            self.average[name].lerp_(parameter.data, 1 - decay)


def training_steps(state: TrainingState, seed: int) -> Iterator[float]:
    """Run the remaining steps of DDPM's simple loss (Ho et al., 2020, eq. 14); yield each loss."""
    images, _ = digits()
    scheduler = build_scheduler()
    while state.step < STEPS:
        draw = seeded(seed, state.step)
        batch = images[torch.randint(len(images), (BATCH,), generator=draw)]
        noise = torch.randn(batch.shape, generator=draw)
        timesteps = torch.randint(1000, (BATCH,), generator=draw)
        noisy = scheduler.add_noise(batch, noise, timesteps)
        loss = F.mse_loss(state.model(noisy, timesteps).sample, noise)
        state.update(loss)
        if state.step % SAVE_EVERY == 0:
            state.save()
        yield loss.item()


def train_denoiser(folder: Path, seed: int = 0) -> None:
    """Train the denoiser and save an ordinary diffusers pipeline folder."""
    torch.manual_seed(seed)
    model = build_denoiser()
    state_file = folder.with_suffix(".state.safetensors")
    state = TrainingState(model, state_file)
    mean = 1.0
    for loss in track(training_steps(state, seed), "Training", total=STEPS - state.step):
        mean += 0.01 * (loss - mean)
        if state.step % SAVE_EVERY == 0:
            print(f"step {state.step}: loss {mean:.4f}")
    for name, parameter in model.named_parameters():
        parameter.data.copy_(state.average[name])
    model.eval()
    DDPMPipeline(unet=model, scheduler=build_scheduler()).save_pretrained(folder)
    state_file.unlink()


def train_classifier(file: Path, seed: int = 0, epochs: int = 40) -> float:
    """Train the classifier on four fifths of the digits; return its accuracy on the rest."""
    torch.manual_seed(seed)
    images, labels = digits()
    order = torch.randperm(len(images), generator=seeded(seed, 0))
    test, train = order[: len(order) // 5], order[len(order) // 5 :]
    model = DigitClassifier()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for epoch in track(range(epochs), "Classifier"):
        shuffled = train[torch.randperm(len(train), generator=seeded(seed, epoch + 1))]
        for batch in shuffled.split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
    model.eval()
    with torch.no_grad():
        accuracy = float((model(images[test]).argmax(1) == labels[test]).float().mean())
    save_file(model.state_dict(), file, metadata={"accuracy": f"{accuracy:.4f}"})
    return accuracy


def main() -> None:
    """Train both networks into a folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="where the trained folder is written")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    folder: Path = arguments.folder
    folder.mkdir(parents=True, exist_ok=True)
    accuracy = train_classifier(folder / "classifier.safetensors", arguments.seed)
    print(f"classifier accuracy on held-out digits: {accuracy:.4f}")
    train_denoiser(folder / "digits-ddpm", arguments.seed)


if __name__ == "__main__":
    main()
