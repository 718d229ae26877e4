"""Timing functions against one another in one interleaved run, fair on a busy machine too."""

import statistics
import time


def race(benchmark, contenders, rounds, baseline="copy", repeats=1):
    """Time every contender in turn, over and over, and give the ratios of their medians.

    Args:
        benchmark: The fixture of pytest-benchmark; disabled, everything runs once.
        contenders: Functions without arguments by name.
        rounds: How often each is timed.
        baseline: The name of the one that the others are compared with.
        repeats: Calls timed as one.

    Returns:
        Ratios to the baseline by name; also printed, and kept in the benchmark's record.
    """
    seconds = {name: [] for name in contenders}

    def interleaved():
        for name, contender in contenders.items():
            contender()  # so that each finds the caches as it left them itself
            started = time.perf_counter()
            for _ in range(repeats):
                contender()
            seconds[name].append((time.perf_counter() - started) / repeats)

    benchmark.pedantic(interleaved, rounds=rounds if benchmark.enabled else 1)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    ratios = {name: median / medians[baseline] for name, median in medians.items()}
    benchmark.extra_info["ratios"] = ratios
    benchmark.extra_info["microseconds"] = {name: 1e6 * value for name, value in medians.items()}
    benchmark.extra_info["baseline"] = baseline
    for name, ratio in ratios.items():
        print(f"\n  {name}: {ratio:.2f} x {baseline} ({1e6 * medians[name]:.1f} us)", end="")
    print()
    return ratios
