from .checkpoint.diffusers_config import MSFPConfig
from .checkpoint.facts import LayerFacts
from .checkpoint.inspection import inspect_coverage, inspect_layers
from .checkpoint.io import load, save
from .checkpoint.lora_export import export_adapters, export_lora
from .config import QuantizationConfig, RefinementConfig
from .errors import InputError
from .evaluation.comparison import Comparison, compare
from .evaluation.dataset_statistics import DatasetStatistics, dataset_statistics
from .evaluation.prediction_errors import noise_errors
from .experiments.reference.pipelines import reference_pipeline
from .layers.families import QuantConv1d, QuantConv2d, QuantLinear
from .layers.lora.talora import precompute_routing
from .layers.packed import cache_weights
from .pipelines.call_files import load_calls, save_calls
from .pipelines.denoiser import select_denoisers
from .pipelines.recording import record_trajectories
from .pipelines.sampler import Sampler, prompt_calls
from .pipelines.trajectories import Trajectories
from .ptq.attention_products import quantize_attention
from .ptq.bit_allocation import Allocation, allocate_bits
from .ptq.concatenations import split_inputs
from .ptq.estimate import Estimate, estimate
from .ptq.low_rank_branches import add_branches
from .ptq.quantization import pack, quantize
from .ptq.refinement import refine
from .ptq.rotation import rotate_inputs
from .ptq.token_scales import scale_tokens
from .schedulers.denoising_factors import denoising_factors, timestep_weights
from .search.calibration import Calibration
from .search.coverage import Coverage
from .search.observers import calibrate
from .search.summary import LayerSummary
from .support.progress import progress_bars, show_progress
from .training.config import FinetuneConfig, LearningRates
from .training.data.noised_images import data_trajectories
from .training.finetuning import finetune
from .training.lora_fusion import fuse_lora
from .training.state import History
from .training.unpacking import unpack
from .version import __version__

__all__ = [
    "Allocation",
    "Calibration",
    "Comparison",
    "Coverage",
    "DatasetStatistics",
    "Estimate",
    "FinetuneConfig",
    "History",
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
    "allocate_bits",
    "cache_weights",
    "calibrate",
    "compare",
    "data_trajectories",
    "dataset_statistics",
    "denoising_factors",
    "estimate",
    "export_adapters",
    "export_lora",
    "finetune",
    "fuse_lora",
    "inspect_coverage",
    "inspect_layers",
    "load",
    "load_calls",
    "noise_errors",
    "pack",
    "precompute_routing",
    "progress_bars",
    "prompt_calls",
    "quantize",
    "quantize_attention",
    "record_trajectories",
    "reference_pipeline",
    "refine",
    "rotate_inputs",
    "save",
    "save_calls",
    "scale_tokens",
    "select_denoisers",
    "show_progress",
    "split_inputs",
    "timestep_weights",
    "unpack",
]
