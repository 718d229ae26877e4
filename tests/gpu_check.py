"""Run every CUDA test of the project on this machine's GPU, and print speeds.

python tests/gpu_check.py [--out FILE]

The exit status is 0 if all is well, 1 if a test failed, 2 if there is no CUDA device.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from fpformats import (  # noqa: E402
    E2M1,
    E2M2U,
    decode,
    encode,
    encode_steps,
    quantize,
    quantize_scaled,
)
from msfp.layers.execution import triton_path  # noqa: E402
from msfp.layers.execution.triton_path import TritonPath  # noqa: E402
from msfp.layers.fake_quantizer import Quantizer  # noqa: E402
from msfp.layers.families import family_of  # noqa: E402

TEST_SECONDS = 300
COUNTS = (1_000_000, 64_000_000)
ROUNDS, WARM_UP, IN_GRAPH = 20, 3, 10
LINEAR = ((4096, 640, 640), (4096, 640, 5120), (1024, 1280, 1280), (1024, 1280, 10240))
"""Rows, features and outputs of linear layers of SDXL."""
CONVOLUTIONS = ((2, 320, 128), (2, 640, 64), (2, 1280, 32))
"""Batch, channels and height of 3x3 convolutions of SDXL."""
SCALE, ZERO = 0.23, 5
NO_DEVICE, FAILED = 2, 1

Say = Callable[[str], None]


def main() -> int:
    """Run all parts, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="file to write the report to as well")
    out = parser.parse_args().out
    lines: list[str] = []

    def say(line: str) -> None:
        print(line, flush=True)
        lines.append(line)
        if out is not None:  # at once, so that a run that is cut short leaves what it has
            out.write_text("\n".join(lines) + "\n")

    if not torch.cuda.is_available():
        say("There is no CUDA device on this machine, so nothing was checked.")
        return NO_DEVICE
    return check(say)


def check(say: Say) -> int:
    """Run all parts on the GPU, and return the exit status."""
    say_versions(say)
    passed = run_tests(say)
    with torch.no_grad():
        time_elementwise(say)
        right = time_products(say)
    say("\nAll is well." if passed and right else "\nSomething failed: see above.")
    return 0 if passed and right else FAILED


def say_versions(say: Say) -> None:
    """Name the GPU, and the versions that the results depend on."""
    major, minor = torch.cuda.get_device_capability()
    say(f"GPU     {torch.cuda.get_device_name()}, compute capability {major}.{minor}")
    say(f"torch   {torch.__version__}, CUDA {torch.version.cuda}")
    say(f"triton  {triton_version()}")


def triton_version() -> str:
    """Return the version of Triton, or that it is not there."""
    try:
        import triton
    except ImportError:
        return "is not installed"
    return str(triton.__version__)


def cuda_tests() -> list[str]:
    """Return the files of tests that use the GPU where there is one, but for benchmarks."""
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    return [
        str(file.relative_to(ROOT))
        for file in files
        if "benchmarks" not in file.parts and "torch.cuda.is_available" in file.read_text()
    ]


def run_tests(say: Say) -> bool:
    """Run the tests that use the GPU, and return whether they passed."""
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", *cuda_tests()]
    if importlib.util.find_spec("xdist"):  # most of the time is that of compiling kernels
        command += ["-n", str(min(8, os.cpu_count() or 1))]
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    say(f"\nTests: {', '.join(cuda_tests())}")
    try:
        run = subprocess.run(  # noqa: S603
            command,
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            timeout=TEST_SECONDS,
        )
    except subprocess.TimeoutExpired as error:
        printed = error.output or b""
        say(printed.decode() if isinstance(printed, bytes) else printed)
        say(f"The tests took more than {TEST_SECONDS} seconds and were stopped.")
        return False
    say(run.stdout.strip() if run.returncode else run.stdout.strip().splitlines()[-1])
    return run.returncode == 0


def microseconds(work: Callable[[], object], calls: int = 1) -> float:
    """Return the median time of one of the calls that `work` makes, by events on the GPU."""
    for _ in range(WARM_UP):
        work()
    times = []
    for _ in range(ROUNDS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        end.synchronize()
        times.append(1000 * start.elapsed_time(end) / calls)
    return statistics.median(times)


def microseconds_on_device(work: Callable[[], object]) -> float:
    """Return the median time of a call without that of its launch, by a graph of many calls."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(IN_GRAPH):
            work()
    return microseconds(graph.replay, IN_GRAPH)


def elementwise(x: torch.Tensor) -> dict[str, tuple[Callable[[], object], int]]:
    """Return operations on a tensor, and the bytes that they read and write for an element."""
    out, codes = torch.empty_like(x), encode(x, E2M1)
    shift, size, name = -ZERO * SCALE * E2M2U.step, x.itemsize, str(x.dtype)[len("torch.") :]
    return {
        "copy": (lambda: out.copy_(x), 2 * size),
        "quantize": (lambda: quantize(x, E2M1, out=out), 2 * size),
        "quantize_scaled": (lambda: quantize_scaled(x, E2M2U, SCALE, shift, out=out), 2 * size),
        "encode": (lambda: encode(x, E2M1), size + 1),
        "decode": (lambda: decode(codes, E2M1, dtype=name), size + 1),
        "encode_steps": (lambda: encode_steps(x, E2M2U, SCALE, shift), size + 1),
    }


def time_elementwise(say: Say) -> None:
    """Print the bandwidth of elementwise operations, and its share of that of a copy."""
    say("\nElementwise operations, as called: bandwidth, and its share of that of a copy")
    say(f"{'operation':16} {'dtype':9} {'elements':>11} {'time us':>9} {'GB/s':>7} {'share':>6}")
    for dtype in (torch.float32, torch.bfloat16):
        for count in COUNTS:
            x = torch.randn(count, device="cuda").to(dtype)
            copied = None
            for name, (work, size) in elementwise(x).items():
                time = microseconds(work)
                speed = count * size / time / 1000
                copied = copied or speed
                say(
                    f"{name:16} {str(dtype)[len('torch.') :]:9} {count:11,} {time:9.1f} "
                    f"{speed:7.0f} {speed / copied:6.0%}"
                )


def packed(plain: nn.Module) -> nn.Module:
    """Return a layer with 4-bit weights and inputs, for the GPU in bfloat16."""
    weight: torch.Tensor = plain.weight  # type: ignore[assignment]
    rows = weight.detach().flatten(1).abs().amax(dim=1) / float(E2M1.max)
    scale = torch.tensor(SCALE)
    own = Quantizer(E2M1, rows.view(-1, *(1,) * (weight.dim() - 1)))
    inputs = Quantizer(E2M2U, scale, -ZERO * (scale * E2M2U.step))
    return family_of(plain).trainable.wrap(plain, own, inputs).pack()


def layers() -> Iterator[tuple[str, nn.Module, torch.Tensor]]:
    """Give the name, the plain layer and an input of each shape, on the host in float32."""
    for rows, features, outputs in LINEAR:
        name = f"linear {rows}x{features}->{outputs}"
        yield name, nn.Linear(features, outputs), torch.randn(rows, features)
    for batch, channels, height in CONVOLUTIONS:
        name = f"conv {batch}x{channels}x{height}x{height}"
        yield (
            name,
            nn.Conv2d(channels, channels, 3, padding=1),
            torch.randn(batch, channels, height, height),
        )


def defined(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Return the defined output, with sums in float64, which are exact once they are rounded."""
    numbers, weight = layer.input_steps(x).double(), layer.weight_steps(0).double()
    sums = layer.compute(numbers, weight, None).round().float()
    row = (-1, *(1,) * layer.kind.places)
    scaled = sums * layer.input_step(0) * layer.weight_step.view(row)
    return (scaled + layer.bias.float().view(row)).to(x.dtype)


def kernel_of(layer: nn.Module, x: torch.Tensor) -> Callable[[], torch.Tensor]:
    """Return the product of an input that is rounded already."""
    prepared, bias = triton_path.prepare(layer, 0), layer.bias
    if not layer.kind.places:
        numbers = triton_path._numbers(prepared.encode, x)
        return lambda: triton_path.multiply(prepared, numbers, bias, x.dtype)
    pixels, moves = triton_path._pixels(prepared.encode, x), triton_path._moves(layer)
    return lambda: triton_path.convolve(prepared, pixels, moves, bias, x.dtype)


def plain_of(plain: nn.Module, x: torch.Tensor) -> Callable[[], torch.Tensor]:
    """Return the plain layer in bfloat16."""
    if isinstance(plain, nn.Linear):
        return lambda: F.linear(x, plain.weight, plain.bias)
    plain = plain.to(memory_format=torch.channels_last)
    return lambda: plain(x)


def time_product(name: str, plain: nn.Module, x: torch.Tensor, say: Say) -> bool:
    """Print the times of one layer, and return whether its bits are those defined."""
    layer = packed(plain).to("cuda", torch.bfloat16)
    x = x.to("cuda", torch.bfloat16)
    if x.dim() == 4:
        x = x.to(memory_format=torch.channels_last)
    path = TritonPath()
    if not path.takes(layer, x):
        say(f"{name:25} is not taken by the integer kernels on this device")
        return False
    y = path.product(layer, x, 0)
    same = y is not None and torch.equal(y, defined(layer, x))
    bf16 = microseconds_on_device(plain_of(plain.to("cuda", torch.bfloat16), x))
    kernel = microseconds_on_device(kernel_of(layer, x))
    whole = microseconds(lambda: path.product(layer, x, 0))
    say(
        f"{name:25} {bf16:8.1f} {kernel:8.1f} {whole:8.1f} {bf16 / kernel:7.2f}x "
        f"{bf16 / whole:7.2f}x {'same' if same else 'OTHER':>6}"
    )
    return same


def time_products(say: Say) -> bool:
    """Print the times of layers of SDXL, and return whether all bits are those defined."""
    torch.backends.cudnn.benchmark = True
    say("\n4-bit layers in us: torch in bfloat16 and the kernel alone, both without launches;")
    say("then the layer as called, which rounds the input and looks for NaN")
    say(
        f"{'layer':25} {'bf16':>8} {'kernel':>8} {'layer':>8} {'kernel':>8} {'layer':>8} "
        f"{'bits':>6}"
    )
    right = [time_product(*each, say) for each in layers()]  # all of them, also after a failure
    return all(right)


if __name__ == "__main__":
    sys.exit(main())
