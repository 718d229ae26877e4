"""Which sampler steps and samples a step of training sees, and which process takes which part."""

from __future__ import annotations

import torch


def draw_batch(
    steps: int, count: int, size: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw a batch: evenly spread sampler steps from a random offset, and random trajectories.

    Args:
        steps: Sampler steps to draw from.
        count: Trajectories to draw from.
        size: Samples in the batch.
        generator: Source of randomness.

    Returns:
        The index of the step and that of the trajectory of each sample, both of shape (size,).

    Example:
        >>> step, trajectory = draw_batch(20, 100, 5, torch.Generator().manual_seed(0))
        >>> step.tolist()
        [4, 8, 12, 16, 0]
    """
    offset = torch.randint(steps, (1,), generator=generator)
    step = (offset + torch.arange(size) * steps // size) % steps
    return step, torch.randint(count, (size,), generator=generator)


def shares(
    batch: tuple[torch.Tensor, torch.Tensor], process: int, processes: int, parts: int
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return the parts of a batch that one process takes, one after the other.

    Each has timesteps from all of the sampler's grid.

    Example:
        >>> batch = torch.arange(8), torch.arange(8)
        >>> [step.tolist() for step, _ in shares(batch, 1, 2, parts=2)]
        [[1, 5], [3, 7]]
    """
    step, sample = batch
    count = processes * parts
    starts = [process + processes * part for part in range(parts)]
    return [(step[start::count], sample[start::count]) for start in starts]
