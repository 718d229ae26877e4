"""The compiled kernels for host memory: how to load and get them.

`fpformats.kernels._native` takes plain addresses. Its callers keep the arrays behind the addresses
alive, and check all input of users.
"""

from __future__ import annotations

import functools
import os
import sys
import warnings
from typing import TYPE_CHECKING, Any

from fpformats.kernels.grid import FLOAT_DTYPES, FloatDtype
from fpformats.kernels.plan import make_plan
from fpformats.rounding import Rounding

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType

    from fpformats.formats import FloatFormat
    from fpformats.kernels._native import Kernel

MODES = [mode.value for mode in Rounding]
DTYPES = list(FLOAT_DTYPES)
"""Rounding modes and dtypes in the order of the compiled kernels, which know them by index."""
PARALLEL_FROM = 1 << 20
"""Number of elements from which threads save more time than their start costs."""
STREAM_FROM = 1 << 25
"""Size in bytes from which a result is too large for the caches and is written past them."""

NAN_IN, NAN_OUT = 1, 2


def _load() -> ModuleType | None:
    try:
        import fpformats.kernels._native as found
    except ImportError as error:
        # A library that exists but does not load raises the base class, ImportError.
        missing = isinstance(error, ModuleNotFoundError)
        how = "was installed without its compiled kernels" if missing else "cannot load its kernels"
        warnings.warn(
            f"fpformats {how} ({error}), so NumPy and torch do the work more slowly; with a C++17 "
            "compiler at hand, reinstall it",
            stacklevel=2,
        )
        return None
    if (found.modes(), found.dtypes()) != (MODES, DTYPES):
        raise ImportError(
            f"the compiled kernels count rounding modes as {found.modes()} and dtypes as "
            f"{found.dtypes()}; Python counts {MODES} and {DTYPES}"
        )
    return found


library: Callable[[], Any] = functools.cache(_load)
"""Gives the module of the compiled kernels, None if there are none; see `_native.pyi`."""


@functools.lru_cache(maxsize=4096)
def kernel_of(fmt: FloatFormat, dtype: FloatDtype, rounding: str, saturation: str) -> Kernel | None:
    """Give the kernel of a format that the dtype holds; None if there is none."""
    native = library()
    plan = make_plan(fmt, dtype, rounding, saturation) if native else None
    if plan is None:
        return None
    kernel: Kernel = native.Kernel(plan, MODES.index(rounding), DTYPES.index(dtype.name))
    return kernel


def instruction_sets() -> list[str]:
    """List the compiled instruction sets that this machine supports, the fastest first."""
    native = library()
    return list(native.names()) if native else []


def threads_for(count: int) -> int:
    """Give the number of threads for `count` elements; torch's setting if torch is loaded."""
    if count < PARALLEL_FROM:
        return 1
    if (torch := sys.modules.get("torch")) is not None:
        return int(torch.get_num_threads())
    wanted = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    if wanted.isdecimal() and int(wanted) > 0:
        return int(wanted)
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
