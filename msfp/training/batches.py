"""Which process takes which part of a batch, and in how many parts."""

from __future__ import annotations

import torch


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
