"""The INT8 operators of oneDNN in torch, and the check that they give the defined bits here."""

from __future__ import annotations

import functools
import warnings
from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from msfp.layers.execution.grids import EXACT

COMPARED = 100
"""Number of results, at least, that are compared with the definition."""
LONG = 3072
"""Terms of the sums of examples that need more than 24 bits."""
FEW = 1 << 14
"""Number of results up to which `torch._int_mm` and several passes are faster."""
LARGEST = {False: (191, 64), True: (255, 127)}
"""Largest byte and weight of the formats whose pairs of products fit 16 bits, and of all."""


class Convolution(NamedTuple):
    """How a convolution moves; all but the groups by spatial axis, as many as it has."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int


class Operands(NamedTuple):
    """What is multiplied: whole numbers, and what they count.

    Attributes:
        weight: Int8, output channels first.
        step: What its numbers count: one float32 number for each output channel.
        input_step: What a byte of the input counts.
        zero: The byte of zero.
    """

    weight: torch.Tensor
    step: torch.Tensor
    input_step: float
    zero: int


class Product(ABC):
    """The product of bytes of one shape and a weight of whole numbers, prepared.

    Calling it gives the defined product in float32 or bfloat16, to which it is rounded.

    Args:
        operands: The weight, and what its numbers and bytes count.
    """

    def __init__(self, operands: Operands) -> None:
        self.step, self.input_step, self.zero = operands[1:]
        self.no_zeros = torch.zeros(len(operands.weight), dtype=torch.int32)

    @abstractmethod
    def __call__(
        self, x: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype
    ) -> torch.Tensor:
        """Return the defined product.

        Args:
            x: Bytes, uint8: (rows, features), or (batch, channels, ...) for a convolution.
            bias: Float32, or None.
            dtype: Float32 or bfloat16, to which the result is rounded.
        """


class SmallMatrix(Product):
    """A product of matrices with few results, by an operator that starts quickly."""

    def __init__(self, operands: Operands) -> None:
        super().__init__(operands)
        self.weight = operands.weight.t().contiguous()
        self.sums = self.zero * operands.weight.sum(1, dtype=torch.int32)
        self.factor = torch.tensor(self.input_step)

    def __call__(
        self, x: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype
    ) -> torch.Tensor:
        """Return the defined product."""
        sums = torch._int_mm(x, self.weight).sub_(self.sums)
        y = torch.mul(sums, self.factor).mul_(self.step)  # the sums are rounded to float32 first
        y = y if bias is None else y.add_(bias)
        return y if dtype is torch.float32 else y.to(dtype)


class LargeProduct(Product):
    """A product of matrices, or a convolution, which pads with zero.

    Args:
        shape: Shape of the bytes.
        convolution: How it moves, or None for a product of matrices.
        fused: Whether the operator multiplies by the steps and adds the bias.
    """

    def __init__(
        self,
        operands: Operands,
        shape: tuple[int, ...],
        convolution: Convolution | None,
        *,
        fused: bool,
    ) -> None:
        super().__init__(operands)
        self.fused = fused
        self.row: tuple[int, ...] = (-1,)
        self.moves: tuple[Any, ...] = ()
        # A weight that is laid out for another shape is laid out anew in every call.
        if convolution is None:
            self.operator = _operator("qlinear_pointwise")
            weight = operands.weight.contiguous()
            self.weight = torch.ops.onednn.qlinear_prepack(weight, list(shape))
            return
        stride, padding, dilation, groups = convolution
        self.operator = _operator(f"qconv{len(stride)}d_pointwise")
        self.row = (-1, *(1,) * len(stride))
        self.moves = (list(stride), list(padding), list(dilation), groups)
        self.weight = torch.ops.onednn.qconv_prepack(*operands, *self.moves, list(shape))

    def __call__(
        self, x: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype
    ) -> torch.Tensor:
        """Return the defined product."""
        if self.fused:
            y = self._multiply(x, self.input_step, self.step, bias, dtype)
        else:
            y = self._multiply(x, 1.0, torch.ones_like(self.step), None, torch.float32)
            y = y.mul_(self.input_step).mul_(self.step.view(self.row))
            y = (y if bias is None else y.add_(bias.view(self.row))).to(dtype)
        # As other convolutions of torch do: channels are last in memory for images and volumes.
        return y.contiguous() if x.dim() == 3 else y

    def _multiply(
        self,
        x: torch.Tensor,
        input_step: float,
        step: torch.Tensor,
        bias: torch.Tensor | None,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        result: torch.Tensor = self.operator(
            *(x, input_step, self.zero, self.weight, step, self.no_zeros, bias, *self.moves),
            *(1.0, 0, dtype, "none", [], ""),
        )
        return result


def prepare_product(
    operands: Operands,
    shape: tuple[int, ...],
    convolution: Convolution | None,
    *,
    fused: bool,
    long: bool = False,
) -> Product:
    """Return the product of bytes of a shape and a weight.

    Args:
        operands: The weight, and what its numbers and bytes count.
        shape: Shape of the bytes.
        convolution: How it moves, or None for a product of matrices.
        fused: As for `LargeProduct`.
        long: Whether sums need more than 24 bits, and only `torch._int_mm` has them all.
    """
    if convolution is None and (long or shape[0] * len(operands.weight) <= FEW):
        return SmallMatrix(operands)
    return LargeProduct(operands, shape, convolution, fused=fused)


@functools.cache
def _operator(name: str) -> Any:
    return getattr(torch.ops.onednn, name).default


_modes: dict[tuple[Any, ...], bool | None] = {}
"""Whether products of a kind and shape are fused; None if they give other bits than defined."""


def checked_product(
    operands: Operands,
    shape: tuple[int, ...],
    convolution: Convolution | None,
    *,
    largest: int,
    wide: bool,
) -> Product | None:
    """Return the product if it gives the defined bits for bytes of this shape, else None.

    oneDNN chooses among many algorithms by kind and shape, so that each of these is compared with
    the definition once.

    Args:
        operands: The weight, and what its numbers and bytes count.
        shape: Shape of the bytes.
        convolution: How it moves, or None for a product of matrices.
        largest: The largest byte.
        wide: Whether pairs of products need more than 16 bits.
    """
    long = operands.zero != 0 and _largest_sum(operands.weight, largest) >= EXACT
    long = long and not has_long_sums()
    key = (tuple(operands.weight.shape), shape, convolution, operands.zero == 0, wide, long)
    given = (operands, shape, convolution)
    if key not in _modes:
        fused = fuses(wide=wide)
        modes = () if fused is None else (True, False) if fused else (False,)
        if convolution is not None and convolution.groups > 1:
            modes = modes[-1:]  # some of their algorithms round in another order
        if convolution is not None and long:
            modes = ()
        _modes[key] = next((each for each in modes if _is_right(*given, largest, each, long)), None)
        if _modes[key] is None:
            warnings.warn(
                f"products of the shapes {key[0]} and {shape} are computed in floating point: the "
                f"integer operators of torch {torch.__version__} give other bits than defined",
                stacklevel=2,
            )
    mode = _modes[key]
    return None if mode is None else prepare_product(*given, fused=mode, long=long)


def _largest_sum(weight: torch.Tensor, largest: int) -> int:
    """Return the largest magnitude of the sums of bytes times weights."""
    rows = weight.flatten(1)
    ends = rows.clamp(min=0).sum(1), rows.clamp(max=0).sum(1).neg()
    return largest * int(torch.maximum(*ends).amax())


def _is_right(
    operands: Operands,
    shape: tuple[int, ...],
    convolution: Convolution | None,
    largest: int,
    fused: bool,
    long: bool,
) -> bool:
    """Compare a product with its definition, on random bytes."""
    multiply = prepare_product(operands, shape, convolution, fused=fused, long=long)
    generator = torch.Generator().manual_seed(0)
    shape = (max(shape[0], 1), *shape[1:])
    bias = torch.randn(len(operands.weight), generator=generator)
    compared = 0
    while compared < COMPARED:
        x = torch.randint(0, largest + 1, shape, generator=generator, dtype=torch.uint8)
        wanted = _defined(x, operands, bias, convolution)
        try:
            if not torch.equal(multiply(x, bias, torch.float32), wanted):
                return False
        except RuntimeError:
            return False
        compared += wanted.numel()
    return True


@torch._dynamo.assume_constant_result  # type: ignore[untyped-decorator]
def fuses(*, wide: bool) -> bool | None:
    """Return whether the operators give the defined bits on this machine.

    Older processors multiply by the product of the two steps, which is rounded in another way. The
    operators then only add up, which is exact, and the steps are multiplied afterwards.

    Args:
        wide: Whether for all bytes, or for those whose pairs of products fit 16 bits.

    Returns:
        True if they do, False if their sums are exact, None if not even these are. A warning says
        once that nothing can be computed by them.
    """
    return _checked(wide)


@functools.cache
def _checked(wide: bool) -> bool | None:
    why = "other bits than defined"
    for fused in (True, False):
        try:
            if all(_agrees(wide, convolution, fused) for convolution in _EXAMPLES):
                return fused
        except (RuntimeError, AttributeError, TypeError, NotImplementedError) as error:
            why = str(error).splitlines()[0]
    if not wide:
        warnings.warn(
            f"quantized layers are computed in floating point: the integer operators of torch "
            f"{torch.__version__} fail here ({why})",
            stacklevel=3,
        )
    return None


@functools.cache
def has_long_sums() -> bool:
    """Return whether sums that need more than 24 bits are exact on this machine.

    Those of AMX are float32 numbers before what a zero point adds is subtracted.
    """
    return all(
        _agrees(wide, each, bool(fuses(wide=wide)), long=True)
        for wide in (False, True)
        for each in _EXAMPLES
        if fuses(wide=wide) is not None
    )


_EXAMPLES = (
    None,
    Convolution((1,), (1,), (1,), 1),
    Convolution((1, 1), (1, 1), (1, 1), 1),
    Convolution((2, 1), (0, 2), (1, 2), 2),
    Convolution((1, 1, 1), (1, 1, 1), (1, 1, 1), 1),
)


def _agrees(
    wide: bool, convolution: Convolution | None, fused: bool, *, long: bool = False
) -> bool:
    """Compare the operators with the definition for one kind of layer.

    Args:
        wide: As for `fuses`.
        convolution: The kind, or None for a product of matrices.
        fused: As for `LargeProduct`.
        long: Whether some sums need more than 24 bits.
    """
    generator = torch.Generator().manual_seed(0)
    byte, most = LARGEST[wide]
    places = 0 if convolution is None else len(convolution.stride)
    groups = 1 if convolution is None else convolution.groups
    inputs = 64 * (-(-LONG // 3**places) // 64 if long else 1)
    shape = (48, inputs // groups, *(3,) * places)
    weight = torch.randint(-most, most + 1, shape, generator=generator).to(torch.int8)
    weight[0], weight[1], weight[2] = most, -most, most
    if not long:
        weight.flatten(1)[:3, (EXACT - 1) // (byte * most) :] = 0
    step = torch.rand(48, generator=generator) / 100 + 1e-3
    bias = torch.randn(48, generator=generator)
    for rows in (3, 3 if places else 400):
        x = torch.randint(0, byte + 1, (rows, inputs, *(6,) * places), generator=generator)
        x = x.to(torch.uint8)
        x[0] = byte
        for zero, given in ((0, None), (0, bias), (3, bias), (128, None)):
            operands = Operands(weight, step, 0.3, zero)
            multiply = prepare_product(operands, tuple(x.shape), convolution, fused=fused)
            for dtype in (torch.float32, torch.bfloat16):
                wanted = _defined(x, operands, given, convolution).to(dtype)
                if not torch.equal(multiply(x, given, dtype), wanted):
                    return False
    return True


def _defined(
    x: torch.Tensor,
    operands: Operands,
    bias: torch.Tensor | None,
    convolution: Convolution | None,
) -> torch.Tensor:
    """Return the product by its definition, in a float dtype in which sums are exact."""
    weight, step, input_step, zero = operands
    most = int(weight.abs().amax()) * weight[0].numel() * 255
    dtype = torch.float32 if most < EXACT else torch.float64
    n, m = x.to(dtype) - zero, weight.to(dtype)
    if convolution is None:
        places, sums = 0, F.linear(n, m)
    else:
        places = len(convolution.stride)
        sums = (F.conv1d, F.conv2d, F.conv3d)[places - 1](n, m, None, *convolution)
    row = (-1, *(1,) * places)
    scaled = sums.float() * torch.tensor(input_step) * step.view(row)
    return scaled if bias is None else scaled + bias.view(row)
