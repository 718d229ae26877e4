"""Time of one emulated 4-bit forward as a ratio to the full-precision one, in one run.

pytest tests/benchmarks --benchmark-enable -s
"""

import copy
import statistics
import time

import pytest
import torch

from msfp import QuantizationConfig, Sampler, calibrate, quantize, seal
from msfp.reference import ddim_pipeline
from msfp.runtime import keep_memory

ROUNDS = 10


@pytest.fixture(scope="module")
def denoisers():
    keep_memory()
    pipe = ddim_pipeline()
    calibration = calibrate(pipe, Sampler(2, 8).calls(8, seed=1))
    quantized = copy.deepcopy(pipe)
    quantize(quantized, QuantizationConfig(), calibration=calibration)
    seal(quantized.unet)
    return pipe.unet, quantized.unet


def test_emulated_forward_against_full_precision(benchmark, denoisers):
    plain, quantized = denoisers
    x = torch.randn(64, 1, 16, 16)
    seconds = {plain: [], quantized: []}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)

    def interleaved():
        for denoiser, times in seconds.items():
            started = time.perf_counter()
            denoiser(x, 500)
            times.append(time.perf_counter() - started)

    with torch.no_grad():
        interleaved()
        benchmark.pedantic(interleaved, rounds=ROUNDS if benchmark.enabled else 1)
    torch.set_num_threads(threads)
    ratio = statistics.median(seconds[quantized]) / statistics.median(seconds[plain])
    benchmark.extra_info["ratio"] = ratio
    print(f"emulated W4A4 forward: {ratio:.2f} x the float32 forward, batch 64, one thread")
    assert quantized(x[:1], 500).sample.shape == (1, 1, 16, 16)
