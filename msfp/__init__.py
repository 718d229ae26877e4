"""Mixup-sign 4-bit floating-point quantization of diffusion models.

The method is that of "Pioneering 4-Bit FP Quantization for Diffusion Models: Mixup-Sign
Quantization and Timestep-Aware Fine-Tuning" (Zhao et al., CVPR 2025, arXiv 2505.21591).

`__init__.pyi` lists the public names. Each name is imported on first use.
"""

import lazy_loader

from msfp.checkpoint.registration import register

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

register()
