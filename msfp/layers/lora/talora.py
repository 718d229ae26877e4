"""Timestep-aware LoRA: a hub of low-rank adapters for each layer, of which a router chooses.

Its choices for the current forward stand in a `Routing` that every layer reads, so that nothing
depends on how often or in what order the denoiser is called.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn

from msfp.layers.lora.routers import Router
from msfp.pipelines.denoiser import denoiser_of, timestep_of

TURNS = 4
"""Steps in which each layer gives a learned router its gradient once."""
KNOWN_TIMESTEPS = 4096
"""How many timesteps a table of choices holds before it is begun anew."""


class LoRAHub(nn.Module):
    """Low-rank corrections of one weight matrix, in units of its mean quantization step.

    The correction of adapter k is `step * up[k] @ down[k]`; `up` starts at zero. Measuring it in
    steps lets one learning rate serve all layers.

    Args:
        out_features: Rows of the matrix.
        in_features: Columns; for a convolution input channels times kernel size.
        adapters: LoRAs in the hub.
        rank: Rank of each.
        step: The mean weight scale.
        generator: Source of the initial `down`.
        beside: Whether the correction is a branch beside the quantized weight, `Q(W) x + B A x`
            with x before it is rounded, and not inside the quantizer, `Q(W + B A) x`.

    Example:
        >>> hub = LoRAHub(4, 8, 2, 3, torch.tensor(0.1), torch.Generator().manual_seed(0))
        >>> hub.correction(1).shape, hub.correction(1).any().item()
        (torch.Size([4, 8]), False)
    """

    step: torch.Tensor

    def __init__(
        self,
        out_features: int,
        in_features: int,
        adapters: int,
        rank: int,
        step: torch.Tensor,
        generator: torch.Generator,
        *,
        beside: bool = False,
    ) -> None:
        super().__init__()
        down = torch.randn(adapters, rank, in_features, generator=generator) / rank**0.5
        self.down = nn.Parameter(down)
        self.up = nn.Parameter(torch.zeros(adapters, out_features, rank))
        self.register_buffer("step", step.detach().clone())
        self.beside = beside

    def factors(self, adapter: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the factors (rank, in_features) and (out_features, rank) of an adapter."""
        return self.down[adapter], self.step * self.up[adapter]

    def all_factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the factors of all adapters: (adapters, rank, in) and (adapters, out, rank)."""
        return self.down, self.step * self.up

    def correction(self, adapter: int) -> torch.Tensor:
        """Return the correction of an adapter, shape (out_features, in_features)."""
        down, up = self.factors(adapter)
        return up @ down


class Routing:
    """The router's choices for the forward that is running.

    Attributes:
        choices: One-hot, shape (n, layers, adapters), n the batch size or 1 where all samples are
            at one timestep.
        winners: The adapter chosen, shape (n, layers), on the CPU.
        table: Winners by timestep, read and filled where no gradient is wanted.
        source: The router that the table is of, and the state that it was in.
        turn: Which layers give the router a gradient: one in `TURNS`, from this one on, or all
            where it is None. The gradient of a choice costs as much as its LoRAs do.
    """

    choices: torch.Tensor
    winners: torch.Tensor
    table: dict[float, torch.Tensor]
    source: tuple[Router, tuple[Any, ...]] | None
    turn: int | None

    def __init__(self) -> None:
        self.clear()

    def update(self, router: Router, timesteps: torch.Tensor) -> None:
        """Route a batch whose timesteps are given, shape (1,) or (batch,).

        Without gradients, a router that is not being trained is asked once for each timestep that
        whole batches are at.
        """
        trained = any(parameter.requires_grad for parameter in router.parameters())
        if trained:  # an optimizer may leave no trace of its changes
            self.table = {}
        if len(set(timesteps.tolist())) == 1:
            timesteps = timesteps[:1]
            if not trained and not torch.is_grad_enabled():
                self.winners = self.winners_at(router, timesteps)
                return
        self.choices = router(timesteps)
        self.winners = self.choices.detach().argmax(dim=-1).cpu()

    @torch.no_grad()
    def winners_at(self, router: Router, timestep: torch.Tensor) -> torch.Tensor:
        """Return the adapters chosen at a timestep of shape (1,), from the table once it has them.

        One that was replaced, or given other numbers, is asked again.
        """
        # The dtype counts, because the router scales the timestep in it.
        state = (timestep.dtype, *map(_state, (*router.parameters(), *router.buffers())))
        if self.source is None or self.source[0] is not router or self.source[1] != state:
            self.table, self.source = {}, (router, state)
        time = timestep.item()
        if time not in self.table:
            if len(self.table) == KNOWN_TIMESTEPS:
                self.table.clear()
            self.table[time] = router(timestep).argmax(dim=-1).cpu()
        return self.table[time]

    def clear(self) -> None:
        """Forget the last forward and the table."""
        self.choices = torch.empty(0)
        self.winners = torch.empty(0, dtype=torch.int64)
        self.table, self.source = {}, None
        self.turn = None

    def gradient_scale(self, index: int) -> int:
        """Return what the gradient of a layer's choice is multiplied by, 0 if it is not its turn.

        Over all turns the mean is 1.
        """
        if self.turn is None:
            return 1
        return TURNS if (index + self.turn) % TURNS == 0 else 0


def _state(tensor: torch.Tensor) -> tuple[int, int]:
    """Return what is another once a tensor was changed in place or holds other memory."""
    return tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version


class RouterHook:
    """Forward pre-hook of a denoiser that routes each call by its timestep argument."""

    def __init__(self, routing: Routing) -> None:
        self.routing = routing

    def __call__(self, denoiser: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Update the routing from the call's timestep."""
        self.routing.update(router_of(denoiser), timestep_of(denoiser, args, kwargs))


def attach_router(denoiser: nn.Module, router: Router) -> Routing:
    """Make the router part of the denoiser, run at the start of each of its forwards."""
    routing = Routing()
    denoiser.add_module("router", router)
    denoiser.register_forward_pre_hook(RouterHook(routing), with_kwargs=True)
    return routing


def router_of(denoiser: nn.Module) -> Router:
    """Return the router of a denoiser that has one."""
    router: Router = denoiser.get_submodule("router")  # type: ignore[assignment]
    return router


def routing_of(denoiser: nn.Module) -> Routing | None:
    """Return the routing of a denoiser, or None where there is no router."""
    hooks = denoiser._forward_pre_hooks.values()
    return next((hook.routing for hook in hooks if isinstance(hook, RouterHook)), None)


def remove_router(denoiser: nn.Module) -> None:
    """Take the router of a denoiser away; its layers must have been told that there is none."""
    hooks = denoiser._forward_pre_hooks
    for key in [key for key, hook in hooks.items() if isinstance(hook, RouterHook)]:
        del hooks[key]
        denoiser._forward_pre_hooks_with_kwargs.pop(key, None)
    del denoiser.router


@torch.no_grad()
def precompute_routing(
    model: DiffusionPipeline | nn.Module, *, timesteps: Sequence[float] | torch.Tensor
) -> None:
    """Query the router once for each timestep of a sampler, so that sampling need not.

    Sampling does so by itself when it comes to a timestep for the first time; this does it before.
    Outputs are the same bits.

    Args:
        model: A pipeline or its denoiser; without a router there is nothing to precompute.
        timesteps: What the denoiser will be given, such as `scheduler.timesteps`.

    Raises:
        InputError: If it is a pipeline without a denoiser.
    """
    denoiser = denoiser_of(model)
    routing = routing_of(denoiser)
    if routing is None:
        return
    router = router_of(denoiser)
    for timestep in torch.as_tensor(timesteps):
        routing.winners_at(router, timestep[None])
