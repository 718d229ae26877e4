"""Mixup-sign 4-bit floating-point quantization of diffusion models.

The method is that of "Pioneering 4-Bit FP Quantization for Diffusion Models: Mixup-Sign
Quantization and Timestep-Aware Fine-Tuning" (Zhao et al., CVPR 2025, arXiv 2505.21591).
"""

from msfp.checkpoint.diffusers_quantizer import MSFPConfig, register
from msfp.checkpoint.facts import LayerFacts, inspect_layers
from msfp.checkpoint.io import load, save
from msfp.checkpoint.lora_export import export_entries, export_lora
from msfp.config import QuantizationConfig, RefinementConfig
from msfp.errors import InputError
from msfp.layers.lora.talora import precompute_routing
from msfp.layers.packed import QuantConv1d, QuantConv2d, QuantLinear, cache_weights
from msfp.pipelines.call_files import store_calls, stored_calls
from msfp.pipelines.sampler import Sampler, prompt_calls
from msfp.pipelines.trajectories import Trajectories, record_trajectories
from msfp.ptq.attention_products import quantize_attention
from msfp.ptq.concatenations import split_inputs
from msfp.ptq.low_rank_branches import add_branches
from msfp.ptq.quantization import quantize, seal
from msfp.ptq.refinement import refine
from msfp.ptq.time_layers import with_exact_times
from msfp.schedulers.denoising_factors import denoising_factors, timestep_weights
from msfp.search.calibration import Calibration
from msfp.search.observers import calibrate
from msfp.search.summary import LayerSummary
from msfp.training.config import FinetuneConfig, LearningRates
from msfp.training.data.noised_images import data_trajectories
from msfp.training.finetuning import finetune
from msfp.training.reopening import reopen
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
