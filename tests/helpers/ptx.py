"""Print the code that Triton makes for an H100 of launches, as JSON; it takes no GPU."""

import json

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from fpformats import parse
from fpformats.kernels import cuda
from fpformats.kernels.grid import FLOAT_DTYPES
from fpformats.kernels.layout import Layout
from fpformats.kernels.plan import make_plan

COUNT = 4096
FORMATS = ("E2M1", "E2M1U", "E3M0", "E4M3", "E5M2", "E0M3", "E4M3FNUZ", "Binary8p3se")
SEEDS = (0, 1, 16, 2**31, 2**64 - 1)


class H100:
    """What Triton asks of a driver to compile for its device."""

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, _device=None):
        return 0


def compiled(function, *args, **options):
    """Give the PTX of the kernel that a function of `cuda` launches."""
    kernels = []

    def compile_only(kernel, x, out, count, **arguments):
        arguments |= {"block": cuda.BLOCK, "enable_fp_fusion": False}
        kernels.append(kernel.warmup(x, out, count, **arguments, grid=(1,)))

    cuda._launch = compile_only
    function(*args, **options)
    return kernels[0].asm["ptx"]


def plan_of(name, dtype, rounding="NearestTiesToEven"):
    return make_plan(parse(name), FLOAT_DTYPES[dtype], rounding, "SatFinite")


def scaling(dtype):
    scales = torch.ones(COUNT, dtype=dtype)
    return cuda.Scaling(scales, scales, Layout(60, 16, 4))


def main():
    driver.set_active(H100())
    x, x16 = torch.zeros(COUNT), torch.zeros(COUNT, dtype=torch.float16)
    xb16, x64 = x.bfloat16(), x.double()
    codes = torch.zeros(COUNT, dtype=torch.uint8)
    narrow, wide = plan_of("E2M1", "float32"), plan_of("E2M2NS", "float32")
    drawn, double = plan_of("E2M1", "float32", "StochasticC"), plan_of("E2M1", "float64")
    by32, by64 = scaling(torch.float32), scaling(torch.float64)
    code = {
        "narrow": compiled(cuda.quantize, x16, narrow, x16),
        "narrow scaled": compiled(cuda.quantize, xb16, narrow, xb16, scaling=by32),
        "narrow codes": compiled(cuda.encode, x, narrow, None),
        "narrow codes scaled": compiled(cuda.encode, x, narrow, 0, packed_bits=6, scaling=by32),
        "wide": compiled(cuda.quantize, x, wide, x),
        "wide stochastic": compiled(cuda.quantize, x, drawn, x, random=1),
        "wide scaled": compiled(cuda.quantize, x, wide, x, scaling=by32),
        "float64 scaled": compiled(cuda.quantize, x64, double, x64, scaling=by64),
        "values": compiled(cuda.decode, codes, narrow, x16),
        "values scaled": compiled(cuda.decode, codes, wide, x, packed_bits=4, scaling=by32),
    }
    drawn = [plan_of(name, "float32", "StochasticA") for name in FORMATS]
    plans = [plan_of(name, "float32") for name in FORMATS]
    shared = {
        "formats": [compiled(cuda.quantize, x, plan, x) for plan in plans],
        "seeds": [compiled(cuda.quantize, x, drawn[0], x, random=seed) for seed in SEEDS],
        "formats by any policy": [compiled(cuda.quantize, x, plan, x, random=1) for plan in drawn],
    }
    print(json.dumps({"code": code, "shared": shared}))


if __name__ == "__main__":
    main()
