"""The small real diffusion model that ships with the package: handwritten digits, 16x16 pixels."""

from __future__ import annotations

import functools
import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel
from safetensors.torch import load_file

from msfp.reference.classifier import DigitClassifier

FOLDER = Path(str(files(__name__))) / "model"
PIPELINE_FOLDER = FOLDER / "digits-ddpm"
CLASSIFIER_FILE = FOLDER / "classifier.safetensors"
QUALITY_FILE = FOLDER / "quality.json"


def ddim_pipeline(folder: Path = PIPELINE_FOLDER) -> DDIMPipeline:
    """Return the reference model with the deterministic DDIM sampler, without progress bars.

    Timesteps are spaced from the noisy end ("trailing"; Lin et al., WACV 2024, table 2): the grid
    starts at pure noise and does not visit t = 0, where there is no noise left to predict.

    Example:
        >>> pipe = ddim_pipeline()
        >>> pipe(batch_size=2, num_inference_steps=2, output_type="np").images.shape
        (2, 16, 16, 1)
    """
    unet = UNet2DModel.from_pretrained(folder, subfolder="unet", low_cpu_mem_usage=False)
    scheduler = DDIMScheduler.from_pretrained(
        folder, subfolder="scheduler", timestep_spacing="trailing"
    )
    pipe = DDIMPipeline(unet.eval(), scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def digit_classifier(file: Path = CLASSIFIER_FILE) -> DigitClassifier:
    """Return the trained classifier in whose features Frechet distances are measured."""
    classifier = DigitClassifier().eval()
    classifier.load_state_dict(load_file(file))
    return classifier


@functools.cache
def _classifier() -> DigitClassifier:
    return digit_classifier()


def digit_features(images: torch.Tensor) -> torch.Tensor:
    """Return the classifier's features of images in [0, 1], in which Frechet distances are."""
    return _classifier().features(images * 2 - 1)


def quality() -> dict[str, Any]:
    """Return the reference model's own quality and the noise floors of comparisons on it.

    Written by `python -m msfp.reference.measure`: `frechet_real_halves` and `frechet_model` are
    Frechet distances over seeds, `finetune_noise_errors` are errors of the demo's single LoRA over
    fine-tuning seeds; the last two for each of the demo's settings.
    """
    measured: dict[str, Any] = json.loads(QUALITY_FILE.read_text())
    return measured
