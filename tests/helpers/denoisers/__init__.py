"""A small denoiser of every class that diffusers exports."""

import diffusers
from diffusers import models

from .case import Case, cast, noise
from .image_transformers import CASES as IMAGE_TRANSFORMERS
from .unets import CASES as UNETS
from .video_transformers import CASES as VIDEO_TRANSFORMERS

CASES: dict[str, Case] = UNETS | IMAGE_TRANSFORMERS | VIDEO_TRANSFORMERS
PLACES = ("adapter", "controlnets.", "latent_upscaler.", "transformers.", "unets.")
"""Modules of diffusers.models with denoisers, and with what runs beside them."""


def exported() -> list[str]:
    """Names of the classes that diffusers exports from these modules."""
    structure = models._import_structure
    places = [place for place in structure if place.startswith(PLACES)]
    names = (each for place in places for each in structure[place])
    return sorted(name for name in names if hasattr(diffusers, name))


__all__ = ["CASES", "Case", "cast", "exported", "noise"]
