"""Tensors in files, which the system reads where they are used and drops from memory elsewhere."""

from __future__ import annotations

import ctypes
import os
import platform
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from msfp.errors import InputError
from msfp.support.malloc import release_memory

SMALL = 1 << 16
"""Bytes below which a tensor stays in memory."""
ALIGNED = 64
"""Addresses of tensors are multiples of it, unless they are read from a mapped file."""
_in_files = WeakIdKeyDictionary()
"""The memory of tensors that is in files of any folder."""
_MADV_DONTNEED = 4
_LINUX = platform.system() == "Linux"


class PageFolder:
    """A folder for the numbers of tensors that need not be in memory.

    The file of a tensor has no name, and its space is free again when the tensor is deleted.

    Args:
        folder: A folder on a disk, which is made if it does not exist.

    Attributes:
        written: Number of bytes written so far.

    Example:
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     x = torch.arange(2.0**15)
        ...     PageFolder(folder).put(x), x.sum().item(), os.listdir(folder)
        (True, 536854528.0, [])
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.written = 0

    def put(self, *tensors: torch.Tensor) -> bool:
        """Move the numbers of tensors to a file, in place; return whether they are there now.

        The tensors remain what they are for all that use them. Small ones and those on other
        devices stay in memory, and so do those whose memory others use too.

        Args:
            *tensors: One tensor, or all that share its memory.

        Raises:
            InputError: If the file cannot be written, as on a full disk.
        """
        if any(x.layout is not torch.strided for x in tensors):
            return False
        if self.holds(tensors[0]):
            return True
        memory = tensors[0].untyped_storage()
        movable = tensors[0].device.type == "cpu" and memory.nbytes() >= SMALL
        if not movable or _users(memory) > len(tensors):
            return False
        try:
            numbers = self._written(memory)
        except OSError as error:
            raise InputError(
                f"{self.folder} cannot hold {memory.nbytes():,} bytes more of what is offloaded: "
                f"{error}"
            ) from error
        self.written += memory.nbytes()
        for x in tensors:
            place = numbers, x.storage_offset(), x.shape, x.stride()
            x.data = torch.empty(0, dtype=x.dtype).set_(*place)
        _in_files[numbers] = True
        return True

    def _written(self, memory: torch.UntypedStorage) -> torch.UntypedStorage:
        """Return the numbers of some memory in a file without a name."""
        source = torch.empty(0, dtype=torch.uint8).set_(memory)
        handle, name = tempfile.mkstemp(dir=self.folder)
        with os.fdopen(handle, "wb") as file:
            if _LINUX:  # without a name already while it is written, if the process is killed
                Path(name).unlink()
                name = f"/proc/self/fd/{handle}"
            source.numpy().tofile(file)
            file.flush()
            numbers = torch.from_file(name, shared=True, size=memory.nbytes(), dtype=torch.uint8)
        if not _LINUX:
            with suppress(PermissionError):  # Windows deletes no file that is in use
                Path(name).unlink()
        return numbers.untyped_storage()

    def holds(self, x: torch.Tensor) -> bool:
        """Return whether the numbers of a tensor are in a file."""
        return x.layout is torch.strided and x.untyped_storage() in _in_files

    def put_away(self, *tensors: torch.Tensor) -> None:
        """Move the numbers of tensors to a file, as `put` does, and out of memory."""
        if self.put(*tensors):
            self.drop(tensors[0])

    @contextmanager
    def taking_casts(self) -> Iterator[None]:
        """Put all that is cast or copied inside the block into files, as soon as it is made.

        Example:
            >>> with tempfile.TemporaryDirectory() as folder, PageFolder(folder).taking_casts():
            ...     torch.ones(2**15).half().sum().item()
            32768.0
        """
        with _Casts(self):
            yield

    def drop_all(self, network: nn.Module) -> None:
        """Take the parameters of a network out of memory that are in files."""
        for parameter in network.parameters():
            self.drop(parameter)

    def drop(self, x: torch.Tensor) -> None:
        """Take the numbers of a tensor out of memory, if they are in a file."""
        if self.holds(x) and _LINUX:
            memory = x.untyped_storage()
            address, size = ctypes.c_void_p(memory.data_ptr()), ctypes.c_size_t(memory.nbytes())
            ctypes.CDLL(None).madvise(address, size, _MADV_DONTNEED)


def settle(network: nn.Module, pages: PageFolder | None) -> None:
    """Have each weight of a network in a file, or in memory at an aligned address.

    Those that are read from a mapped file have any address, which can change the order of sums.

    Args:
        network: The network.
        pages: The folder of the files; None for memory.

    Example:
        >>> layer = nn.Linear(3, 4)
        >>> layer.weight.data = torch.arange(13.0)[1:].view(4, 3)
        >>> settle(layer, None)
        >>> layer.weight.data_ptr() % ALIGNED, layer.weight[0].tolist()
        (0, [1.0, 2.0, 3.0])
    """
    for weight in network.parameters():
        if weight.device.type != "cpu" or (pages is not None and pages.holds(weight)):
            continue
        if pages is not None or is_unaligned(weight):
            # Weights that were loaded may share one memory, which is free when the last has gone.
            weight.data = weight.data.clone()
        if pages is not None:
            pages.put_away(weight)
            release_memory()


def is_unaligned(x: torch.Tensor) -> bool:
    """Return whether the address of a tensor is not as torch allocates it."""
    return x.device.type == "cpu" and x.layout is torch.strided and x.data_ptr() % ALIGNED != 0


class _Casts(TorchDispatchMode):
    """Puts the results of casts and copies into files."""

    def __init__(self, pages: PageFolder) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.pages = pages

    def __torch_dispatch__(
        self, func: Callable[..., Any], _types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten._to_copy.default, torch.ops.aten.clone.default):
            self.pages.put_away(made)
            release_memory()
        return made


def _users(memory: torch.UntypedStorage) -> int:
    """Return how many tensors use some memory."""
    return torch._C._storage_Use_Count(memory._cdata) - 1  # `memory` itself is counted too
