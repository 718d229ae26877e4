"""Write every kind of file of msfp 0.2.0, with that version: python make.py FOLDER.

What later versions must still read, and what they must find in it (`expected.json`).
"""

import contextlib
import copy
import hashlib
import json
import shutil
import sys
from pathlib import Path

import msfp.image_folder
import msfp.timed_state
import numpy as np
import torch
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel
from msfp.comparison import compare
from msfp.image_folder import eight_bits
from msfp.layers import sealed_layers
from msfp.reference_statistics import reference_statistics
from PIL import Image
from safetensors.torch import save_file
from torch import nn

import msfp

SAMPLER = msfp.Sampler(steps=4, batch=4)
SHORT = {"rank": 2, "steps": 4, "batch": 8}
TIMES = (900, 100)
FEW = ("conv_in", "down_blocks.1.*", "conv_out")


class Denoiser(nn.Module):
    """Two layers and the timestep."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 6)

    def forward(self, sample, timestep):
        scale = 1 + torch.as_tensor(timestep).float().reshape(-1, 1) / 1000
        return self.last(nn.functional.silu(self.first(sample)) * scale)


def make_pipeline():
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(4, 8),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=2,
        attention_head_dim=4,
    ).eval()
    pipe = DDIMPipeline(unet, DDIMScheduler(clip_sample=False))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def make_denoiser():
    torch.manual_seed(2)
    return Denoiser()


def call(denoiser):
    torch.manual_seed(3)
    for timestep in (999, 500, 1):
        denoiser(torch.randn(5, 6), timestep)


def few_features(images):
    return images.mean(dim=1).flatten(1)[:, :4]


def digest(tensors):
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(tensor.detach().contiguous().numpy().tobytes())
    return found.hexdigest()


def weights(denoiser):
    """Digest of the dequantized weights of all layers and their entries."""
    return digest(
        layer.quantized_weight(entry, torch.float32)
        for layer in sealed_layers(denoiser).values()
        for entry in range(layer.entries)
    )


class StopError(Exception):
    pass


def stopping(after):
    seen = 0

    def progress(count):
        nonlocal seen
        seen += count
        if seen >= after:
            raise StopError

    return progress


def main(out):
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    torch.set_num_threads(1)
    tensors, facts = {}, {}
    full = make_pipeline()
    calibration = msfp.calibrate(full, SAMPLER.calls(4, seed=1))
    path = msfp.record_trajectories(full, SAMPLER.calls(8, seed=5))
    torch.manual_seed(1)
    tensors["x"] = torch.randn(3, 1, 8, 8)

    def keep(name, pipe):
        with torch.no_grad():
            for timestep in TIMES:
                tensors[f"{name}/{timestep}"] = pipe.unet(tensors["x"], timestep).sample
        facts[name] = weights(pipe.unet)
        msfp.save(pipe, out / name)

    def quantized(**options):
        pipe = copy.deepcopy(full)
        config = msfp.QuantizationConfig(**options)
        msfp.quantize(pipe, config, calibration=calibration, trajectories=path)
        return pipe

    def sealed(**options):
        pipe = quantized(**options)
        msfp.seal(pipe)
        return pipe

    def tuned(**options):
        pipe = quantized(refine=None, include=FEW)
        msfp.finetune(pipe.unet, path, msfp.FinetuneConfig(hub=2, **SHORT, **options))
        return pipe

    odd = msfp.RefinementConfig(rounding="adaround", scales="output", sweeps=1)
    keep("default", sealed())
    keep("adaround", sealed(include=FEW, refine=odd, overrides={"conv_in": {"weights": 6}}))
    keep("branch", sealed(include=FEW, refine=msfp.RefinementConfig(branch_rank=1)))
    keep("products", sealed(attention=4, refine=None, include=("conv_in", "conv_out")))
    keep("nvfp4", sealed(scheme="nvfp4", include=FEW))
    keep("hub", tuned())
    keep("segments", tuned(routing="segments"))
    keep("embedding", tuned(routing="denoiser"))
    keep("beside", tuned(place="beside"))

    network, given = make_denoiser(), torch.linspace(-2, 2, 30).reshape(5, 6)
    config = msfp.QuantizationConfig(first_last=4, refine=None)
    plain = copy.deepcopy(network)
    msfp.calibrate(network, call, file=out / "calibration.safetensors", description={"seed": 3})
    msfp.store_calls(network, call, out / "calls")
    msfp.quantize(network, config, calibration=call)
    msfp.seal(network)
    tensors["network"] = network(given, 10).detach()
    facts["network"] = weights(network)
    msfp.save(network, out / "network")

    images = out / "images"
    images.mkdir()
    drawn = np.random.default_rng(0)
    for index in range(6):
        pixels = drawn.integers(0, 255, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(images / f"{index}.png")
    options = {"name": "few", "size": 8}
    reference_statistics(images, few_features, **options).save(out / "statistics.safetensors")
    msfp.timed_state.SAVE_SECONDS, msfp.timed_state.SAVE_SHARE = 0, float("inf")
    msfp.image_folder.READ_AT_ONCE = 2
    state = out / "statistics-state.safetensors"
    with contextlib.suppress(StopError):
        reference_statistics(images, few_features, **options, state=state, progress=stopping(4))

    def advance(stage, done, _total):
        if done >= 8 and stage.startswith("images"):
            raise StopError

    packed = msfp.load(out / "default")
    packed.set_progress_bar_config(disable=True)
    options = {"count": 12, "seed": 3, "features": few_features}
    found = compare(full, packed, SAMPLER, **options)
    names = ("psnr", "ssim", "sqnr", "frechet", "frechet_floor", "noise_error")
    facts["comparison"] = {name: str(getattr(found, name)) for name in names}
    with contextlib.suppress(StopError):
        state = out / "evaluation-state.safetensors"
        compare(full, packed, SAMPLER, **options, state=state, advance=advance)

    network = make_denoiser()
    recorded = msfp.record_trajectories(network, call)
    held_out = msfp.record_trajectories(network, call)
    tuning = msfp.FinetuneConfig(
        hub=2, ema=0.5, evaluate_every=2, save_every=1, clip=0.1, denoising_power=1.0, **SHORT
    )
    more = {"factors": {999: -3.0, 500: -2.0, 1: -1.0}, "held_out": held_out}

    def opened():
        denoiser = copy.deepcopy(plain)
        msfp.quantize(denoiser, config, calibration=call)
        return denoiser

    def halt(status):
        if status.step == 2:
            raise StopError

    denoiser = opened()
    history = msfp.finetune(denoiser, recorded, tuning, **more)
    facts["finetuned"] = {
        "weights": weights(denoiser),
        "losses": history.losses,
        "errors": history.errors,
    }
    tensors["finetuned"] = denoiser(given, 500).detach()
    with contextlib.suppress(StopError):
        state = out / "finetuning-state.safetensors"
        msfp.finetune(opened(), recorded, tuning, **more, file=state, progress=halt)
    save_file({k: v.contiguous() for k, v in tensors.items()}, out / "expected.safetensors")
    (out / "expected.json").write_text(json.dumps(facts, indent=1) + "\n")
    print(eight_bits(torch.ones(1)).item(), msfp.__version__)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
