"""The pipelines of the models that ship: digits as a UNet and as a transformer, photographs."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    DDIMPipeline,
    DDIMScheduler,
    DiffusionPipeline,
    DiTTransformer2DModel,
    UNet2DModel,
)

from msfp.experiments.reference.names import FOLDERS, ReferenceName
from msfp.pipelines.class_conditional import PixelDiTPipeline
from msfp.support.checks import check_choice

FOLDER = Path(str(files("msfp.experiments.reference"))) / "model"
QUALITY_FILE = FOLDER / "quality.json"


def reference_pipeline(name: ReferenceName | str = "digits", *, folder: Path | None = None) -> Any:
    """Return a small real model that ships with the package, with the deterministic DDIM sampler.

    Timesteps are spaced from the noisy end ("trailing"; Lin et al., WACV 2024, table 2): the grid
    starts at pure noise and does not visit t = 0, where there is no noise left to predict. The
    pipeline shows no progress bars.

    Args:
        name: "digits", a UNet of handwritten digits; "digits-transformer", a class-conditional
            transformer of them; or "photographs", a UNet of crops of photographs in colour that
            predicts velocities.
        folder: Folder of another training of the same model; None for the one that ships.

    Raises:
        InputError: If there is no such model.

    Example:
        >>> pipe = reference_pipeline()
        >>> pipe(batch_size=2, num_inference_steps=2, output_type="np").images.shape
        (2, 16, 16, 1)
        >>> pipe = reference_pipeline("digits-transformer")
        >>> pipe([3, 7], num_inference_steps=2, output_type="np").images.shape
        (2, 16, 16, 1)
        >>> pipe = reference_pipeline("photographs")
        >>> pipe(batch_size=1, num_inference_steps=2, output_type="np").images.shape
        (1, 32, 32, 3)
    """
    check_choice("name", name, FOLDERS)
    folder = FOLDER / FOLDERS[name] if folder is None else folder
    scheduler = DDIMScheduler.from_pretrained(
        folder, subfolder="scheduler", timestep_spacing="trailing"
    )
    pipe: DiffusionPipeline
    if name == "digits-transformer":
        pipe = PixelDiTPipeline(_network(DiTTransformer2DModel, folder, "transformer"), scheduler)
    else:
        pipe = DDIMPipeline(_network(UNet2DModel, folder, "unet"), scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _network(kind: Any, folder: Path, part: str) -> Any:
    """Return a denoiser in float32 and evaluation mode."""
    return kind.from_pretrained(
        folder, subfolder=part, torch_dtype=torch.float32, low_cpu_mem_usage=False
    ).eval()


def quality() -> dict[str, Any]:
    """Return the quality of the digits model, and the noise floors of comparisons on it.

    `python -m msfp.experiments.measure` writes the file. `frechet_real_halves` and `frechet_model`
    hold Frechet distances, one for each seed. `finetune_noise_errors` holds errors of the demo's
    single LoRA, one for each fine-tuning seed. `frechet_model` and `finetune_noise_errors` have an
    entry for each of the demo's settings.
    """
    measured: dict[str, Any] = json.loads(QUALITY_FILE.read_text())
    return measured
