"""How many multiply-adds each weight of a network takes part in."""

from __future__ import annotations

import inspect
import math
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from msfp.search.activation_trace import has_memory

OF_ACTIVATIONS = ""
"""The key of products without a weight, such as those of attention."""
CONVOLUTIONS = {"conv1d", "conv2d", "conv3d"}
TRANSPOSED = {"conv_transpose1d", "conv_transpose2d", "conv_transpose3d"}
MATRIX_PRODUCTS = {"matmul", "__matmul__", "__rmatmul__", "mm", "bmm"}
ADDED_PRODUCTS = {"addmm", "baddbmm", "addbmm"}


class ProductTrace(TorchFunctionMode):
    """Counts multiply-adds inside a `with` block, by the name of the weight.

    A weight is identified by the address of its memory, so that slices and transposed weights
    count, however they are multiplied.

    Args:
        network: The network that has the weights.

    Attributes:
        counts: Number of multiply-adds by the name of the parameter.

    Example:
        >>> network = nn.Sequential(nn.Conv1d(3, 2, 5), nn.Linear(4, 7))
        >>> with ProductTrace(network) as trace:
        ...     y = network(torch.zeros(1, 3, 8))
        >>> trace.counts == {"0.weight": 2 * 4 * 3 * 5, "1.weight": 2 * 4 * 7}
        True
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self._names = {
            parameter.untyped_storage().data_ptr(): name
            for name, parameter in network.named_parameters()
            if has_memory(parameter) and not parameter.is_meta
        }

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Call a torch function and count its multiply-adds."""
        del types
        result = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if name == "multi_head_attention_forward":
            self._count_attention(args, kwargs or {})
            return result
        count = multiply_adds(name, [*args, *(kwargs or {}).values()], result)
        if count:
            self.counts[self._weight(args, kwargs or {})] += count
        return result

    def _count_attention(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Count the projections and the products of attention, which torch computes in one call."""
        given = inspect.signature(F.multi_head_attention_forward).bind(*args, **kwargs).arguments
        query, key, value = given["query"], given["key"], given["value"]
        width = given["embed_dim_to_check"]
        tokens, others = query.numel() // width, key.numel() // key.shape[-1]
        projected = tokens * width + others * (key.shape[-1] + value.shape[-1])
        keys = key.shape[0]  # of one sample: the batch, if any, is the second dimension
        for weight, count in (
            (given["in_proj_weight"], projected * width),
            (given["out_proj_weight"], tokens * width * width),
        ):
            self.counts[self._weight((weight,), {})] += count
        self.counts[OF_ACTIVATIONS] += 2 * tokens * keys * width

    def _weight(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
        """Return the name of the weight among the arguments of a function."""
        for value in (*args, *kwargs.values()):
            if isinstance(value, torch.Tensor) and value.dim() > 1 and has_memory(value):
                name = self._names.get(value.untyped_storage().data_ptr())
                if name is not None:
                    return name
        return OF_ACTIVATIONS


def multiply_adds(name: str, args: list[Any], result: Any) -> int:
    """Return the multiply-adds of a call of a torch function; 0 for one that does not multiply.

    Args:
        name: Name of the function.
        args: Its arguments, in their order.
        result: What it returned.

    Example:
        >>> x, w = torch.zeros(5, 8), torch.zeros(3, 8)
        >>> multiply_adds("linear", [x, w], torch.zeros(5, 3))
        120
    """
    tensors = [each for each in args if isinstance(each, torch.Tensor)]
    if not isinstance(result, torch.Tensor) or len(tensors) < 2:
        return _of_einsum(args) if name == "einsum" and isinstance(result, torch.Tensor) else 0
    first, second = tensors[:2]
    if name == "linear":
        return result.numel() * second.shape[-1]
    if name in CONVOLUTIONS:
        return result.numel() * math.prod(second.shape[1:])
    if name in TRANSPOSED:
        return first.numel() * math.prod(second.shape[1:])
    if name in MATRIX_PRODUCTS:
        return result.numel() * first.shape[-1]
    if name in ADDED_PRODUCTS:
        return result.numel() * second.shape[-1]
    if name == "scaled_dot_product_attention":
        return (
            first.numel()
            // first.shape[-1]
            * second.shape[-2]
            * (first.shape[-1] + result.shape[-1])
        )
    return _of_einsum(args) if name == "einsum" else 0


def _of_einsum(args: list[Any]) -> int:
    """Return the multiply-adds of a sum over products of two tensors or more."""
    if not isinstance(args[0], str):
        return 0
    operands = args[1] if isinstance(args[1], list | tuple) else args[1:]
    if len(operands) < 2:
        return 0
    terms = args[0].replace(" ", "").split("->")[0].split(",")
    sizes: dict[str, int] = {}
    for term, operand in zip(terms, operands, strict=True):
        named = term.replace("...", "." * (operand.dim() - len(term) + 3))
        for place, (letter, size) in enumerate(zip(named, operand.shape, strict=True)):
            sizes[f".{place}" if letter == "." else letter] = size
    return math.prod(sizes.values())
