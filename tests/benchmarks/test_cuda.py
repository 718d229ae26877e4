"""Time of the kernels on a GPU as a ratio to a copy of the same tensor, in one run.

pytest tests/benchmarks/test_cuda.py --benchmark-enable -s
"""

import statistics

import pytest
import torch

import fpformats
from fpformats import E2M1, E4M3
from fpformats.kernels.grid import FLOAT_DTYPES
from fpformats.kernels.layout import Layout
from fpformats.kernels.plan import make_plan

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")

COUNT = 1 << 28
ROUNDS = 20
NEAREST = ("NearestTiesToEven", "SatFinite")
STOCHASTIC = ("StochasticA", "SatNone")


def scaling(cuda, run_length):
    runs = -(-COUNT // run_length)
    scales = torch.rand(runs, device="cuda") + 0.5
    return cuda.Scaling(scales, None, Layout(COUNT, run_length, runs))


def work(cuda, dtype):
    """Give what is timed, by name: functions of a tensor and one like it to write to."""
    name = str(dtype).removeprefix("torch.")
    e2m1 = make_plan(E2M1, FLOAT_DTYPES[name], *NEAREST)
    e4m3 = make_plan(E4M3, FLOAT_DTYPES[name], *NEAREST)
    drawn = make_plan(E2M1, FLOAT_DTYPES[name], *STOCHASTIC)
    one, groups = scaling(cuda, COUNT), scaling(cuda, 64)
    return {
        "quantize E2M1": lambda x, out: cuda.quantize(x, e2m1, out),
        "quantize E4M3": lambda x, out: cuda.quantize(x, e4m3, out),
        "quantize E2M1 stochastically": lambda x, out: cuda.quantize(x, drawn, out, random=1),
        "quantize E2M1 with one scale": lambda x, out: cuda.quantize(x, e2m1, out, scaling=one),
        "quantize E2M1 in groups": lambda x, out: cuda.quantize(x, e2m1, out, scaling=groups),
        "encode E4M3": lambda x, _: cuda.encode(x, e4m3, 0),
        "encode E2M1 and look for NaN": lambda x, _: cuda.encode(x, e2m1, None),
        "encode and pack E2M1": lambda x, _: cuda.encode(x, e2m1, 0, packed_bits=4),
    }


def milliseconds(function, x, out):
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    function(x, out)
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_against_a_copy(benchmark, dtype):
    from fpformats.kernels import cuda

    functions = {"copy": lambda x, out: out.copy_(x), **work(cuda, dtype)}
    x = torch.randn(COUNT, device="cuda").to(dtype)
    out = torch.empty_like(x)
    times = {name: [] for name in functions}

    def interleaved():
        for name, function in functions.items():
            times[name].append(milliseconds(function, x, out))

    interleaved()
    times = {name: [] for name in functions}
    benchmark.pedantic(interleaved, rounds=ROUNDS if benchmark.enabled else 1)
    copy = statistics.median(times["copy"])
    print(f"\ncopy of 2**28 {dtype}: {copy:.3f} ms on {torch.cuda.get_device_name()}")
    for name in list(functions)[1:]:
        ratio = statistics.median(times[name]) / copy
        benchmark.extra_info[name] = ratio
        print(f"{name}: {ratio:.2f} x the copy")
    functions["quantize E2M1"](x, out)
    assert torch.equal(out[-1000:].cpu(), fpformats.quantize(x[-1000:].cpu(), E2M1))
