"""The weight of a packed layer as other code sees it: a copy that cannot be changed by mistake."""

from __future__ import annotations

from typing import Any

import torch

from msfp.errors import InputError

DESCRIPTION = ("__get__", "dim", "numel", "size")
"""The functions that only describe a tensor; `__get__` reads its attributes."""


class DequantizedWeight(torch.Tensor):
    """The weight of a packed layer for other code: a copy, which cannot change the layer."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @property
    def data(self) -> torch.Tensor:  # type: ignore[override]
        """The description of the weight, such as its shape, without its numbers."""
        return self.as_subclass(WeightDescription)


class WeightDescription(torch.Tensor):
    """The `data` of a packed weight: diffusers reads its shape and dtype, which is allowed.

    Its numbers cannot be used. A change, such as merging a LoRA, would be lost in the copy, and
    projections fused from copies would not be quantized.
    """

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Return what describes the weight; raise InputError for everything else."""
        if func.__name__ in DESCRIPTION:
            return super().__torch_function__(func, types, args, kwargs)  # type: ignore[no-untyped-call]
        raise InputError(
            "the weight of a quantized layer is packed: nothing can be merged into it or fused "
            "with it; keep LoRAs beside it, call msfp.fuse_lora, or call dequantize() on the "
            "denoiser first"
        )
