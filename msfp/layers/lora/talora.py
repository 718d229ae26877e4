"""Timestep-aware LoRA: a hub of low-rank adapters for each layer, and a router that chooses one.

A `Routing` holds the router's choices for the current forward, and every layer reads them from it.
The choices therefore do not depend on the number or order of the denoiser's calls.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn

from msfp.errors import InputError
from msfp.layers.lora.routers import Router
from msfp.pipelines.denoiser import denoisers_of, timestep_of

TURNS = 4
"""Number of training steps in which each layer gives a learned router a gradient once."""
KNOWN_TIMESTEPS = 4096
"""Largest number of timesteps in a table of choices; a full table is cleared."""


class LoRAHub(nn.Module):
    """Low-rank corrections of one weight matrix, in units of its mean quantization step.

    The correction of adapter k is `step * up[k] @ down[k]`; `up` starts at zero. The unit lets all
    layers use the same learning rate.

    Args:
        out_features: Number of rows of the matrix.
        in_features: Number of columns. For a convolution, input channels times kernel size.
        adapters: Number of LoRAs in the hub.
        rank: Rank of each LoRA.
        step: The mean weight scale.
        generator: Source of the initial `down`.
        beside: Whether the correction is a low-rank branch beside the quantized weight,
            `Q(W) x + B A x` with x before rounding. If False, the correction is inside the
            quantizer, `Q(W + B A) x`.

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
    """The router's choices for the current forward.

    Attributes:
        choices: One-hot choices, shape (n, layers, adapters). n is the batch size, or 1 if all
            samples have the same timestep.
        winners: Number of the chosen adapter, shape (n, layers), on the CPU.
        table: Winners by timestep, used if no gradient is needed.
        source: The router that filled the table, and its state at that time.
        turn: Number of the training step. It selects every `TURNS`-th layer to give the router a
            gradient, because the gradient of a choice costs as much as its LoRAs. None selects all
            layers.
    """

    choices: torch.Tensor
    winners: torch.Tensor
    table: dict[float, torch.Tensor]
    source: tuple[Router, tuple[Any, ...]] | None
    turn: int | None

    def __init__(self) -> None:
        self.clear()

    def update(self, router: Router, timesteps: torch.Tensor) -> None:
        """Route a batch by its timesteps, shape (1,) or (batch,).

        If no gradient is needed, the router is not trained and the whole batch has one timestep,
        the router is queried once for each timestep.
        """
        trained = any(parameter.requires_grad for parameter in router.parameters())
        if trained:  # an optimizer may change parameters without a trace
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
        """Return the adapters chosen at a timestep of shape (1,), from the table if it has them.

        The table is cleared if the router was replaced, or its parameters or buffers changed.
        """
        # The state includes the dtype, because the router scales the timestep in this dtype.
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
        """Delete the choices of the last forward, and the table."""
        self.choices = torch.empty(0)
        self.winners = torch.empty(0, dtype=torch.int64)
        self.table, self.source = {}, None
        self.turn = None

    def gradient_scale(self, index: int) -> int:
        """Return the factor of the gradient of a layer's choice, 0 if it is not the layer's turn.

        The mean over all turns is 1.
        """
        if self.turn is None:
            return 1
        return TURNS if (index + self.turn) % TURNS == 0 else 0


def _state(tensor: torch.Tensor) -> tuple[int, int]:
    """Return a value that differs after a tensor was changed in place or got other memory."""
    return tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version


class RouterHook:
    """Forward pre-hook of a denoiser that routes each call by its timestep argument."""

    def __init__(self, routing: Routing) -> None:
        self.routing = routing

    def __call__(self, denoiser: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Update the routing from the call's timestep."""
        self.routing.update(router_of(denoiser), timestep_of(denoiser, args, kwargs))


def attach_router(denoiser: nn.Module, router: Router) -> Routing:
    """Add a router to a denoiser, in place, to run at the start of each forward."""
    routing = Routing()
    denoiser.add_module("router", router)
    denoiser.register_forward_pre_hook(RouterHook(routing), with_kwargs=True)
    return routing


def router_of(denoiser: nn.Module) -> Router:
    """Return the router of a denoiser, which must have one."""
    router: Router = denoiser.get_submodule("router")  # type: ignore[assignment]
    return router


def routing_of(denoiser: nn.Module) -> Routing | None:
    """Return the routing of a denoiser, or None if it has no router."""
    hooks = denoiser._forward_pre_hooks.values()
    return next((hook.routing for hook in hooks if isinstance(hook, RouterHook)), None)


def remove_router(denoiser: nn.Module) -> None:
    """Remove the router of a denoiser, in place; its layers must not have a routing any more."""
    hooks = denoiser._forward_pre_hooks
    for key in [key for key, hook in hooks.items() if isinstance(hook, RouterHook)]:
        del hooks[key]
        denoiser._forward_pre_hooks_with_kwargs.pop(key, None)
    del denoiser.router


@torch.no_grad()
def precompute_routing(
    model: DiffusionPipeline | nn.Module, *, timesteps: Sequence[float] | torch.Tensor
) -> None:
    """Query the router once for each timestep of a sampler, before sampling.

    Otherwise sampling queries the router at the first visit of each timestep. Outputs are the same
    bits either way.

    Args:
        model: A pipeline or its denoiser. Without a router, this does nothing.
        timesteps: Timesteps that the denoiser will receive, such as `scheduler.timesteps`.

    Raises:
        InputError: If the model is a pipeline without a denoiser, or timesteps are not numbers.
    """
    denoisers = denoisers_of(model)
    try:
        given = torch.as_tensor(timesteps).flatten()
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"timesteps must be numbers, not {timesteps!r}") from error
    for denoiser in denoisers.values():
        routing = routing_of(denoiser)
        if routing is None:
            continue
        router = router_of(denoiser)
        for timestep in given:
            routing.winners_at(router, timestep[None])
