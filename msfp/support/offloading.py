"""Networks whose weights wait elsewhere, moved by the hooks of Accelerate or diffusers.

Inside `at_hand` the hooks are off and all weights are on the host, as of a network without them.
Where the hooks compute on another device, each module has its tensors there while it runs.
"""

from __future__ import annotations

import functools
import operator
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import fields
from typing import Any, ParamSpec, TypeVar

import torch
from accelerate.hooks import (
    AlignDevicesHook,
    SequentialHook,
    add_hook_to_module,
    remove_hook_from_module,
)
from accelerate.utils import send_to_device, set_module_tensor_to_device
from diffusers.hooks import apply_group_offloading
from safetensors.torch import load_file
from torch import nn

from msfp.support.paging import PageFolder

P = ParamSpec("P")
R = TypeVar("R")
GROUPS = ("group_offloading", "layer_execution_tracker", "lazy_prefetch_group_offloading")
"""Names of the hooks of `enable_group_offload`, the first that of a group."""
HOST = torch.device("cpu")


def with_weights(
    networks: Callable[[Any], Mapping[str, nn.Module]],
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Return a decorator of functions of a model that need its weights.

    Args:
        networks: Returns the networks of the model whose hooks are off during the function.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def run(*args: P.args, **kwargs: P.kwargs) -> R:
            model = args[0] if args else kwargs["model"]
            with ExitStack() as stack:
                for network in networks(model).values():
                    stack.enter_context(at_hand(network))
                return function(*args, **kwargs)

        return run

    return decorate


@contextmanager
def at_hand(network: nn.Module) -> Iterator[None]:
    """Have all weights of a network on the host inside the block, and its offloading off.

    Weights that were in files are in files without a name, which the system reads where they are
    used. After the block the same modules are offloaded again, now from there.

    Args:
        network: With or without offloading. Modules may be replaced inside the block.

    Example:
        >>> from accelerate import cpu_offload
        >>> layer = cpu_offload(nn.Linear(2, 2), "cpu")
        >>> layer.weight.is_meta
        True
        >>> with at_hand(layer):
        ...     layer.weight.is_meta
        False
        >>> layer.weight.is_meta
        True
    """
    with ExitStack() as stack:
        if is_moved(network):
            yield  # inside such a block already
            return
        for taken in (_Groups(network), _Aligned(network)):
            if taken.device is not None:
                stack.callback(taken.put_back)
                taken.take_off()
                stack.enter_context(_entered(network, taken.device))
                if taken.device != HOST:
                    stack.enter_context(_moved(network, taken.device))
        yield


class _Groups:
    """The hooks of `enable_group_offload`.

    Attributes:
        device: Where the network computes; None if it has no such hooks.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        hooks = (_group_hook(module) for module in network.modules())
        self.config: Any = next((hook.config for hook in hooks if hook is not None), None)
        self.device = None if self.config is None else torch.device(self.config.onload_device)

    def take_off(self) -> None:
        """Remove the hooks, with all tensors on the host."""
        for module in self.network.modules():
            hook = _group_hook(module)
            if hook is not None:
                _bring(hook.group)
        for module in self.network.modules():
            registry: Any = getattr(module, "_diffusers_hook", None)
            for name in () if registry is None else GROUPS:
                registry.remove_hook(name, recurse=False)
            _free_forward(module)

    def put_back(self) -> None:
        """Add the hooks again, for tensors in memory: files of before have other tensors."""
        given = {each.name: getattr(self.config, each.name) for each in fields(self.config)}
        stream = given.pop("stream")
        for name in ("module_prefix", "offload_to_disk_path"):
            given.pop(name, None)
        apply_group_offloading(self.network, use_stream=stream is not None, **given)


def _group_hook(module: nn.Module) -> Any:
    registry = getattr(module, "_diffusers_hook", None)
    return None if registry is None else registry.get_hook(GROUPS[0])


def _bring(group: Any) -> None:
    """Have the tensors of a group on the host."""
    if group.offload_to_disk_path is not None:
        there = load_file(group.safetensors_file_path)
        for name, tensor in group.key_to_tensor.items():
            tensor.data = there.pop(name)
            PageFolder(group.offload_to_disk_path).put_away(tensor)
        return
    tensors = [*group.parameters, *group.buffers]
    for module in group.modules:
        tensors += [*module.parameters(), *module.buffers()]
    for tensor in tensors:
        tensor.data = tensor.data.to(HOST)


class _Aligned:
    """The hooks of Accelerate that have the tensors of single modules elsewhere.

    Hooks that move a whole component, as of `enable_model_cpu_offload`, stay.

    Attributes:
        device: Where the network computes; None if it has no such hooks.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        found = {name: getattr(each, "_hf_hook", None) for name, each in network.named_modules()}
        self.hooks = {name: hook for name, hook in found.items() if _parts(hook)}
        parts = [part for hook in self.hooks.values() for part in _parts(hook)]
        devices = (part.execution_device for part in parts if part.execution_device is not None)
        self.device = torch.device(next(devices, HOST)) if parts else None

    def take_off(self) -> None:
        """Remove the hooks, with all tensors on the host."""
        for name, hook in self.hooks.items():
            module = self.network.get_submodule(name)
            remove_hook_from_module(module)
            for part in _parts(hook):
                _fill(module, part)
            _free_forward(module)

    def put_back(self) -> None:
        """Add the hooks again, for the tensors and modules of now."""
        for name, hook in self.hooks.items():
            module = self.network.get_submodule(name)
            for part in _parts(hook):
                # Those of before belong to other tensors.
                part.weights_map = part.tied_params_map = None
                part.tied_params_names = set()
                for child in module.children():
                    if not hasattr(child, "_hf_hook") and part.execution_device is not None:
                        child.to(part.execution_device)
            add_hook_to_module(module, hook)


def _parts(hook: Any) -> list[AlignDevicesHook]:
    hooks = hook.hooks if isinstance(hook, SequentialHook) else [hook]
    return [each for each in hooks if isinstance(each, AlignDevicesHook)]


def _fill(module: nn.Module, hook: AlignDevicesHook) -> None:
    """Have the tensors of a module on the host; those that were in files stay in files."""
    places = {} if hook.weights_map is None else hook.weights_map
    folder = getattr(getattr(places, "dataset", places), "save_folder", None)
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if tensor.is_meta and name in places:
            set_module_tensor_to_device(module, name, HOST, value=places[name])
        elif not tensor.is_meta:
            tensor.data = tensor.data.to(HOST)
        if folder is not None and name in places:
            PageFolder(folder).put_away(operator.attrgetter(name)(module))


def _free_forward(module: nn.Module) -> None:
    """Remove the forward of an instance that is that of its class, which removed hooks leave."""
    own = vars(module).get("forward")
    if getattr(own, "__func__", None) is type(module).forward:
        del module.forward


@contextmanager
def _entered(network: nn.Module, device: torch.device) -> Iterator[None]:
    """Have what a network reads on a device, and its outputs where its inputs were.

    Pipelines find the device of their calls at this hook.
    """
    add_hook_to_module(network, AlignDevicesHook(device, io_same_device=True))
    try:
        yield
    finally:
        remove_hook_from_module(network)
        _free_forward(network)


class _Mover:
    """Has the tensors of modules on a device while they run, and otherwise on the host."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._runs: Counter[nn.Module] = Counter()
        self._host: dict[nn.Module, list[tuple[torch.Tensor, torch.Tensor]]] = {}

    def enter(self, module: nn.Module) -> None:
        """Move the tensors of a module to the device."""
        self._runs[module] += 1
        for x in _own(module):
            if x.device != self.device:
                self._host.setdefault(module, []).append((x, x.data))
                x.data = x.data.to(self.device)

    def leave(self, module: nn.Module) -> None:
        """Have the tensors of a module on the host again, if no forward runs in it."""
        self._runs[module] -= 1
        if self._runs[module]:
            return
        del self._runs[module]
        for x, numbers in reversed(self._host.pop(module, [])):
            x.data = numbers
        for x in _own(module):
            x.data = x.data.to(HOST)

    def before(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """Prepare a forward of a module: a hook of torch."""
        self.enter(module)
        return send_to_device(args, self.device), send_to_device(kwargs, self.device)

    def after(self, module: nn.Module, *_: Any) -> None:
        """End a forward of a module: a hook of torch."""
        self.leave(module)


def _own(module: nn.Module) -> list[torch.Tensor]:
    return [*module.parameters(recurse=False), *module.buffers(recurse=False)]


@contextmanager
def _moved(network: nn.Module, device: torch.device) -> Iterator[None]:
    """Have the tensors of each module on a device while it runs, inside the block.

    Layers that replace others inside the block take over their hooks.
    """
    mover = _Mover(device)
    for module in network.modules():
        if _own(module):
            module.register_forward_pre_hook(mover.before, with_kwargs=True)
            module.register_forward_hook(mover.after, always_call=True)
    try:
        yield
    finally:
        for module in network.modules():
            for hooks in (module._forward_pre_hooks, module._forward_hooks):
                for key in [key for key, hook in hooks.items() if _is_of(hook, mover)]:
                    del hooks[key]


def _is_of(hook: Any, mover: _Mover) -> bool:
    return getattr(hook, "__self__", None) is mover


def _mover_of(module: nn.Module) -> _Mover | None:
    found = (getattr(hook, "__self__", None) for hook in module._forward_pre_hooks.values())
    return next((each for each in found if isinstance(each, _Mover)), None)


@contextmanager
def at_work(module: nn.Module) -> Iterator[None]:
    """Have the tensors of a module where it computes, inside the block."""
    mover = _mover_of(module)
    if mover is not None:
        mover.enter(module)
    try:
        yield
    finally:
        if mover is not None:
            mover.leave(module)


def is_moved(network: nn.Module) -> bool:
    """Return whether weights of a network are on its device only while their module runs."""
    return any(_mover_of(module) is not None for module in network.modules())


def work_device(network: nn.Module) -> torch.device:
    """Return the device on which a network computes.

    Example:
        >>> work_device(nn.Linear(2, 2))
        device(type='cpu')
    """
    movers: Iterable[_Mover | None] = map(_mover_of, network.modules())
    mover = next((each for each in movers if each is not None), None)
    return next(network.parameters()).device if mover is None else mover.device
