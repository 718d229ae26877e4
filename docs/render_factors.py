"""Draw the denoising factors of common samplers, for each prediction type, as loss weights.

python docs/render_factors.py
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import diffusers
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from msfp import denoising_factors, timestep_weights

PICTURE = Path(__file__).parent / "pictures" / "denoising_factors.png"
STEPS = 20
COLORS = {"epsilon": "tab:blue", "v_prediction": "tab:orange", "sample": "tab:green"}
FLOW_COLORS = {"shift 1": "tab:red", "shift 3": "tab:purple"}
NO_CLIP: dict[str, Any] = {"clip_sample": False}
MULTISTEP, SINGLESTEP = "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler"
SAMPLERS: dict[str, tuple[str, Iterable[str], dict[str, Any], dict[str, Any]]] = {
    "DDPM": ("DDPMScheduler", COLORS, NO_CLIP, {}),
    "DDIM": ("DDIMScheduler", COLORS, NO_CLIP, {}),
    "DDIM, eta 1": ("DDIMScheduler", COLORS, NO_CLIP, {"eta": 1.0}),
    "PLMS": ("PNDMScheduler", ("epsilon", "v_prediction"), {"skip_prk_steps": True}, {}),
    "Euler": ("EulerDiscreteScheduler", COLORS, {}, {}),
    "Heun": ("HeunDiscreteScheduler", COLORS, {}, {}),
    "DEIS": ("DEISMultistepScheduler", COLORS, {}, {}),
    "UniPC": ("UniPCMultistepScheduler", COLORS, {}, {}),
    "DPM-Solver++ 2M": (MULTISTEP, COLORS, {}, {}),
    "DPM-Solver++ 3M": (MULTISTEP, COLORS, {"solver_order": 3}, {}),
    "DPM-Solver++ 2M SDE": (MULTISTEP, COLORS, {"algorithm_type": "sde-dpmsolver++"}, {}),
    "DPM-Solver++ 3S": (SINGLESTEP, COLORS, {"solver_order": 3}, {}),
    "DPM-Solver 2M": (
        MULTISTEP,
        COLORS,
        {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"},
        {},
    ),
    "DPM-Solver 2M, heun": (
        MULTISTEP,
        COLORS,
        {
            "algorithm_type": "dpmsolver",
            "solver_type": "heun",
            "final_sigmas_type": "sigma_min",
        },
        {},
    ),
}
"""By title: the scheduler, what the model may predict, its config and arguments of its step."""


def curve(
    axes: Axes, scheduler: diffusers.SchedulerMixin, label: str, color: str, **step: Any
) -> None:
    """Draw the weights of one scheduler along its grid."""
    weights = timestep_weights(denoising_factors(scheduler, STEPS, **step), power=1)
    visible = {timestep: weight for timestep, weight in weights.items() if weight > 0}
    axes.plot(list(visible), list(visible.values()), ".-", color=color, label=label, linewidth=1.2)


def main() -> None:
    """Draw one panel for each sampler, and save the picture."""
    figure, grid = plt.subplots(
        3, 5, figsize=(13, 7.5), sharex=True, sharey=True, layout="constrained"
    )
    panels = iter(grid.flat)
    for title, (name, predictions, config, step) in SAMPLERS.items():
        axes = next(panels)
        for prediction in predictions:
            scheduler = getattr(diffusers, name)(prediction_type=prediction, **config)
            curve(axes, scheduler, prediction, COLORS[prediction], **step)
        axes.set_title(title, fontsize=10)
    axes = next(panels)
    for shift, (label, color) in zip((1.0, 3.0), FLOW_COLORS.items(), strict=True):
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
        curve(axes, scheduler, label, color)
    axes.set_title("flow matching, Euler", fontsize=10)
    axes.legend(fontsize=8, loc="lower left")
    lines, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(lines, labels, fontsize=9, loc="outside upper center", ncols=3, frameon=False)
    for axes in figure.axes:
        axes.axhline(1, color="black", linewidth=0.8, linestyle=":")
        axes.spines[["top", "right"]].set_visible(False)
    grid[0, 0].set(xlim=(1030, -30), xticks=(900, 600, 300, 0), yscale="log", ylim=(3e-4, 20))
    figure.supxlabel(f"timestep, in the order of sampling ({STEPS} steps)", fontsize=10)
    figure.supylabel("loss weight, mean 1", fontsize=10)
    figure.savefig(PICTURE, dpi=150)


if __name__ == "__main__":
    main()
