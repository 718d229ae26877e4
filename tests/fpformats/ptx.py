"""Print the code that Triton makes of the kernels for an H100, as JSON; it takes no GPU."""

import inspect
import json

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fpformats.kernels import triton_kernels

ROUNDED = {"count": "i32", "record": "*i64"}
NARROW = {"narrow": True, "rounding": "NearestTiesToEven"}
WIDE = {"narrow": False, "rounding": "NearestTiesToEven"}
ROWS = {"row_length": "i32", "run_length": "i32", "row_stride": "i32"}
SEED = {"seed_low": "i32", "seed_high": "i32", "random_bits": "i32"}
CODES = {"nan_code": "i32", "size": "i32"}


def scaled(dtype):
    return {"scales": f"*{dtype}", "zero_points": f"*{dtype}", **ROWS}


def compiled(kernel, x, out, settled, **types):
    """Give the PTX of a kernel for arguments of some types, and others that are settled."""
    names = list(inspect.signature(kernel.fn).parameters)
    types |= {names[0]: f"*{x}", "out": f"*{out}", **ROUNDED}
    settled = {"index": tl.uint32, "block": 1024, **settled}
    source = ASTSource(
        fn=kernel,
        signature={name: types.get(name, "constexpr") for name in names},
        constexprs={name: settled.get(name) for name in names if name not in types},
    )
    options = {"enable_fp_fusion": False}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]


def main():
    quantize, encode = triton_kernels.quantize_kernel, triton_kernels.encode_kernel
    decode = triton_kernels.decode_kernel
    stochastic = WIDE | {"rounding": "StochasticC"}
    packed = {"packed_bits": 6}
    ptx = {
        "narrow": compiled(quantize, "fp16", "fp16", NARROW),
        "narrow scaled": compiled(quantize, "bf16", "bf16", NARROW, **scaled("fp32")),
        "narrow codes": compiled(encode, "fp32", "u8", NARROW, nan_seen="*i32", **CODES),
        "narrow codes scaled": compiled(
            encode, "fp32", "u8", NARROW | packed, **CODES, **scaled("fp32")
        ),
        "wide": compiled(quantize, "fp32", "fp32", WIDE),
        "wide stochastic": compiled(quantize, "fp32", "fp32", stochastic, **SEED),
        "wide scaled": compiled(quantize, "fp32", "fp32", WIDE, **scaled("fp32")),
        "float64 scaled": compiled(quantize, "fp64", "fp64", WIDE, **scaled("fp64")),
        "values": compiled(decode, "u8", "fp16", {"narrow": True}),
        "values scaled": compiled(
            decode, "u8", "fp32", {"narrow": False, **packed}, **scaled("fp32")
        ),
    }
    print(json.dumps(ptx))


if __name__ == "__main__":
    main()
