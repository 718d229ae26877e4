"""Fine-tunes a tiny denoiser in a process of its own, which can be killed or be one of several."""

import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from tiny import EVERYTHING, SAMPLER, SHORT, tiny_pipeline, tiny_quantized

from msfp import FinetuneConfig, denoising_factors, finetune, record_trajectories
from msfp.training.objective import Objective
from msfp.training.parameters import add_hubs
from msfp.training.teacher import Teacher
from msfp.training.trainer import Trainer, TrainingInputs


def everything(folder, student, path, held_out, factors):
    file = folder / "state.safetensors"

    def wait(*_told):
        time.sleep(1.0 if "--slowly" in sys.argv else 0.0)

    finetune(
        student,
        FinetuneConfig(**EVERYTHING),
        trajectories=path,
        factors=factors,
        held_out=held_out,
        state=file,
        resume="--resume" in sys.argv,
        progress=wait,
    )
    save_file(student.unet.state_dict(), folder / "final.safetensors")


def plain(folder, student, path):
    position = "beside" if "--beside" in sys.argv else "inside"
    config = FinetuneConfig(**SHORT | {"steps": 3}, hub=2, lora_position=position)
    inputs = TrainingInputs(path, Objective(torch.ones(4), (1.0,)), Teacher(student.unet))
    add_hubs(student.unet, config, path.timesteps)
    trainer = Trainer(student.unet, inputs, config)
    trainer.run()
    tensors = {name: value.detach().clone() for name, value in trainer.parameters.items()}
    save_file(tensors, folder / "trained.safetensors")


def sharded(folder, full, student, path, held_out):
    """As a whole, by a teacher of its own, with what a process holds in the middle of it."""
    for parameter in student.unet.parameters():  # as refinement changes weights
        parameter.data.mul_(1.001)
    # Of three samples the processes get other timesteps, and so other LoRAs.
    steps = {"steps": 3, "batch": 3, "hub": 2, "routing": "segments"}
    if "--beside" in sys.argv:
        steps |= {"hub": 1, "lora_position": "beside", "precision": "bf16"}
    ways = {"cache_teacher": False, "checkpointing": True}
    config = FinetuneConfig(
        **SHORT | steps | ways,
        evaluate_every=1,
        save_every=1,
        shard="--shard" in sys.argv,
        rates={"norms": 0.0},
    )
    held = []

    def count(_stage, step, _steps, _note):
        if "--stop" in sys.argv and step == 2:
            sys.exit()
        frozen = [p.numel() for p in student.unet.parameters() if not p.requires_grad]
        held.append(sum(frozen))

    history = finetune(
        student,
        config,
        trajectories=path,
        held_out=held_out,
        original=full,
        state=folder.parent / "shared.safetensors" if "--keep" in sys.argv else None,
        resume="--resume" in sys.argv,
        progress=count,
    )
    save_file(student.unet.state_dict(), folder / "final.safetensors")
    errors = torch.tensor([*history.errors.values()], dtype=torch.float64)
    save_file({"errors": errors, "held": torch.tensor(held)}, folder / "facts.safetensors")


def main():
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    folder.mkdir(exist_ok=True)
    full = tiny_pipeline()
    student = tiny_quantized(full)
    path = record_trajectories(full, calls=SAMPLER.calls(8, seed=5))
    if "--plain" in sys.argv:
        plain(folder, student, path)
        return
    held_out = record_trajectories(full, calls=SAMPLER.calls(4, seed=77))
    if "--teacher" in sys.argv:
        sharded(folder, full, student, path, held_out)
        return
    everything(folder, student, path, held_out, denoising_factors(full.scheduler, 4))
