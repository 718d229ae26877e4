"""What fine-tuning did, as a table, JSON, pictures and one HTML page."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from typing import Any

import torch

from msfp.reports import figures, html
from msfp.support.versions import versions
from msfp.training.config import FinetuneConfig
from msfp.training.state import History

SHOWN = 12
"""Images of each row of the picture."""
COLUMNS = ("", "prediction error", "error of the next sample", "paired PSNR, dB", "minutes")


@dataclass
class Row:
    """What was measured of a denoiser.

    Attributes:
        name: What it is.
        errors: Mean squared error of its prediction on held-out trajectories, at each timestep.
        step_errors: The same of the sampler's next sample, or None where there are no factors.
        psnr: Of its images against the full-precision ones of equal noise, in dB.
        images: Some of them.
        minutes: That its training took.
        best: The step of its training that gave it, where held-out errors chose that.
    """

    name: str
    errors: list[float]
    step_errors: list[float] | None
    psnr: float
    images: torch.Tensor
    minutes: float = 0.0
    best: int | None = None

    def cells(self) -> tuple[str, ...]:
        """Return the row of the table."""
        moved = "" if self.step_errors is None else f"{statistics.mean(self.step_errors):.3g}"
        minutes = f"{self.minutes:.1f}" if self.minutes else ""
        return self.name, f"{statistics.mean(self.errors):.3g}", moved, f"{self.psnr:.2f}", minutes

    def to_dict(self) -> dict[str, Any]:
        """Return everything but images as plain JSON types."""
        return {key: value for key, value in vars(self).items() if key != "images"}


@dataclass
class FinetuningReport:
    """What a run of fine-tuning did.

    Attributes:
        title: The heading.
        config: How it was run.
        timesteps: The sampler's.
        full: Some images in full precision.
        rows: The quantized denoiser, what was tried beside, and the fine-tuned one.
        history: Losses and held-out errors of the last.
        routing: Its LoRA of each layer (rows) at each timestep, or None for a single one.
        run: What was fine-tuned towards what, and how the pipelines were called.
    """

    title: str
    config: FinetuneConfig
    timesteps: list[float]
    full: torch.Tensor
    rows: list[Row]
    history: History = field(default_factory=History)
    routing: torch.Tensor | None = None
    run: dict[str, Any] = field(default_factory=dict)

    def notes(self) -> list[str]:
        """Return a sentence for each row whose training brought nothing."""
        return [
            f"{row.name!r} is what its training began with: no later held-out error was lower."
            for row in self.rows
            if row.best == 0
        ]

    def to_dict(self) -> dict[str, Any]:
        """Return everything but images as plain JSON types."""
        return {
            "run": self.run,
            "config": self.config.to_dict(),
            "timesteps": self.timesteps,
            "rows": [row.to_dict() for row in self.rows],
            "losses": self.history.losses,
            "held_out_errors": {str(k): v for k, v in self.history.errors.items()},
            "routing": None if self.routing is None else self.routing.tolist(),
            "versions": versions(),
        }

    def html(self) -> str:
        """Return the page."""
        images = [("full precision", self.full[:SHOWN])]
        images += [(row.name, row.images[:SHOWN]) for row in self.rows]
        errors = figures.errors_by_timestep(
            self.timesteps, [(row.name, row.errors) for row in self.rows]
        )
        training = figures.training_picture(self.history.losses, self.history.errors)
        settings = self.run | self.config.to_dict()
        sections = [
            ("", [
                html.table(COLUMNS, [row.cells() for row in self.rows]),
                *[html.paragraph(note) for note in self.notes()],
            ]),
            ("Images from equal noise", [
                html.image(
                    html.png(figures.image_rows(images)), "Every column starts from the same noise."
                ),
            ]),
            ("Error by timestep", [
                html.image(
                    html.png(errors),
                    "Mean squared error of the prediction on trajectories of the full-precision "
                    "model that were not trained on.",
                ),
            ]),
            ("Training", [html.image(html.png(training), "The loss of each step.")]),
            *self._routed(),
            ("How this was run", [
                html.table(("", ""), [(k, str(v)) for k, v in settings.items()]),
                html.table(("", ""), list(versions().items())),
            ]),
        ]  # fmt: skip
        return html.page(self.title, sections)

    def _routed(self) -> list[tuple[str, list[str]]]:
        """Return the section of the routing, where there is one."""
        if self.routing is None:
            return []
        picture = figures.routing_picture(self.timesteps, self.routing.numpy())
        return [
            ("Routing", [
                html.image(html.png(picture), "The LoRA of each layer at each timestep."),
            ]),
        ]  # fmt: skip
