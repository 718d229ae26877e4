"""The report of a fine-tuning run: a table, JSON, pictures and one HTML page."""

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
"""Images in each row of the picture."""
COLUMNS = ("", "prediction error", "error of the next sample", "paired PSNR, dB", "minutes")


@dataclass
class Row:
    """The measurements of one denoiser.

    Attributes:
        name: Name of the denoiser in the report.
        errors: Mean squared error of its prediction on held-out trajectories, at each timestep.
        step_errors: Mean squared error of the sampler's next sample on the same trajectories, at
            each timestep; None without denoising factors.
        psnr: PSNR of its images in dB, against full-precision images from the same noise.
        images: Some of its images.
        minutes: Minutes that its training took.
        best: The training step whose weights were kept, where held-out errors chose it.
    """

    name: str
    errors: list[float]
    step_errors: list[float] | None
    psnr: float
    images: torch.Tensor
    minutes: float = 0.0
    best: int | None = None

    def cells(self) -> tuple[str, ...]:
        """Return the cells of its table row."""
        moved = "" if self.step_errors is None else f"{statistics.mean(self.step_errors):.3g}"
        minutes = f"{self.minutes:.1f}" if self.minutes else ""
        return self.name, f"{statistics.mean(self.errors):.3g}", moved, f"{self.psnr:.2f}", minutes

    def to_dict(self) -> dict[str, Any]:
        """Return everything but images as plain JSON types."""
        return {key: value for key, value in vars(self).items() if key != "images"}


@dataclass
class FinetuningReport:
    """The results of one fine-tuning run.

    Attributes:
        title: Heading of the page.
        config: Config of the fine-tuning.
        timesteps: Timesteps of the sampler.
        full: Some images of the full-precision pipeline.
        rows: Measurements of the quantized denoiser, of the ablation if any, and of the fine-tuned
            denoiser.
        history: Losses and held-out errors of the training of the fine-tuned denoiser.
        routing: The LoRA of each layer (rows) at each timestep (columns) in the fine-tuned
            denoiser; None for a single LoRA.
        run: The checkpoint, the original pipeline, and how both were called.
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
        """Return a sentence for each row whose training did not lower the held-out error."""
        return [
            f"{row.name!r}: training did not lower the held-out error, so the initial weights are "
            "kept."
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
