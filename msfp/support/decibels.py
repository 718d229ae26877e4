"""Signal-to-noise ratios in decibels."""

from __future__ import annotations

import numpy as np


def sqnr(signal: float, noise: float) -> float:
    """Return the ratio of two sums of squares in decibels, at most 200."""
    return float(10 * np.log10(max(signal, 1e-300) / max(noise, signal * 1e-20, 1e-300)))
