"""Where there is no GPU, the Triton kernels run in Triton's interpreter, on the CPU."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported

collect_ignore = []
try:
    import fpformats.kernels.cuda  # noqa: F401
except ImportError:
    collect_ignore += ["fpformats/kernels/cuda.py", "fpformats/kernels/triton_kernels.py"]
