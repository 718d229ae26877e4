"""Mixup-sign 4-bit floating-point quantization of diffusion models.

The method is that of "Pioneering 4-Bit FP Quantization for Diffusion Models: Mixup-Sign
Quantization and Timestep-Aware Fine-Tuning" (Zhao et al., CVPR 2025, arXiv 2505.21591).
"""

from msfp.attention_search import quantize_attention
from msfp.branches import add_branches
from msfp.calibration import Calibration
from msfp.checkpoint import load, save
from msfp.config import QuantizationConfig, RefinementConfig
from msfp.dfa import denoising_factors, timestep_weights
from msfp.diffusers_plugin import MSFPConfig, register
from msfp.errors import InputError
from msfp.exports import export_entries, export_lora
from msfp.fine_tuning import finetune
from msfp.inspection import LayerFacts, inspect_layers
from msfp.layers import QuantConv1d, QuantConv2d, QuantLinear, cache_weights
from msfp.noised_images import data_trajectories
from msfp.observation import calibrate
from msfp.quantization import quantize, seal
from msfp.refinement import refine
from msfp.reopening import reopen
from msfp.sampling import Sampler, prompt_calls
from msfp.split import split_inputs
from msfp.stored_calls import store_calls, stored_calls
from msfp.summary import LayerSummary
from msfp.talora import precompute_routing
from msfp.time_layers import with_exact_times
from msfp.training.config import FinetuneConfig, LearningRates
from msfp.trajectories import Trajectories, record_trajectories
from msfp.version import __version__

__all__ = [
    "Calibration",
    "FinetuneConfig",
    "InputError",
    "LayerFacts",
    "LayerSummary",
    "LearningRates",
    "MSFPConfig",
    "QuantConv1d",
    "QuantConv2d",
    "QuantLinear",
    "QuantizationConfig",
    "RefinementConfig",
    "Sampler",
    "Trajectories",
    "__version__",
    "add_branches",
    "cache_weights",
    "calibrate",
    "data_trajectories",
    "denoising_factors",
    "export_entries",
    "export_lora",
    "finetune",
    "inspect_layers",
    "load",
    "precompute_routing",
    "prompt_calls",
    "quantize",
    "quantize_attention",
    "record_trajectories",
    "refine",
    "reopen",
    "save",
    "seal",
    "split_inputs",
    "store_calls",
    "stored_calls",
    "timestep_weights",
    "with_exact_times",
]

register()
