"""Training in one process or in several, on top of HF Accelerate.

The trained parameters are small compared with the denoiser. Their gradients are therefore summed
over the processes in one exchange at the end of a step, and the denoiser needs no wrapper.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, is_tensorboard_available
from torch import nn

from msfp.errors import InputError
from msfp.training.config import Precision

_MAKING = threading.Lock()
WRAPPERS = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)
"""Distributed types of Accelerate that wrap the denoiser in another module."""


def accelerator(
    device: torch.device, precision: Precision, tensorboard: Path | None = None
) -> Accelerator:
    """Return the Accelerator of this process, which `accelerate launch` may have set up.

    Args:
        device: Where the denoiser is.
        precision: Mixed precision.
        tensorboard: A folder to log to, or None.

    Raises:
        InputError: If the Accelerator of the process has another precision or wraps the denoiser,
            the device does not support the precision, or tensorboard is not installed.
    """
    if precision == "fp16" and device.type == "cpu":
        raise InputError(
            "precision must be 'no' or 'bf16' on a CPU, where gradients of 'fp16' are not scaled"
        )
    if tensorboard is not None and not is_tensorboard_available():
        raise InputError("tensorboard must be installed where its logs are asked for")
    with _MAKING:
        made = AcceleratorState._shared_state
        if made and AcceleratorState().mixed_precision != precision:
            raise InputError(
                f"precision must be {AcceleratorState().mixed_precision!r}, as that of the "
                f"Accelerator that this process has, not {precision!r}"
            )
        found = Accelerator(
            mixed_precision=precision,
            cpu=device.type == "cpu",
            log_with=None if tensorboard is None else "tensorboard",
            project_dir=tensorboard,
        )
        if found.distributed_type in WRAPPERS:
            raise InputError(
                f"accelerate must be launched without {found.distributed_type.value}, which "
                "wraps what is trained: shard=True (--shard) divides the weights among processes"
            )
        return found


def sum_gradients(parameters: Iterable[nn.Parameter], accelerator: Accelerator) -> None:
    """Replace gradients by their sum over the processes; missing gradients become zeros."""
    parameters = list(parameters)
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    if accelerator.num_processes == 1:
        return
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    flat = torch.cat([gradient.flatten().float() for gradient in gradients])
    flat = accelerator.reduce(flat, reduction="sum")
    sizes = [gradient.numel() for gradient in gradients]
    for gradient, summed in zip(gradients, flat.split(sizes), strict=True):
        gradient.copy_(summed.view_as(gradient))


def summed(number: float, accelerator: Accelerator) -> float:
    """Return the sum of a number over the processes."""
    if accelerator.num_processes == 1:
        return number
    total = accelerator.reduce(torch.tensor(number, device=accelerator.device), reduction="sum")
    return float(total)
