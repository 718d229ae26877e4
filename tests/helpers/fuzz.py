"""A fuzz target: names, formats, inputs, codes and shapes from raw bytes.

With atheris installed: ``python tests/helpers/fuzz.py -max_total_time=60``. Without it, the same
target runs on random bytes: ``python tests/helpers/fuzz.py 10000``.
"""

import math
import random
import sys

import numpy as np

from fpformats import Rounding, Saturation, decode, encode, exact, pack, parse, quantize, unpack
from fpformats.kernels.grid import FLOAT_DTYPES, holds

ALPHABET = "EMBNUSZFXTIp0123456789sufe"


def target(data: bytes) -> None:
    """Check a name, a rounding, a round trip of codes and one of packing, all from some bytes."""
    source = random.Random(data)
    name = "".join(source.choice(ALPHABET) for _ in range(source.randrange(10)))
    if source.random() < 0.8:
        suffix = source.choice(["", "U", "NS", "FN", "IEEE", "UNZ", "EXT", "FNUZ", "UEXT"])
        name = f"E{source.randrange(13)}M{source.randrange(54)}{suffix}"
    try:
        fmt = parse(name)
    except ValueError:
        return
    assert parse(str(fmt)) == fmt
    code = source.randrange(fmt.code_count)
    value = exact.decode(code, fmt)
    if not holds(FLOAT_DTYPES["float64"], fmt):
        return
    decoded = decode(code, fmt, dtype="float64")
    assert decoded == value or (math.isnan(decoded) and math.isnan(value))
    policy = {
        "rounding": source.choice([m.value for m in Rounding if "Stochastic" not in m]),
        "saturation": source.choice([m.value for m in Saturation]),
    }
    x = np.frombuffer(source.randbytes(8), np.float64)[0]
    x = float(source.choice([x, decoded, np.nextafter(decoded, 0), decoded * 1.5]))
    rounded, expected = quantize(x, fmt, **policy), exact.quantize(x, fmt, **policy)
    assert rounded == expected or (math.isnan(rounded) and math.isnan(expected))
    bits, shape = source.randrange(1, 17), [source.randrange(5) for _ in range(3)]
    codes = np.array([source.randrange(1 << bits) for _ in range(math.prod(shape))], np.int64)
    axis = source.choice([None, 0, 1, 2])
    back = unpack(pack(codes.reshape(shape), bits, axis=axis), bits, shape=tuple(shape), axis=axis)
    assert (back.ravel() == codes).all()
    assert encode(rounded, fmt, nan=0) < fmt.code_count


if __name__ == "__main__":
    if len(sys.argv) == 2 and sys.argv[1].isdigit():
        for seed in range(int(sys.argv[1])):
            target(seed.to_bytes(8, "little"))
    else:
        import atheris

        atheris.Setup(sys.argv, target)
        atheris.Fuzz()
