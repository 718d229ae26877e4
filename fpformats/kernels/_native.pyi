# The compiled kernels. The caller keeps the memory of every address alive.

from typing import Any

from numpy import int64, uint32
from numpy.typing import NDArray

class Scaling:
    # Scales and zero points by address, 0 for none, and their layout (`layout.Layout`).
    def __init__(
        self, scales: int, zero_points: int, row_length: int, run_length: int, row_stride: int
    ) -> None: ...

class Random:
    # Random words by address, or 0 and a seed; and the number of bits of a word.
    def __init__(self, words: int, seed: int, bits: int) -> None: ...

class Kernel:
    # The passes of one plan, rounding mode and dtype. Mode and dtype are indices into the lists
    # `MODES` and `DTYPES` of `native`.
    def __init__(self, plan: Any, mode: int, dtype: int) -> None: ...
    def quantize(
        self,
        source: int,
        out: int,
        count: int,
        threads: int,
        streams: bool,
        scaling: Scaling | None = None,
        random: Random | None = None,
    ) -> None: ...
    def encode(
        self,
        source: int,
        out: int,
        count: int,
        threads: int,
        nan_code: int,
        code_bytes: int,
        packed_bits: int,
        scaling: Scaling | None = None,
        random: Random | None = None,
    ) -> int: ...
    def decode(
        self,
        source: int,
        out: int,
        count: int,
        threads: int,
        streams: bool,
        code_bytes: int,
        packed_bits: int,
        scaling: Scaling | None = None,
    ) -> int: ...
    def count_steps(
        self,
        source: int,
        out: int,
        count: int,
        threads: int,
        step_offset: int,
        scaling: Scaling | None = None,
    ) -> int: ...
    def differentiate(
        self,
        source: int,
        given: int,
        x: int,
        scale: int,
        zero_point: int,
        clips: bool,
        count: int,
        threads: int,
        scaling: Scaling,
        random: Random | None = None,
    ) -> None: ...
    def attempt(
        self,
        rows: int,
        weights: int,
        scales: int,
        zero_points: int,
        row_count: int,
        length: int,
        candidates: int,
        out: int,
        sums: bool,
        threads: int,
    ) -> None: ...

def moments(numbers: int, count: int, low_bits: int) -> tuple[NDArray[uint32], NDArray[int64]]: ...
def transform(
    source: int,
    out: int,
    outer: int,
    size: int,
    inner: int,
    factor: float,
    wide: bool,
    threads: int,
) -> None: ...
def address(array: NDArray[Any]) -> int: ...
def names() -> list[str]: ...
def modes() -> list[str]: ...
def dtypes() -> list[str]: ...
def chosen() -> str: ...
def choose(name: str) -> None: ...
