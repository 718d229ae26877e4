"""Which activation function computed a tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Self

import torch
from torch.overrides import TorchFunctionMode

ACTIVATIONS = {
    "silu": "SiLU",
    "gelu": "GELU",
    "relu": "ReLU",
    "softmax": "softmax",
    "sigmoid": "sigmoid",
    "mish": "Mish",
    "hardswish": "Hardswish",
}
"""The names of torch functions, and the names of the layers that apply them."""


class ActivationTrace(TorchFunctionMode):
    """Records the outputs of activation functions inside a `with` block.

    A tensor is identified by the address of its memory. Reshaping, and dropout in evaluation mode,
    therefore keep its record. If another function writes a new tensor into the same memory, the
    record is deleted.

    Example:
        >>> with ActivationTrace() as trace:
        ...     y = torch.nn.SiLU()(torch.zeros(2, 3))
        ...     trace.function_of(y.flatten()), trace.function_of(y + 1)
        ('SiLU', None)
    """

    def __init__(self) -> None:
        super().__init__()
        self._names: dict[int, str] = {}

    def __enter__(self) -> Self:
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: object) -> None:
        self._names.clear()
        super().__exit__(*error)  # type: ignore[no-untyped-call]

    def function_of(self, x: torch.Tensor) -> str | None:
        """Return the name of the activation function that wrote a tensor, or None."""
        return self._names.get(_place(x))

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Call a torch function and update the record of its output."""
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and has_memory(result):
            place = _place(result)
            name = ACTIVATIONS.get(getattr(func, "__name__", "").rstrip("_"))
            if name is not None:
                self._names[place] = name
            elif place in self._names and not _reads(args, place):
                del self._names[place]
        return result


def has_memory(x: torch.Tensor) -> bool:
    """Return whether a tensor has an address: a dense tensor that torch.vmap does not wrap."""
    wrapped: bool = torch._C._functorch.is_functorch_wrapped_tensor(x)
    return x.layout is torch.strided and not wrapped


def _place(x: torch.Tensor) -> int:
    return x.untyped_storage().data_ptr()


def _reads(args: tuple[Any, ...], place: int) -> bool:
    """Return whether one of the arguments has its memory at a given address."""
    return any(
        isinstance(arg, torch.Tensor) and has_memory(arg) and _place(arg) == place for arg in args
    )
