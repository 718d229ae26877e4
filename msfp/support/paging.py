"""Tensors in files, which the system reads where they are used and drops from memory elsewhere."""

from __future__ import annotations

import ctypes
import os
import platform
import tempfile
from contextlib import suppress
from pathlib import Path

import torch
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from msfp.errors import InputError

SMALL = 1 << 16
"""Bytes below which a tensor stays in memory."""
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
        self._files = WeakIdKeyDictionary()

    def put(self, x: torch.Tensor) -> bool:
        """Move the numbers of a tensor to a file, in place; return whether they are there now.

        The tensor remains what it is for all that use it. Small tensors and those on other devices
        stay in memory, and so do those whose memory others use too.

        Raises:
            InputError: If the file cannot be written, as on a full disk.
        """
        if x.layout is not torch.strided:
            return False
        if self.holds(x):
            return True
        memory = x.untyped_storage()
        if x.device.type != "cpu" or memory.nbytes() < SMALL or not _is_alone(x):
            return False
        try:
            numbers = self._written(memory, x.dtype)
        except OSError as error:
            raise InputError(
                f"{self.folder} cannot hold {memory.nbytes():,} bytes more of what is offloaded: "
                f"{error}"
            ) from error
        self.written += memory.nbytes()
        x.data = numbers.as_strided(x.shape, x.stride(), x.storage_offset())
        self._files[x] = numbers.data_ptr()
        return True

    def _written(self, memory: torch.UntypedStorage, dtype: torch.dtype) -> torch.Tensor:
        """Return the numbers of some memory in a file without a name."""
        source = torch.empty(0, dtype=torch.uint8).set_(memory)
        handle, name = tempfile.mkstemp(dir=self.folder)
        with os.fdopen(handle, "wb") as file:
            if _LINUX:  # without a name already while it is written, if the process is killed
                Path(name).unlink()
                name = f"/proc/self/fd/{handle}"
            source.numpy().tofile(file)
            file.flush()
            count = memory.nbytes() // dtype.itemsize
            numbers = torch.from_file(name, shared=True, size=count, dtype=dtype)
        if not _LINUX:
            with suppress(PermissionError):  # Windows deletes no file that is in use
                Path(name).unlink()
        return numbers

    def holds(self, x: torch.Tensor) -> bool:
        """Return whether the numbers of a tensor are in a file."""
        return x.layout is torch.strided and bool(
            self._files.get(x) == x.untyped_storage().data_ptr()
        )

    def put_away(self, x: torch.Tensor) -> None:
        """Move the numbers of a tensor to a file, as `put` does, and out of memory."""
        if self.put(x):
            self.drop(x)

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


def _is_alone(x: torch.Tensor) -> bool:
    """Return whether no other tensor uses the memory of a tensor."""
    memory = x.untyped_storage()
    return torch._C._storage_Use_Count(memory._cdata) <= 2  # of the tensor, and of `memory`
