"""Time of a search over 8 formats and 100 clips as a ratio to an eager torch loop, in one run.

pytest tests/benchmarks --benchmark-enable -s
"""

import statistics
import time

import numpy as np
import pytest
import torch

from fpformats import parse, quantize_scaled
from fpformats.search import RATIOS, search
from fpformats.sketch import Sketch

ROUNDS = 5
FORMATS = {
    "4-bit": ["E0M3", "E1M2", "E2M1", "E3M0", "E1M3U", "E2M2U", "E3M1U", "E4M0U"],
    "8-bit": ["E0M7", "E1M6", "E2M5", "E3M4", "E4M3", "E5M2", "E2M6U", "E4M4U"],
}


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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


@pytest.mark.parametrize("bits", FORMATS)
def test_search_against_an_eager_loop(benchmark, bits):
    x, formats = data(1_000_000 if benchmark.enabled else 20_000), list(map(parse, FORMATS[bits]))
    choice = search(x, formats, refine=False)
    for fmt, error in loop(x, formats).items():
        assert choice.by_format[fmt].squared_error == pytest.approx(error, rel=1e-3)
    ways = {
        "loop": lambda: loop(x, formats),
        "search": lambda: search(x, formats, refine=False),
        "refined": lambda: search(x, formats),
    }
    seconds = {name: [] for name in ways}

    def interleaved():
        for name, way in ways.items():
            started = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - started)

    benchmark.pedantic(interleaved, rounds=ROUNDS if benchmark.enabled else 1)
    median = {name: statistics.median(times) for name, times in seconds.items()}
    for name in ("search", "refined"):
        ratio = median["loop"] / median[name]
        benchmark.extra_info[name] = ratio
        print(f"{bits}, {name}: {median[name] * 1e3:.1f} ms, {ratio:.0f} x as fast as the loop")


def test_sketch_updates(benchmark):
    x = data(1 << 20).numpy()
    sketch = Sketch()
    sketch.update(x)
    benchmark.pedantic(sketch.update, (x,), rounds=ROUNDS if benchmark.enabled else 1)
    if benchmark.enabled:
        print(f"sketch update: {benchmark.stats['median'] / x.size * 1e9:.1f} ns a number")
    assert sketch.count % x.size == 0


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
