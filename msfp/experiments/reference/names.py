"""The names of the models that ship, without importing the code that runs them."""

from __future__ import annotations

from typing import Literal

ReferenceName = Literal["digits", "digits-transformer", "photographs"]
"""A UNet of handwritten digits, a class-conditional transformer of handwritten digits, and a UNet
of crops of colour photographs."""
FOLDERS: dict[str, str] = {
    "digits": "digits-ddpm",
    "digits-transformer": "digits-dit",
    "photographs": "colour-ddpm",
}
"""The folder of each model."""
