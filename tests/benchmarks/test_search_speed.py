"""Time of a search over 8 formats and 100 clips as a ratio to an eager torch loop, in one run.

pytest tests/benchmarks --benchmark-enable -s
"""

import numpy as np
import pytest
import torch
from race import race

from fpformats import Histogram, parse, quantize_scaled, search
from fpformats.engine import backends
from fpformats.fitting.search import RATIOS

ROUNDS = 3
FORMATS = {
    "4-bit": ["E0M3", "E1M2", "E2M1", "E3M0", "E1M3U", "E2M2U", "E3M1U", "E4M0U"],
    "8-bit": ["E0M7", "E1M6", "E2M5", "E3M4", "E4M3", "E5M2", "E2M6U", "E4M4U"],
}


def data(count):
    generator = torch.Generator().manual_seed(0)
    return torch.nn.functional.silu(torch.randn(count, generator=generator))


def loop(x, formats):
    """Quantize with every candidate: the least error of each format."""
    least = {}
    for fmt in formats:
        reach = x.abs().max() if fmt.signed else x.max()
        errors = [
            (quantize_scaled(x, fmt, scale) - x).square().sum()
            for scale in reach * torch.from_numpy(RATIOS / fmt.max).float()
        ]
        least[fmt] = min(errors).item()
    return least


def in_whole_array_operations(call):
    with backends.using("portable"):
        return call()


@pytest.mark.parametrize("bits", FORMATS)
def test_search_against_an_eager_loop(benchmark, bits):
    x, formats = data(1_000_000 if benchmark.enabled else 20_000), list(map(parse, FORMATS[bits]))
    choice = search(x, formats, refine=False)
    for fmt, error in loop(x, formats).items():
        assert choice.by_format[fmt].squared_error == pytest.approx(error, rel=1e-3)
    ways = {
        "loop": lambda: in_whole_array_operations(lambda: loop(x, formats)),
        "loop of compiled kernels": lambda: loop(x, formats),
        "search": lambda: search(x, formats, refine=False),
        "refined": lambda: search(x, formats),
    }
    title = f"{bits} formats (refined: {{:.0f}} ms)"
    race(benchmark, ways, rounds=ROUNDS, baseline="search")
    milliseconds = benchmark.extra_info["microseconds"]["refined"] / 1e3
    benchmark.extra_info.update(table="search", title=title.format(milliseconds))


def test_histogram_updates(benchmark):
    x = data(1 << 20).numpy()
    histogram = Histogram()
    histogram.update(x)
    benchmark.pedantic(histogram.update, (x,), rounds=ROUNDS if benchmark.enabled else 1)
    if benchmark.enabled:
        print(f"histogram update: {benchmark.stats['median'] / x.size * 1e9:.1f} ns a number")
    assert histogram.count % x.size == 0


@pytest.mark.parametrize("options", [{"axis": 0}, {"block_size": (1, 64)}], ids=str)
def test_search_of_a_weight(benchmark, options):
    weight = np.random.default_rng(0).standard_normal((320, 2880)).astype(np.float32)
    formats = [parse(name) for name in FORMATS["4-bit"][:4]]
    weight = weight if benchmark.enabled else weight[:4]
    choice = benchmark.pedantic(
        search, (weight, formats), options, rounds=ROUNDS if benchmark.enabled else 1
    )
    error = np.square(choice.quantize(weight) - weight, dtype=np.float64).sum()
    assert choice.squared_error == pytest.approx(error, rel=1e-6)
