"""Triton kernels on tensors of a CUDA device, in one pass over memory.

`plan_of` gives None if the kernels do not take the input. The caller then uses whole-array
operations, which give the same bits.
"""

from __future__ import annotations

import functools
import importlib
import sys
from typing import TYPE_CHECKING, Any

from fpformats.engine import memory
from fpformats.engine.arrays import cast, is_unwatched_tensor
from fpformats.engine.scales import Scales, lay_out
from fpformats.kernels.native import NAN_IN, NAN_OUT
from fpformats.kernels.plan import Plan, make_plan
from fpformats.rounding import DEFAULT, Policy

if TYPE_CHECKING:
    from fpformats.formats import FloatFormat
    from fpformats.kernels.grid import FloatDtype


@functools.cache
def launches() -> Any:
    """Give the module that launches the kernels; None if Triton is missing or too old."""
    try:
        return importlib.import_module("fpformats.kernels.cuda")
    except ImportError:
        return None


def packs(bits: int) -> bool:
    """Tell whether the kernels can pack codes of a width."""
    return bits in launches().PACKED_BITS


def is_there(x: Any) -> bool:
    """Tell whether `x` is a tensor in the memory of an NVIDIA CUDA device."""
    torch = sys.modules.get("torch")
    return (
        torch is not None
        and type(x) in (torch.Tensor, torch.nn.Parameter)
        and x.is_cuda
        and torch.version.hip is None
    )


def plan_of(
    x: Any,
    fmt: FloatFormat,
    dtype: FloatDtype,
    policy: Policy = DEFAULT,
    scales: Scales | None = None,
) -> Plan | None:
    """Give the plan for values of a dtype on the device of `x`, or None if kernels refuse it."""
    others = [policy.random, *(scales[:2] if scales is not None else ())]
    tensors = [x, *(t for t in others if hasattr(t, "shape"))]
    if not all(is_there(t) and is_unwatched_tensor(t) for t in tensors) or launches() is None:
        return None
    return _plan_of(fmt, dtype, policy.rounding, policy.saturation)


def quantize(
    plan: Plan, x: Any, policy: Policy = DEFAULT, scales: Scales | None = None, out: Any = None
) -> Any:
    """Round the elements of a tensor.

    Args:
        plan: The result of `plan_of` for `x`.
        x: Tensor of any strides.
        policy: The policy of the plan.
        scales: Scales and zero points, or None.
        out: Tensor like `x` to write to; may be `x` or overlap it.

    Returns:
        `out`, or a new tensor.
    """
    source, operands = x.contiguous(), _operands(scales, policy, tuple(x.shape))
    read = [*(operands["scaling"] or ())[:2], policy.random if is_there(policy.random) else None]
    result = out
    if not memory.may_write(out, source, read, in_place=True):
        result = memory.empty_like(source)
    launches().quantize(source, plan, result, **operands)
    return memory.written(out, result)


def encode(
    plan: Plan,
    x: Any,
    nan_code: int | None,
    packed_bits: int | None = None,
    policy: Policy = DEFAULT,
    scales: Scales | None = None,
) -> tuple[Any, int]:
    """Give the codes of the elements of a tensor.

    Args:
        plan: The result of `plan_of` for `x`.
        x: Tensor of any strides.
        nan_code: Code of NaN. None if there is none; the call then waits for the device.
        packed_bits: Width to pack the codes with, one that `packs` accepts; None to not pack.
        policy: The policy of the plan.
        scales: Scales and zero points, or None.

    Returns:
        The codes; and `NAN_IN` or `NAN_OUT` if there was NaN without a code for it, else 0.
    """
    codes, seen = launches().encode(
        x.contiguous(),
        plan,
        nan_code,
        packed_bits=packed_bits,
        **_operands(scales, policy, tuple(x.shape)),
    )
    return codes, (0, NAN_OUT, NAN_IN)[0 if seen is None else int(seen)]


def count_steps(
    plan: Plan, x: Any, offset: int, dtype: str, scales: Scales | None = None
) -> tuple[Any, int]:
    """Give the values of the elements of a tensor as numbers of steps; this waits for the device.

    Args:
        plan: The result of `plan_of` for `x`.
        x: Tensor of any strides.
        offset: What is added to each number.
        dtype: "uint8" or "int8".
        scales: Scales and zero points, or None.

    Returns:
        The numbers; and `NAN_IN` if there was NaN, else 0.
    """
    scaling = _operands(scales, DEFAULT, tuple(x.shape))["scaling"]
    wanted = getattr(sys.modules["torch"], dtype)
    steps, seen = launches().count_steps(x.contiguous(), plan, offset, wanted, scaling=scaling)
    return steps, NAN_IN if int(seen) else 0


def decode(
    plan: Plan,
    codes: Any,
    dtype: FloatDtype,
    shape: tuple[int, ...],
    packed_bits: int | None = None,
    scales: Scales | None = None,
) -> Any:
    """Give the values of codes that are in range.

    Args:
        plan: The result of `plan_of` for `codes`.
        codes: Tensor of integers, or of bytes if the codes are packed.
        dtype: Dtype of the result.
        shape: Shape of the result.
        packed_bits: Width of packed codes, None if they are not packed.
        scales: Scales and zero points, or None.

    Returns:
        Values of the dtype.
    """
    source = codes.contiguous()
    values = memory.empty(source, shape, dtype.name)
    scaling = _operands(scales, DEFAULT, shape)["scaling"]
    launches().decode(source, plan, values, packed_bits=packed_bits, scaling=scaling)
    return values


_plan_of = functools.lru_cache(maxsize=4096)(make_plan)


def _operands(scales: Scales | None, policy: Policy, shape: tuple[int, ...]) -> dict[str, Any]:
    scaling = None
    if scales is not None and 0 not in shape:
        scale, zero_point, layout = lay_out(scales, shape)
        scaling = launches().Scaling(scale, zero_point, layout)
    random = policy.random
    if random is not None and not isinstance(random, int):
        random = cast(random, "int64").contiguous()
    return {"scaling": scaling, "random": random, "random_bits": policy.random_bits}
