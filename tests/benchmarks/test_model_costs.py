"""What quantizing a model costs: its forward, its calibration, its search and its memory.

pytest tests/benchmarks/test_model_costs.py --benchmark-enable -s -m "slow or not slow"
"""

import copy
import subprocess
import sys
import time
from pathlib import Path

import pytest
import race as races
import torch
from diffusers import UNet2DModel
from race import race
from tiny import tiny_pipeline

from msfp import QuantizationConfig, Sampler, calibrate, pack, quantize, reference_pipeline
from msfp.support.malloc import keep_memory

ROUNDS = 10
CONFIG = QuantizationConfig(refine=None)


@pytest.fixture(scope="module")
def pipes(request):
    """A pipeline, and its packed copies: with nothing beside the weights, and as is.

    It is the reference pipeline where times are printed.
    """
    keep_memory()
    enabled = request.config.getoption("benchmark_enable")
    pipes = [reference_pipeline() if enabled else tiny_pipeline()]
    calls = Sampler(2, 8).calls(8, seed=1)
    for config in (CONFIG, QuantizationConfig()):
        pipes.append(copy.deepcopy(pipes[0]))
        quantize(pipes[-1], config, calibration=calls)
        pack(pipes[-1].unet)
    return pipes


@pytest.mark.parametrize("batch", [64, 1])
def test_forward_against_float32(benchmark, pipes, batch):
    size = pipes[0].unet.config.sample_size
    x = torch.randn(batch, 1, size, size)
    names = ("float32", "W4A4", "W4A4 with branches")
    ways = {
        name: lambda unet=pipe.unet: unet(x, 500) for name, pipe in zip(names, pipes, strict=True)
    }
    with torch.no_grad():
        race(benchmark, ways, ROUNDS, baseline="float32", repeats=max(1, 16 // batch))
    benchmark.extra_info.update(table="costs", title=f"forward, batch {batch}")
    assert pipes[1].unet(x, 500).sample.shape == x.shape


@pytest.mark.parametrize("batch", [64, 16])
def test_calibration_against_the_sampling_it_rides_on(benchmark, pipes, batch):
    pipe = pipes[0]
    calls = Sampler(20 if benchmark.enabled else 1, batch).calls(batch, seed=0)
    ways = {
        "sampling": lambda: [call(pipe) for call in calls],
        "calibrating": lambda: calibrate(pipe, calls=calls),
    }
    race(benchmark, ways, rounds=3, baseline="sampling")
    benchmark.extra_info.update(table="costs", title=f"calibration, batch {batch}")
    assert calibrate(pipe, calls=calls).ran


BIG = {
    "sample_size": 32,
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": (128, 256, 384, 512),
    "layers_per_block": 3,
    "down_block_types": ("DownBlock2D", "DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
}


def a_big_model():
    """A UNet of about a hundred million random weights, and a call of it."""
    torch.manual_seed(0)
    unet = UNet2DModel(**BIG).eval()
    return unet, lambda unet: unet(torch.randn(1, 3, 32, 32), 500)


@pytest.mark.slow
def test_search_of_a_big_model(benchmark):
    unet, call = a_big_model()
    millions = sum(parameter.numel() for parameter in unet.parameters()) / 1e6
    calibration = calibrate(unet, calls=call)
    started = time.perf_counter()
    layers = quantize(unet, CONFIG, calibration=calibration)
    seconds = time.perf_counter() - started
    benchmark.pedantic(lambda: None, rounds=1)
    benchmark.extra_info.update(seconds=seconds, millions=millions)
    print(f"\n  search of {len(layers)} layers, {millions:.0f} M parameters: {seconds:.1f} s")
    assert 90 < millions < 130


STATUS = Path("/proc/self/status")
PEAK = """
import re, sys, torch
sys.path[:0] = sys.argv[1:]
from test_model_costs import CONFIG, STATUS, a_big_model
from msfp import calibrate, quantize, pack

def say(what):
    print(what, int(re.search(r"VmHWM:\\s+(\\d+)", STATUS.read_text())[1]) // 1024, sep=", ")

torch.set_num_threads(1)
say("imports")
unet, call = a_big_model()
say("model")
with torch.no_grad():
    call(unet)
say("forward")
calibration = calibrate(unet, calls=call)
say("calibration")
quantize(unet, CONFIG, calibration=calibration)
say("search")
pack(unet)
say("pack")
"""


@pytest.mark.slow
@pytest.mark.skipif(not STATUS.exists(), reason="the system does not tell the peak of a process")
def test_peak_memory_of_a_big_model(request):
    """getrusage would do, but a process inherits its peak from the one that started it."""
    folders = [str(request.path.parent), str(Path(races.__file__).parent)]
    process = subprocess.run(  # noqa: S603
        [sys.executable, "-c", PEAK, *folders], capture_output=True, text=True, check=True
    )
    lines = [line.split(", ") for line in process.stdout.splitlines() if ", " in line]
    for what, megabytes in lines:
        print(f"\n  peak memory of the process after {what}: {megabytes} MB", end="")
    print()
    peaks = [int(megabytes) for _, megabytes in lines]
    assert peaks == sorted(peaks)
    _, model, _, calibration, search, pack = peaks
    # The largest layer has 19 MB, all of them 464.
    assert model < calibration
    assert search - calibration < 100
    assert pack - search < 50
