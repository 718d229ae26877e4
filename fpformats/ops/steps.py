"""Values of a format as whole numbers of steps, which units for integers multiply exactly."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from fpformats.engine import dispatch
from fpformats.engine.arrays import (
    check_target,
    compute_dtype,
    float_dtype_of,
    grid_of,
    is_compiling,
)
from fpformats.engine.cpu import StepCounter
from fpformats.engine.scales import check_number, make_scales
from fpformats.parsing import as_format

if TYPE_CHECKING:
    from fpformats.formats import FloatFormat
    from fpformats.parsing import FormatLike


def encode_steps(
    x: Any,
    fmt: FormatLike,
    scale: Any = 1.0,
    zero_point: Any = None,
    *,
    dtype: str = "uint8",
    block_size: tuple[int, ...] | None = None,
    out: Any = None,
) -> Any:
    """Round as `quantize_scaled` does, and give the values of the format as whole numbers of steps.

    A number n stands for n times `fmt.step`, times `scale`, plus `zero_point`. Units for integers
    can multiply such numbers exactly. In uint8, those of a signed format are stored plus 128.

    Args:
        x: As in `quantize_scaled`; without a gradient.
        fmt: The format, or its name. Its `max_steps` must fit the dtype: 255 in uint8 if it is
            unsigned, else 127.
        scale: As in `quantize_scaled`.
        zero_point: As in `quantize_scaled`.
        dtype: "uint8" or "int8".
        block_size: As in `quantize_scaled`.
        out: Array or tensor of the dtype, of the kind and shape of `x`, to write to.

    Returns:
        Integers of the kind, shape and device of `x`, or `out`.

    Raises:
        TypeError: As in `quantize_scaled`.
        ValueError: As in `quantize_scaled`; also if the format has too many steps for the dtype, or
            `x` contains NaN (not checked under torch.compile).

    Example:
        >>> from fpformats import E2M1
        >>> encode_steps(1.0, E2M1, 0.75, dtype="int8")  # 1.125 = 3 * 0.5 * 0.75
        3
        >>> encode_steps(1.0, E2M1, 0.75)
        131
    """
    fmt = as_format(fmt)
    offset = _offset(fmt, dtype)
    working = compute_dtype(float_dtype_of(x))
    grid = grid_of(fmt, working)
    plain = zero_point is None and block_size is None and isinstance(scale, float) and scale == 1
    scales = None if plain else make_scales(x, scale, zero_point, block_size, working)
    check_target(out, x, dtype, None)
    return dispatch.count_steps(x, fmt, grid, offset, dtype, scales, out)


class StepEncoder:
    """`encode_steps` with one scale, prepared for many calls: arguments are checked only once.

    Args:
        fmt: As in `encode_steps`.
        scale: Positive and finite number, which is rounded to float32.
        zero_point: Finite number, which is rounded to float32; None for no shift.
        dtype: As in `encode_steps`.

    Raises:
        ValueError: As in `encode_steps`.

    Example:
        >>> import numpy as np
        >>> from fpformats import E2M1
        >>> encoder = StepEncoder(E2M1, 0.75, dtype="int8")
        >>> encoder(np.array([1.0, -5.0], np.float32))
        array([  3, -12], dtype=int8)
    """

    def __init__(
        self,
        fmt: FormatLike,
        scale: float,
        zero_point: float | None = None,
        *,
        dtype: str = "uint8",
    ) -> None:
        self.format, self.dtype = as_format(fmt), dtype
        self.scale, self.zero_point = float(scale), zero_point
        check_number("scale", self.scale)
        if zero_point is not None:
            check_number("zero_point", float(zero_point))
        offset = _offset(self.format, dtype)
        self._counter = StepCounter(self.format, self.scale, zero_point, offset, dtype)

    def __call__(self, x: Any) -> Any:
        """Give whole numbers of steps, of the kind, shape and device of `x`.

        Raises:
            TypeError: As `encode_steps` does.
            ValueError: If `x` contains NaN (not checked under torch.compile).
        """
        steps = self._counter(x)
        if steps is None:
            return encode_steps(x, self.format, self.scale, self.zero_point, dtype=self.dtype)
        return steps

    def __reduce__(self) -> tuple[Any, ...]:
        return _step_encoder, (self.format, self.scale, self.zero_point, self.dtype)

    def __repr__(self) -> str:
        return f"StepEncoder({self.format}, {self.scale}, {self.zero_point}, dtype={self.dtype!r})"


def _step_encoder(
    fmt: FloatFormat, scale: float, zero_point: float | None, dtype: str
) -> StepEncoder:
    return StepEncoder(fmt, scale, zero_point, dtype=dtype)


def _offset(fmt: FloatFormat, dtype: str) -> int:
    """Give what is added to numbers of steps; raise ValueError if they do not fit the dtype."""
    # torch.compile traces the function itself, and warns of a cache.
    return _checked_offset(fmt, dtype) if is_compiling() else _cached_offset(fmt, dtype)


def _checked_offset(fmt: FloatFormat, dtype: str) -> int:
    if dtype not in ("uint8", "int8"):
        raise ValueError(f"dtype must be 'uint8' or 'int8', not {dtype!r}")
    most = 127 if fmt.signed or dtype == "int8" else 255
    if fmt.max_steps > most:
        raise ValueError(
            f"fmt must have at most {most} steps in {dtype}, and {fmt} has {fmt.max_steps}"
        )
    return 128 if fmt.signed and dtype == "uint8" else 0


_cached_offset = functools.lru_cache(maxsize=4096)(_checked_offset)
