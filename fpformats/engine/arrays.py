"""The inputs of callers: NumPy arrays, torch tensors and Python numbers, and their dtypes."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Hashable
from typing import TYPE_CHECKING, Any

import numpy as np

from fpformats.kernels.grid import FLOAT_DTYPES, FloatDtype, Grid, holds, make_grid

if TYPE_CHECKING:
    from types import ModuleType

    from fpformats.formats import FloatFormat


def is_tensor(x: object) -> bool:
    """Tell whether `x` is a torch tensor, without importing torch.

    If `x` is a tensor, torch has been imported before.
    """
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(x, torch.Tensor)


def is_compiling() -> bool:
    """Tell whether torch.compile is tracing; values cannot be read then."""
    torch = sys.modules.get("torch")
    return torch is not None and bool(torch.compiler.is_compiling())


def is_batched(x: object) -> bool:
    """Tell whether `x` stands for many tensors under torch.vmap, at any level."""
    return any(sys.modules["torch"]._C._functorch.is_batchedtensor(t) for t in _levels(x)[:-1])


def is_plain_tensor(x: Any) -> bool:
    """Tell whether `x` is a tensor in host memory, and nothing intercepts operations on it."""
    torch = sys.modules.get("torch")
    if torch is None or type(x) not in (torch.Tensor, torch.nn.Parameter):
        return False
    return bool(x.is_cpu) and is_unwatched_tensor(x)


def is_unwatched_tensor(x: Any) -> bool:
    """Tell whether a tensor is dense, and no compiler, transform or mode intercepts operations."""
    torch = sys.modules["torch"]
    internals = torch._C
    return (
        not torch.compiler.is_compiling()
        and torch.autograd.forward_ad._current_level < 0
        and x.layout is torch.strided
        and not internals._functorch.is_functorch_wrapped_tensor(x)
        and not internals._len_torch_dispatch_stack()
        and internals._get_tracing_state() is None
        and not x.is_neg()
    )


def is_hidden(x: Any) -> bool:
    """Tell whether the values of `x` cannot be read.

    This holds under torch.compile and torch.vmap, and for tensors without memory: meta and fake
    tensors.
    """
    return is_compiling() or is_batched(x) or _is_empty_shell(x)


def _is_empty_shell(x: Any) -> bool:
    if not is_tensor(x):
        return False
    fakes = sys.modules.get("torch._subclasses.fake_tensor")  # not loaded: no fake tensors exist
    return bool(x.is_meta) or (fakes is not None and isinstance(x, fakes.FakeTensor))


def library_of(x: object) -> ModuleType:
    """Give the library of `x`: the module torch or numpy."""
    return sys.modules["torch"] if is_tensor(x) else np


def float_dtype_of(x: Any, argument: str = "x") -> FloatDtype:
    """Give the dtype of `x`; a Python float is a float64.

    Raises:
        TypeError: If `x` is not a floating-point array, tensor or number of a known width.
    """
    if isinstance(x, float):
        return FLOAT_DTYPES["float64"]
    if isinstance(x, int):
        raise TypeError(f"{argument} is of type {type(x).__name__}; write float({argument})")
    refuse_list(x, argument)
    if not (is_tensor(x) or isinstance(x, (np.ndarray, np.generic))):
        raise TypeError(
            f"{argument} is a {type(x).__name__}; it must be a NumPy array, a torch tensor or a "
            "float"
        )
    return float_dtype_named(x.dtype, argument)


def refuse_list(x: Any, argument: str) -> None:
    """Raise TypeError, with what to write, if an argument is a list or tuple."""
    if isinstance(x, (list, tuple)):
        kind, write = type(x).__name__, f"numpy.array({argument}) or torch.tensor({argument})"
        raise TypeError(f"{argument} is of type {kind}; write {write}")


def float_dtype_named(dtype: Any, argument: str = "dtype") -> FloatDtype:
    """Give the `FloatDtype` of a NumPy or torch dtype, or of its name.

    Raises:
        TypeError: If there is none.
    """
    if not isinstance(dtype, Hashable):
        raise TypeError(f"{argument} is {dtype!r}; allowed: {', '.join(FLOAT_DTYPES)}")
    if (known := _known_dtypes.get(dtype)) is not None and not is_compiling():
        return known
    name = str(dtype).removeprefix("torch.") if not isinstance(dtype, type) else dtype.__name__
    if name not in FLOAT_DTYPES:
        convert = name.startswith(("int", "uint", "bool")) and argument != "dtype"
        write = f"; write {argument}.astype('float32') or {argument}.float()" if convert else ""
        raise TypeError(f"{argument} has dtype {name}; allowed: {', '.join(FLOAT_DTYPES)}{write}")
    if not is_compiling():
        _known_dtypes[dtype] = FLOAT_DTYPES[name]
    return FLOAT_DTYPES[name]


_known_dtypes: dict[Any, FloatDtype] = {}
"""A cache, because making the name of a dtype takes longer than rounding a small array."""


def result_dtype(dtype: Any, codes: Any) -> FloatDtype:
    """Give the dtype to decode codes to.

    Raises:
        TypeError: If it is unknown, or NumPy does not have it and the codes are not a tensor.
    """
    found = float_dtype_named(dtype)
    if found.name == "bfloat16" and not is_tensor(codes):
        raise TypeError("dtype is bfloat16, which NumPy does not have; give codes as a tensor")
    return found


def compute_dtype(dtype: FloatDtype) -> FloatDtype:
    """Give the compute dtype of the kernels: float64 for float64, else float32."""
    return FLOAT_DTYPES["float64" if dtype.name == "float64" else "float32"]


def grid_of(fmt: FloatFormat, dtype: FloatDtype) -> Grid:
    """Give the kernel parameters of a format for values held in a dtype.

    Raises:
        ValueError: If the dtype cannot hold every value of the format.
    """
    # torch.compile traces the function behind a cache anyway, and warns about the cache.
    return (_make_grid if is_compiling() else _cached_grid)(fmt, dtype)


def widened(x: Any, dtype: FloatDtype) -> Any:
    """Convert `x` exactly to an array of a compute dtype, of at least one dimension."""
    if is_tensor(x):
        return cast(x.detach(), dtype.name)
    return np.atleast_1d(np.asarray(x, dtype=dtype.name))


def cast(y: Any, dtype: str) -> Any:
    """Convert an array or tensor to the dtype of a name."""
    if is_tensor(y):
        return y.to(getattr(sys.modules["torch"], dtype))
    return y.astype(dtype, copy=False)


def contiguous(values: Any) -> Any:
    """Give values aligned and in row-major order; copy them only if they are not."""
    if is_tensor(values):
        return values.contiguous()
    return values if values.flags.c_contiguous and values.flags.aligned else values.copy(order="C")


def as_array(x: Any) -> Any:
    """Turn a number into an array of one dimension; return arrays and tensors unchanged."""
    return x if is_tensor(x) or isinstance(x, np.ndarray) else np.atleast_1d(np.asarray(x))


def take_blocks(values: Any, size: int, axis: int, length: int) -> Any:
    """Repeat each entry along an axis for the elements of its block, to a given length."""
    if is_tensor(values):
        index = library_of(values).arange(length, device=values.device) // size
        return values.index_select(axis, index)
    return np.take(values, np.arange(length) // size, axis)


def padded(xp: ModuleType, x: Any, multiple: int) -> Any:
    """Pad the last axis of an array with zeros to a multiple of a length."""
    missing = -x.shape[-1] % multiple
    if missing == 0:
        return x
    zeros = xp.zeros_like(x[..., :1])
    return xp.concatenate([x, *[zeros] * missing], -1)


def shaped(y: Any, x: Any) -> Any:
    """Give a result the kind and shape of the input `x`: an array, a tensor or a number."""
    if is_tensor(x):
        return y
    if isinstance(x, np.ndarray):
        return y.reshape(x.shape)
    return y[0] if isinstance(x, np.generic) else y.item()


def narrowed(y: Any, x: Any, out: Any = None) -> Any:
    """Give a result the kind, shape and dtype of the input `x`, in `out` if there is one."""
    if out is None:
        return shaped(cast(y, float_dtype_of(x).name), x)
    if is_tensor(x):
        return out.copy_(y)
    out[...] = y.reshape(out.shape)
    return out


def check_out(out: Any, x: Any) -> None:
    """Check that `out` can take a result of the kind, shape and dtype of `x`.

    Raises:
        TypeError: If it is of another library or dtype.
        ValueError: If its shape or device differ, or gradients would have to pass through it.
    """
    if out is None:
        return
    if not isinstance(out, np.ndarray) and not is_tensor(out):
        raise TypeError(f"out is a {type(out).__name__}; it must be an array or a tensor")
    alike = is_tensor(out) == is_tensor(x) and hasattr(x, "dtype")
    if not alike or out.dtype != x.dtype:
        raise TypeError(f"out is {_describe(out)}; x is {_describe(x)}, and out must be alike")
    if tuple(out.shape) != tuple(x.shape):
        raise ValueError(f"out has shape {tuple(out.shape)}; x has shape {tuple(x.shape)}")
    if is_tensor(out) and out.device != x.device:
        raise ValueError(f"out is on {out.device}; x is on {x.device}")
    check_writable(out)


def check_target(out: Any, source: Any, dtype: str, shape: tuple[int, ...] | None) -> None:
    """Check that `out` can take a result whose dtype differs from that of its source.

    Without a shape, the result has the shape of the source.

    Raises:
        TypeError: If it is of another library than `source`, or not of the dtype.
        ValueError: If its shape or device differ.
    """
    if out is None:
        return
    if not isinstance(out, np.ndarray) and not is_tensor(out):
        raise TypeError(f"out is a {type(out).__name__}; it must be an array or a tensor")
    name = str(out.dtype).removeprefix("torch.")
    if is_tensor(out) != is_tensor(source) or not hasattr(source, "dtype") or name != dtype:
        given, kind = _describe(out), type(source).__name__
        raise TypeError(f"out is {given}; it must be {dtype}, and a {kind} as the input is")
    wanted = tuple(source.shape) if shape is None else shape
    if tuple(out.shape) != wanted:
        raise ValueError(f"out has shape {tuple(out.shape)}; the result has shape {wanted}")
    if is_tensor(out) and out.device != source.device:
        raise ValueError(f"out is on {out.device}; the input is on {source.device}")
    check_writable(out)


def check_writable(out: Any) -> None:
    """Check that `out` may be written to.

    Raises:
        ValueError: If it is read-only, or a gradient would have to pass through it.
    """
    if isinstance(out, np.ndarray) and not out.flags.writeable:
        raise ValueError("out is read-only")
    if learns(out) and sys.modules["torch"].is_grad_enabled():
        raise ValueError("out requires a gradient, which cannot pass; use torch.no_grad()")


def assigned(out: Any, result: Any) -> Any:
    """Copy a result to `out`, of the same shape, unless it is `out` already or `out` is None."""
    if out is None or result is out:
        return result
    if isinstance(out, np.ndarray):
        out[...] = result
        return out
    return out.copy_(result)


def check_codes(codes: Any, bits: int, owner: str) -> None:
    """Check that `codes` are integers of at most `bits` bits.

    Under torch.compile, only the dtype is checked.

    Raises:
        TypeError: If they are not integers.
        ValueError: If one is negative or too large for `owner`.
    """
    _check_integers(codes, bits, "codes", f"{owner} has codes")


def check_words(random: Any, bits: int, x: Any) -> None:
    """Check that `random` is None, a seed, or an array of words with the library and shape of `x`.

    Raises:
        TypeError: If it is none of these, or of another library than `x`.
        ValueError: If the seed or a word is out of range (words are not checked under
            torch.compile), or the shape is not that of `x`.
    """
    if random is None:
        return
    if isinstance(random, int) and not isinstance(random, bool):
        if not 0 <= random < 1 << 64:
            raise ValueError(f"random is the seed {random}; seeds are 0 to 2**64 - 1")
        return
    is_array = is_tensor(random) or isinstance(random, (np.ndarray, np.generic))
    if not is_array or is_tensor(random) != is_tensor(x):
        raise TypeError(
            f"random is a {type(random).__name__}; it must be a seed, a generator of NumPy or "
            f"torch, or an array of the library of x, which is a {type(x).__name__}"
        )
    if tuple(random.shape) != tuple(getattr(x, "shape", ())):
        shape = tuple(getattr(x, "shape", ()))
        raise ValueError(f"random has shape {tuple(random.shape)}; x has shape {shape}")
    _check_integers(random, bits, "random", f"words of {bits} bits are")


def drawn(random: Any) -> Any:
    """Draw a seed from a generator of NumPy or torch; return anything else unchanged."""
    if isinstance(random, np.random.Generator):
        return int.from_bytes(random.bytes(8), "little")
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(random, torch.Generator):
        options = {"generator": random, "device": random.device}
        return int.from_bytes(torch.randint(256, (8,), **options).tolist(), "little")
    return random


def learns(x: object) -> bool:
    """Tell whether `x` is a tensor that requires a gradient, at any level of torch.func."""
    return is_tensor(x) and any(level.requires_grad for level in _levels(x))


def in_forward_mode() -> bool:
    """Tell whether tensors may have tangents of forward-mode differentiation."""
    # torch has no public function for this.
    return not is_compiling() and sys.modules["torch"].autograd.forward_ad._current_level >= 0


def is_dual(x: object) -> bool:
    """Tell whether `x` is a tensor with a tangent, at any level of torch.func."""
    if not is_tensor(x) or not in_forward_mode():
        return False
    unpack = sys.modules["torch"].autograd.forward_ad.unpack_dual
    return any(unpack(level).tangent is not None for level in _levels(x))


def needs_gradient(*inputs: Any, out: Any) -> bool:
    """Tell whether a gradient or a tangent must pass between an input and the result.

    Raises:
        ValueError: If one must, and writing to `out` would cut it off.
    """
    learning = any(map(learns, inputs)) and sys.modules["torch"].is_grad_enabled()
    if not learning and not any(map(is_dual, inputs)):
        return False
    if out is not None:
        raise ValueError("out is given, but an input requires a gradient; leave out= away")
    return True


def quiet() -> contextlib.AbstractContextManager[object]:
    """Suppress NumPy's warnings of overflow in results that are not used."""
    if is_compiling():
        return contextlib.nullcontext()
    return np.errstate(over="ignore", invalid="ignore")


def _check_integers(codes: Any, bits: int, argument: str, limits: str) -> None:
    refuse_list(codes, argument)
    name = str(getattr(codes, "dtype", type(codes).__name__)).removeprefix("torch.")
    if not name.startswith(("int", "uint")):
        raise TypeError(f"{argument} are of type {name}; they must be integers")
    if is_hidden(codes) or name == f"uint{bits}":
        return
    low, high = (codes, codes) if isinstance(codes, int) else _extremes(codes)
    if low < 0 or high >= 1 << bits:
        raise ValueError(f"{argument} are {low} to {high}; {limits} 0 to {(1 << bits) - 1}")


def _levels(x: Any) -> list[Any]:
    """Give `x` and, under the transforms of torch.func, the tensors that it wraps."""
    levels = [x]
    if is_tensor(x) and not is_compiling():
        functorch = sys.modules["torch"]._C._functorch  # there is no public function
        while functorch.is_functorch_wrapped_tensor(levels[-1]):
            levels.append(functorch.get_unwrapped(levels[-1]))
    return levels


def _extremes(codes: Any) -> tuple[int, int]:
    # torch has no minimum for its wider unsigned integers.
    plain = cast(codes, "int64") if is_tensor(codes) else np.asarray(codes)
    return (int(plain.min()), int(plain.max())) if 0 not in plain.shape else (0, 0)


def _describe(x: Any) -> str:
    return f"{type(x).__name__} of {getattr(x, 'dtype', 'float64')}"


def _make_grid(fmt: FloatFormat, dtype: FloatDtype) -> Grid:
    if not holds(dtype, fmt):
        wider = [name for name in ("float32", "float64") if holds(FLOAT_DTYPES[name], fmt)]
        advice = f"use {wider[0]}" if wider else "no array type does, use fpformats.exact"
        raise ValueError(f"{dtype.name} cannot hold every value of {fmt!r}; {advice}")
    return make_grid(fmt, compute_dtype(dtype))


_cached_grid = functools.cache(_make_grid)
