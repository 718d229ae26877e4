"""Draw the denoising factors of common samplers, for each prediction type, as loss weights.

python docs/render_factors.py
"""

from pathlib import Path

import diffusers
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from msfp import denoising_factors, timestep_weights

PICTURE = Path(__file__).parent / "pictures" / "denoising_factors.png"
STEPS = 20
COLORS = {"epsilon": "tab:blue", "v_prediction": "tab:orange", "sample": "tab:green"}
FLOW_COLORS = {"shift 1": "tab:red", "shift 3": "tab:purple"}
SAMPLERS = {
    "DDPM": ("DDPMScheduler", COLORS, {"clip_sample": False}),
    "DDIM": ("DDIMScheduler", COLORS, {"clip_sample": False}),
    "PLMS": ("PNDMScheduler", ("epsilon", "v_prediction"), {"skip_prk_steps": True}),
    "Euler": ("EulerDiscreteScheduler", COLORS, {}),
    "DPM-Solver++ 2M": ("DPMSolverMultistepScheduler", COLORS, {}),
    "DPM-Solver++ 2M SDE": (
        "DPMSolverMultistepScheduler",
        COLORS,
        {"algorithm_type": "sde-dpmsolver++"},
    ),
    "UniPC": ("UniPCMultistepScheduler", COLORS, {}),
}


def curve(axes: Axes, scheduler: diffusers.SchedulerMixin, label: str, color: str) -> None:
    """Draw the weights of one scheduler along its grid."""
    weights = timestep_weights(denoising_factors(scheduler, STEPS), power=1)
    visible = {timestep: weight for timestep, weight in weights.items() if weight > 0}
    axes.plot(visible.keys(), visible.values(), ".-", color=color, label=label, linewidth=1.2)


def main() -> None:
    """Draw one panel for each sampler, and save the picture."""
    figure, grid = plt.subplots(
        2, 4, figsize=(11, 5.4), sharex=True, sharey=True, layout="constrained"
    )
    panels = iter(grid.flat)
    for title, (name, predictions, config) in SAMPLERS.items():
        axes = next(panels)
        for prediction in predictions:
            scheduler = getattr(diffusers, name)(prediction_type=prediction, **config)
            curve(axes, scheduler, prediction, COLORS[prediction])
        axes.set_title(title, fontsize=10)
    axes = next(panels)
    for shift, (label, color) in zip((1.0, 3.0), FLOW_COLORS.items(), strict=True):
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
        curve(axes, scheduler, label, color)
    axes.set_title("flow matching, Euler", fontsize=10)
    axes.legend(fontsize=8, loc="lower left")
    lines, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(lines, labels, fontsize=9, loc="outside upper center", ncols=3, frameon=False)
    for axes in grid.flat:
        axes.axhline(1, color="black", linewidth=0.8, linestyle=":")
        axes.spines[["top", "right"]].set_visible(False)
    grid[0, 0].set(xlim=(1030, -30), xticks=(900, 600, 300, 0), yscale="log", ylim=(3e-4, 20))
    figure.supxlabel(f"timestep, in the order of sampling ({STEPS} steps)", fontsize=10)
    figure.supylabel("loss weight, mean 1", fontsize=10)
    figure.savefig(PICTURE, dpi=150)


if __name__ == "__main__":
    main()
