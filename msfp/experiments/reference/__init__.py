"""The small real diffusion models that ship with the package.

Handwritten digits as a UNet and as a class-conditional transformer, and crops of photographs in
colour. `msfp.experiments.reference.train` trains them.
"""

from __future__ import annotations

import functools
import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMPipeline, DDIMScheduler, DiTTransformer2DModel, UNet2DModel
from safetensors.torch import load_file

from msfp.experiments.reference.classifier import ImageClassifier
from msfp.pipelines.class_conditional import PixelDiTPipeline

FOLDER = Path(str(files(__name__))) / "model"
PIPELINE_FOLDER = FOLDER / "digits-ddpm"
DIGITS_DIT_FOLDER = FOLDER / "digits-dit"
COLOUR_FOLDER = FOLDER / "colour-ddpm"
CLASSIFIER_FILE = FOLDER / "classifier.safetensors"
PHOTOGRAPH_CLASSIFIER_FILE = FOLDER / "photograph-classifier.safetensors"
QUALITY_FILE = FOLDER / "quality.json"


def ddim_pipeline(folder: Path = PIPELINE_FOLDER) -> DDIMPipeline:
    """Return the digits model with the deterministic DDIM sampler, without progress bars.

    Timesteps are spaced from the noisy end ("trailing"; Lin et al., WACV 2024, table 2): the grid
    starts at pure noise and does not visit t = 0, where there is no noise left to predict.

    Example:
        >>> pipe = ddim_pipeline()
        >>> pipe(batch_size=2, num_inference_steps=2, output_type="np").images.shape
        (2, 16, 16, 1)
    """
    unet = UNet2DModel.from_pretrained(
        folder, subfolder="unet", torch_dtype=torch.float32, low_cpu_mem_usage=False
    )
    pipe = DDIMPipeline(unet.eval(), _ddim_scheduler(folder))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def digits_dit_pipeline(folder: Path = DIGITS_DIT_FOLDER) -> PixelDiTPipeline:
    """Return the class-conditional transformer of digits with the same sampler.

    Example:
        >>> pipe = digits_dit_pipeline()
        >>> pipe([3, 7], num_inference_steps=2, output_type="np").images.shape
        (2, 16, 16, 1)
    """
    transformer = DiTTransformer2DModel.from_pretrained(
        folder, subfolder="transformer", torch_dtype=torch.float32, low_cpu_mem_usage=False
    )
    pipe = PixelDiTPipeline(transformer.eval(), _ddim_scheduler(folder))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def colour_pipeline(folder: Path = COLOUR_FOLDER) -> DDIMPipeline:
    """Return the model of crops of photographs, which predicts velocities, with the same sampler.

    Example:
        >>> pipe = colour_pipeline()
        >>> pipe(batch_size=1, num_inference_steps=2, output_type="np").images.shape
        (1, 32, 32, 3)
    """
    return ddim_pipeline(folder)


def _ddim_scheduler(folder: Path) -> DDIMScheduler:
    return DDIMScheduler.from_pretrained(folder, subfolder="scheduler", timestep_spacing="trailing")


def digit_classifier() -> ImageClassifier:
    """Return the classifier in whose features Frechet distances of digits are measured."""
    return _trained(ImageClassifier(channels=1, image_size=16, classes=10), CLASSIFIER_FILE)


def photograph_classifier() -> ImageClassifier:
    """Return the classifier of crops by photograph, for Frechet distances of the colour model."""
    classifier = ImageClassifier(channels=3, image_size=32, classes=6)
    return _trained(classifier, PHOTOGRAPH_CLASSIFIER_FILE)


def _trained(classifier: ImageClassifier, file: Path) -> ImageClassifier:
    classifier.load_state_dict(load_file(file))
    return classifier.eval()


@functools.cache
def _digit_classifier() -> ImageClassifier:
    return digit_classifier()


@functools.cache
def _photograph_classifier() -> ImageClassifier:
    return photograph_classifier()


def digit_features(images: torch.Tensor) -> torch.Tensor:
    """Return the classifier's features of images in [0, 1], in which Frechet distances are.

    It takes grey images: those in colour are of the mean of their channels.
    """
    return _digit_classifier().features(images.mean(dim=1, keepdim=True) * 2 - 1)


def photograph_features(images: torch.Tensor) -> torch.Tensor:
    """Return the classifier's features of colour images in [0, 1], likewise."""
    return _photograph_classifier().features(images * 2 - 1)


def quality() -> dict[str, Any]:
    """Return the digits model's own quality and the noise floors of comparisons on it.

    Written by `python -m msfp.experiments.reference.measure`: `frechet_real_halves` and
    `frechet_model` are
    Frechet distances over seeds, `finetune_noise_errors` are errors of the demo's single LoRA over
    fine-tuning seeds; the last two for each of the demo's settings.
    """
    measured: dict[str, Any] = json.loads(QUALITY_FILE.read_text())
    return measured
