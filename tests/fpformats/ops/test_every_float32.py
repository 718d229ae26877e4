"""All 2**32 float32 inputs, against thresholds from the definition in rationals."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from oracles import magnitudes

from fpformats import parse, quantize

CHUNK = 1 << 22
INFINITY = 0x7F800000


def first_patterns(fmt):
    """Give, for each code from 1 up, the pattern of the least float32 that rounds to it.

    Values and midpoints are those of the definition; float32 has them all, and patterns of
    numbers above zero grow with the numbers.
    """
    listed = magnitudes(fmt)
    middles = np.array([float((a + b) / 2) for a, b in pairwise(listed)])
    assert (middles == middles.astype(np.float32)).all()
    patterns = middles.astype(np.float32).view(np.int32).astype(np.int64)
    # A tie belongs to the upper code only if that is even.
    return patterns + np.arange(1, len(listed)) % 2


def expected_chunk(start, first, table):
    """Give the magnitudes that patterns from `start` on round to, NaN beyond infinity."""
    stops = np.clip(first, start, start + CHUNK)
    counts = np.diff(stops, prepend=start, append=start + CHUNK)
    expected = np.repeat(table, counts)
    expected[max(0, INFINITY + 1 - start) :] = np.nan
    return expected


@pytest.mark.slow
@pytest.mark.parametrize("name", ["E2M1", "E2M1U", "E2M2U", "E4M3FN", "E5M2", "BF16"])
def test_every_float32_rounds_as_defined(name):
    fmt = parse(name)
    first, table = first_patterns(fmt), np.array(magnitudes(fmt), dtype=np.float32)
    for start in range(0, 1 << 31, CHUNK):
        positive = np.arange(start, start + CHUNK, dtype=np.int32).view(np.float32)
        expected = expected_chunk(start, first, table)
        below = -expected if fmt.signed else np.where(np.isnan(expected), expected, np.float32(0))
        for x, wanted in ((positive, expected), (-positive, below)):
            numbers = ~np.isnan(wanted)
            for rounded in (quantize(x, fmt), quantize(torch.from_numpy(x), fmt).numpy()):
                # Bits, so that the sign of zero counts; of NaN only that it is one.
                same = rounded.view(np.int32) == wanted.view(np.int32)
                assert (same | ~numbers).all()
                assert np.isnan(rounded[~numbers]).all()
