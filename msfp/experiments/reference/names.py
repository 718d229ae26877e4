"""The names of the models that ship, known without importing anything that runs them."""

from __future__ import annotations

from typing import Literal

ReferenceName = Literal["digits", "digits-transformer", "photographs"]
"""A UNet of handwritten digits, a class-conditional transformer of them, and a UNet of crops of
photographs in colour."""
FOLDERS: dict[str, str] = {
    "digits": "digits-ddpm",
    "digits-transformer": "digits-dit",
    "photographs": "colour-ddpm",
}
"""The folder of each model."""
