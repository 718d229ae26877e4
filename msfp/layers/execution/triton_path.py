"""Products on the INT8 units of NVIDIA GPUs, by Triton kernels.

The input is rounded to bytes by `fpformats`. One kernel then reads the weight, as codes of 4 bits
if they have such, multiplies, scales and adds the bias. It gives the defined bits.
"""

from __future__ import annotations

import functools
import importlib
import itertools
import warnings
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from fpformats import E2M1, FloatFormat, StepEncoder, decode, pack, unpack
from msfp.layers.execution.definition import is_defined
from msfp.layers.execution.grids import MAX_SIGNED, IntegerGrids
from msfp.layers.execution.inputs import input_grid, is_unwatched, padded
from msfp.layers.execution.protocol import ProductLayer

CAPABILITY = (8, 0)
"""The oldest GPUs whose shared memory holds the tiles."""
TILES = ((128, 128), (64, 128), (64, 64), (32, 64), (16, 64))
"""Rows and output channels of a program, the most economical first."""
DEPTH, MIN_DEPTH = 128, 32
"""Number of products that are added at once: at most, and what int8 units need at least."""
CODE_BITS = 4
OFFSET = 128
"""What is subtracted from bytes beyond 127, so that they fit int8."""
IMAGES = 2
"""Number of spatial dimensions of the convolutions that the kernels compute."""


class Moves(NamedTuple):
    """How a convolution moves; the two numbers of each are for height and width."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    before: tuple[int, int]
    after: tuple[int, int]
    dilation: tuple[int, int]

    def out_size(self, height: int, width: int) -> tuple[int, int]:
        """Return the height and width of the output for those of an input."""
        sizes = [
            (length + self.before[axis] + self.after[axis] - self._reach(axis) - 1)
            // self.stride[axis]
            + 1
            for axis, length in enumerate((height, width))
        ]
        return sizes[0], sizes[1]

    def _reach(self, axis: int) -> int:
        return self.dilation[axis] * (self.kernel[axis] - 1)


class Weight(NamedTuple):
    """A weight as the kernels read it.

    Attributes:
        numbers: Int8, shape (outputs, kernel, channels); or its 4-bit codes, uint8.
        table: The numbers of the 16 codes, as two int64 of eight bytes; None without codes.
        correction: What is subtracted from the sums, int32, because zero is not the number 0; or
            None.
        outputs: Number of output channels.
    """

    numbers: torch.Tensor
    table: torch.Tensor | None
    correction: torch.Tensor | None
    outputs: int


class Prepared(NamedTuple):
    """What a product needs of a layer.

    Attributes:
        encode: Rounds inputs to int8, or to uint8 if some are beyond 127.
        zero: The int8 number that stands for zero.
        weight: The weight.
        input_step: What an input number counts, float32, shape ().
        weight_step: What weight numbers count, float32, shape (outputs,).
    """

    encode: StepEncoder
    zero: int
    weight: Weight
    input_step: torch.Tensor
    weight_step: torch.Tensor


class TritonPath:
    """Rounds the input to bytes, and multiplies them by weights of 4 or 8 bits on the GPU.

    Args:
        device: Type of the devices whose tensors are taken. Tests pass "cpu", where only Triton's
            interpreter can run the kernels.
    """

    def __init__(self, device: str = "cuda") -> None:
        self.device = device

    def runs(self, grids: IntegerGrids, device: torch.device) -> bool:
        """Return whether inputs have one scale, and the kernels give the defined bits here."""
        return (
            device.type == self.device
            and len(grids.parts) == 1
            and not grids.by_token
            and _is_supported(device)
            and agrees(device)
        )

    def takes(self, layer: ProductLayer, x: torch.Tensor) -> bool:
        """Return whether the product is defined, and nothing needs to see its operations.

        Such are gradients, compilers, transforms and modes of torch.
        """
        if torch.compiler.is_compiling() or x.device.type != self.device:
            return False
        if not is_unwatched(x) or not is_defined(layer, x):
            return False
        grids = layer.integer_grids
        return (
            isinstance(grids, IntegerGrids)
            and x.numel() > 0
            and _has_kernel(layer, x)
            and not (torch.is_grad_enabled() and (x.requires_grad or layer.needs_gradient))
            # Looking for NaN waits for the device, which a capture of a CUDA graph forbids.
            and not (x.is_cuda and torch.cuda.is_current_stream_capturing())
            and self.runs(grids, x.device)
        )

    def product(self, layer: ProductLayer, x: torch.Tensor, adapter: int) -> torch.Tensor | None:
        """Return the layer's output; None if the input has NaN, which no number stands for."""
        prepared = _prepared(layer, adapter)
        is_linear = not layer.kind.places
        if not is_linear:
            x = padded(layer, x)
        try:
            numbers = _numbers(prepared.encode, x) if is_linear else _pixels(prepared.encode, x)
        except ValueError:
            return None
        if is_linear:
            return multiply(prepared, numbers, layer.bias, x.dtype)
        return convolve(prepared, numbers, _moves(layer), layer.bias, x.dtype)


def _has_kernel(layer: ProductLayer, x: torch.Tensor) -> bool:
    """Return whether there is a kernel for a kind of layer, and the input has a shape for it."""
    if layer.kind.places:
        is_image = layer.kind.places == IMAGES and x.dim() == IMAGES + 2
        return is_image and layer.plain.groups == 1 and x.shape[1] == layer.plain.in_channels
    return x.dim() > 0 and x.shape[-1] == layer.plain.in_features


@functools.cache
def _kernels() -> Any:
    """Return the module of the kernels; None without Triton."""
    try:
        return importlib.import_module("msfp.layers.execution.triton_kernels")
    except ImportError:
        return None


@functools.cache
def _is_supported(device: torch.device) -> bool:
    """Return whether the kernels can be compiled for a device."""
    if _kernels() is None or torch.version.hip is not None:
        return False
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= CAPABILITY


def _prepared(layer: ProductLayer, adapter: int) -> Prepared:
    """Return what a product needs of a layer, kept if the layer keeps it."""
    if not layer.keeps:
        return prepare(layer, adapter)
    kept = layer.kept().setdefault(TritonPath, {})
    if adapter not in kept:
        kept[adapter] = prepare(layer, adapter)
    found: Prepared = kept[adapter]
    return found


@torch.no_grad()
def prepare(layer: ProductLayer, adapter: int) -> Prepared:
    """Return what the product with the weight of an adapter needs.

    Raises:
        ValueError: If the layer's product is not defined.
    """
    grids = layer.integer_grids
    if not isinstance(grids, IntegerGrids):
        raise ValueError(grids)
    grid, is_wide = input_grid(layer, grids, 0), grids.input.max_steps > MAX_SIGNED
    zero = grid.zero - (OFFSET if is_wide else 0)
    dtype = "uint8" if is_wide else "int8"
    encode = StepEncoder(grids.input, grid.scale, grid.shift, dtype=dtype)
    weight = prepare_weight(
        layer.weight_steps(adapter).to(torch.int8), zero, grids.weight, _codes(layer, adapter)
    )
    return Prepared(encode, zero, weight, grid.step, layer.weight_step.detach().contiguous())


def _codes(layer: Any, adapter: int) -> torch.Tensor | None:
    """Return the packed codes of an adapter's weight, or None if the layer has no codes."""
    codes: torch.Tensor | None = getattr(layer, "codes", None)
    return None if codes is None else codes.detach().view(layer.adapters, -1)[adapter]


def prepare_weight(
    numbers: torch.Tensor, zero: int, fmt: FloatFormat, codes: torch.Tensor | None
) -> Weight:
    """Return a weight as the kernels read it.

    Args:
        numbers: Whole numbers of steps, int8, shape (outputs, channels, ...).
        zero: The input number that stands for zero.
        fmt: Format of the weight.
        codes: The packed codes of `numbers`, or None.
    """
    last = numbers.movedim(1, -1).contiguous()
    correction = None
    if zero:
        correction = zero * last.flatten(1).sum(1, dtype=torch.int32)
    table = _table(fmt) if codes is not None and last.shape[-1] % 2 == 0 else None
    if codes is None or table is None:
        return Weight(last, None, correction, len(last))
    if last[0].numel() > last.shape[-1]:  # the codes have the channels before the kernel
        codes = pack(unpack(codes, CODE_BITS, shape=tuple(numbers.shape)).movedim(1, -1), CODE_BITS)
    return Weight(codes, table.to(codes.device), correction, len(last))


def _table(fmt: FloatFormat) -> torch.Tensor | None:
    """Return the numbers of a format's codes, as in `Weight`.

    It is None if codes are not of 4 bits, or if code 0 is not zero, as what lies beyond the edge
    of a weight must be.
    """
    if fmt.bits != CODE_BITS:
        return None
    codes = torch.arange(fmt.code_count, dtype=torch.uint8)
    numbers = (decode(codes, fmt) / fmt.step).nan_to_num(0, 0, 0).to(torch.int8)
    return numbers.view(torch.int64) if numbers[0] == 0 else None


def _numbers(encode: StepEncoder, x: torch.Tensor) -> torch.Tensor:
    """Return an input rounded to int8 numbers; raise ValueError if it has NaN."""
    numbers: torch.Tensor = encode(x)
    if numbers.dtype == torch.int8:
        return numbers
    return numbers.bitwise_xor_(OFFSET).view(torch.int8)  # the bits of the number minus 128


def _pixels(encode: StepEncoder, x: torch.Tensor) -> torch.Tensor:
    """Return images rounded to int8 numbers, with the channels last."""
    if not x.is_contiguous():
        return _numbers(encode, x.permute(0, 2, 3, 1)).contiguous()
    # Bytes are rearranged faster than the numbers that they are made of.
    return _numbers(encode, x).permute(0, 2, 3, 1).contiguous()


def _moves(layer: ProductLayer) -> Moves:
    """Return how a convolution moves; without padding that has been added before."""
    plain = layer.plain
    left, right, top, bottom = plain._reversed_padding_repeated_twice
    if plain.padding_mode != "zeros":
        left = right = top = bottom = 0
    return Moves(plain.kernel_size, plain.stride, (top, left), (bottom, right), plain.dilation)


def multiply(
    prepared: Prepared,
    numbers: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
    tile: tuple[int, int] | None = None,
) -> torch.Tensor:
    """Return the defined output of a linear layer.

    Args:
        prepared: What is needed of the layer.
        numbers: The rounded input, int8, contiguous, shape (..., features).
        bias: The bias or None.
        dtype: What the output is rounded to.
        tile: One of `TILES`, or None for the fastest.
    """
    channels = numbers.shape[-1]
    rows, outputs = numbers.numel() // channels, prepared.weight.outputs
    out = numbers.new_empty((*numbers.shape[:-1], outputs), dtype=dtype)
    sizes = (rows, outputs, channels)
    _launch(_kernels().linear_kernel, prepared, numbers, out, bias, sizes, tile)
    return out


def convolve(
    prepared: Prepared,
    numbers: torch.Tensor,
    moves: Moves,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
    tile: tuple[int, int] | None = None,
) -> torch.Tensor:
    """Return the defined output of a convolution, with the channels last in memory.

    Args:
        prepared: What is needed of the layer.
        numbers: The rounded input, int8, contiguous, shape (batch, height, width, channels).
        moves: How the convolution moves.
        bias: The bias or None.
        dtype: What the output is rounded to.
        tile: One of `TILES`, or None for the fastest.
    """
    batch, height, width, channels = numbers.shape
    out_height, out_width = moves.out_size(height, width)
    outputs = prepared.weight.outputs
    out = numbers.new_empty((batch, out_height, out_width, outputs), dtype=dtype)
    _launch(
        _kernels().convolution_kernel,
        prepared,
        numbers,
        out,
        bias,
        (batch * out_height * out_width, outputs, channels),
        tile,
        height=height,
        width=width,
        out_height=out_height,
        out_width=out_width,
        zero=prepared.zero,
        kernel_height=moves.kernel[0],
        kernel_width=moves.kernel[1],
        stride_height=moves.stride[0],
        stride_width=moves.stride[1],
        top=moves.before[0],
        left=moves.before[1],
        dilation_height=moves.dilation[0],
        dilation_width=moves.dilation[1],
    )
    return out.permute(0, 3, 1, 2)


def _launch(
    kernel: Any,
    prepared: Prepared,
    numbers: torch.Tensor,
    out: torch.Tensor,
    bias: torch.Tensor | None,
    sizes: tuple[int, int, int],
    tile: tuple[int, int] | None,
    **geometry: int,
) -> None:
    """Compute all tiles of the output.

    Args:
        kernel: The kernel.
        prepared: What is needed of the layer.
        numbers: The rounded input.
        out: Where to write to.
        bias: The bias or None.
        sizes: Number of rows and columns of the output as a matrix, and of input channels.
        tile: One of `TILES`, or None for the fastest.
        geometry: The other arguments of the kernel.
    """
    rows, outputs, channels = sizes
    block_m, block_n = tile or _tile(rows, outputs, _processors(numbers.device))
    weight = prepared.weight
    with torch.cuda.device_of(numbers):
        kernel[(_tiles(rows, outputs, block_m, block_n),)](
            numbers,
            weight.numbers,
            out,
            weight.table,
            weight.correction,
            prepared.input_step,
            prepared.weight_step,
            None if bias is None else bias.detach(),
            *sizes,
            **geometry,
            block_m=block_m,
            block_n=block_n,
            block_k=max(min(DEPTH, 1 << (channels - 1).bit_length()), MIN_DEPTH),
            num_warps=8 if block_m * block_n > TILES[1][0] * TILES[1][1] else 4,
            num_stages=3,
            enable_fp_fusion=False,
        )


def _tiles(rows: int, outputs: int, block_m: int, block_n: int) -> int:
    return -(-rows // block_m) * -(-outputs // block_n)


@functools.lru_cache(maxsize=4096)
def _tile(rows: int, outputs: int, processors: int) -> tuple[int, int]:
    """Return the largest tile with which all processors of the device have work."""
    fitting = [each for each in TILES if each[0] < 2 * rows] or [TILES[-1]]
    busy = (each for each in fitting if _tiles(rows, outputs, *each) >= processors)
    return next(busy, fitting[-1])


@functools.cache
def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1
    count: int = torch.cuda.get_device_properties(device).multi_processor_count
    return count


class Example(NamedTuple):
    """What a device is checked with: kernels that differ in what they read and in their tile."""

    tile: tuple[int, int]
    has_codes: bool
    zero: int
    dtype: torch.dtype


MOVES = (None, Moves((3, 2), (2, 1), (1, 2), (0, 1), (1, 2)))
"""How the layers of examples move; None is a linear layer."""
EXAMPLES = (
    Example(TILES[-1], False, 0, torch.float32),
    Example(TILES[0], False, -OFFSET, torch.float32),
    Example(TILES[0], True, 3, torch.bfloat16),
)


@functools.cache
def agrees(device: torch.device) -> bool:
    """Return whether the kernels give the defined bits on a device, and warn if not."""
    try:
        cases = itertools.product(EXAMPLES, MOVES)
        same = all(_agrees(device, *case) for case in cases)
        why = "other bits than defined"
    except Exception as error:  # compilers fail in many ways
        same, why = False, (str(error).splitlines() or [type(error).__name__])[0]
    if not same:
        warnings.warn(
            f"quantized layers are computed in floating point on {device}: the integer kernels "
            f"fail there ({why})",
            stacklevel=4,
        )
    return same


@torch.no_grad()
def _agrees(device: torch.device, example: Example, moves: Moves | None) -> bool:
    """Compare a kernel with the definition for one kind of layer."""
    draw = torch.Generator().manual_seed(0)
    kernel = () if moves is None else moves.kernel
    codes = torch.randint(16, (40, 160, *kernel), generator=draw, dtype=torch.uint8)
    weights = (decode(codes, E2M1) / E2M1.step).to(torch.int8)
    x = torch.randint(-128, 128, (19, 160) if moves is None else (2, 160, 5, 6), generator=draw)
    step, bias = torch.rand(40, generator=draw) / 100 + 1e-3, torch.randn(40, generator=draw)
    packed = pack(codes, CODE_BITS).to(device) if example.has_codes else None
    weight = prepare_weight(weights.to(device), example.zero, E2M1, packed)
    encode, input_step = StepEncoder(E2M1, 1.0), torch.tensor(0.3)
    prepared = Prepared(encode, example.zero, weight, input_step.to(device), step.to(device))
    numbers, given = x.to(device, torch.int8), (bias.to(device), example.dtype, example.tile)
    if moves is None:
        y = multiply(prepared, numbers, *given)
    else:
        y = convolve(prepared, numbers.permute(0, 2, 3, 1).contiguous(), moves, *given)
    row = (-1,) if moves is None else (-1, 1, 1)
    sums = _sums(x.double() - example.zero, weights.double(), moves)
    wanted = sums.float() * input_step * step.view(row) + bias.view(row)
    return torch.equal(y.cpu(), wanted.to(example.dtype))


def _sums(n: torch.Tensor, m: torch.Tensor, moves: Moves | None) -> torch.Tensor:
    """Return the sums of products in float64, which are exact."""
    if moves is None:
        return F.linear(n, m)
    (top, left), (bottom, right) = moves.before, moves.after
    padded = F.pad(n, (left, right, top, bottom))
    return F.conv2d(padded, m, None, moves.stride, 0, moves.dilation)
