"""Time and memory of whole denoisers on one thread, as ratios to float32 in one interleaved run.

pytest tests/benchmarks/test_denoisers.py --benchmark-enable -s -k digits_unet

Peers need packages that msfp does not (openvino and nncf, torchao): what is missing is left out and
named. Memory is that of a process of its own for each contender.
"""

import copy
import functools
import gc
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import families
import pytest
import torch
from denoisers.case import cast
from diffusers import FluxTransformer2DModel, UNet2DConditionModel
from race import race
from torch import nn

from msfp import QuantizationConfig, pack, quantize, reference_pipeline
from msfp.experiments.study.benchmark_models import BENCHMARK_MODELS
from msfp.layers.base import quantized_layers
from msfp.layers.execution.backends import floats_only, runs_on_integers
from msfp.pipelines.denoiser import denoiser_of
from msfp.ptq.low_rank_branches import add_branches
from msfp.support.malloc import keep_memory, release_memory
from msfp.support.memory import forget_peak, peak_bytes

RANK = 16
TINY = (2, 8)
"""Batch and side of the inputs when nothing is timed."""
WORDS = {"UNet2DConditionModel": 77, "FluxTransformer2DModel": 32}
STABLE_DIFFUSION = {
    "sample_size": 64,
    "block_out_channels": (320, 640, 1280, 1280),
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
FLUX = {
    "num_layers": 1,
    "num_single_layers": 2,
    "num_attention_heads": 24,
    "attention_head_dim": 128,
    "joint_attention_dim": 4096,
}


def noise(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)))


def image(network, batch, side):
    sample = noise(batch, network.config.in_channels, side, side)
    return {"sample": sample, "timestep": torch.tensor(500)}


def image_of_class(network, batch, side):
    return {
        "hidden_states": noise(batch, network.config.in_channels, side, side),
        "timestep": torch.full((batch,), 500),
        "class_labels": torch.arange(batch) % 10,
    }


def image_and_text(network, batch, side):
    text = noise(batch, WORDS["UNet2DConditionModel"], network.config.cross_attention_dim)
    return image(network, batch, side) | {"encoder_hidden_states": text}


def tokens(network, batch, side):
    config, words = network.config, WORDS["FluxTransformer2DModel"]
    places = [(0.0, row, column) for row in range(side) for column in range(side)]
    return {
        "hidden_states": noise(batch, side * side, config.in_channels),
        "timestep": torch.full((batch,), 0.5),
        "pooled_projections": noise(batch, config.pooled_projection_dim),
        "encoder_hidden_states": noise(batch, words, config.joint_attention_dim),
        "txt_ids": torch.zeros(words, 3),
        "img_ids": torch.tensor(places),
    }


def shipped(folder):
    """A pipeline that ships, and calls that calibrate it."""
    model = BENCHMARK_MODELS[folder]
    return reference_pipeline(model.name), model.sampler(2).calls(8, seed=1)


def random_weights(kind, config):
    torch.manual_seed(0)
    return kind(**config).eval().requires_grad_(False), None


class Model(NamedTuple):
    """A denoiser.

    Attributes:
        make: Returns a pipeline or a network, and calls to calibrate it, or None for its inputs.
        tiny: A small one of the same class, for when nothing is timed.
        inputs: Returns the arguments of a forward of a network, for a batch of images of a side.
        branches: Whether it is also run with low-rank branches.
    """

    make: Any
    tiny: str
    inputs: Any
    branches: bool = False


MODELS = {
    "digits_unet": Model(functools.partial(shipped, "digits-ddpm"), "unet", image, branches=True),
    "digits_transformer": Model(
        functools.partial(shipped, "digits-dit"), "dit", image_of_class, branches=True
    ),
    "photographs": Model(functools.partial(shipped, "colour-ddpm"), "unet", image, branches=True),
    "stable_diffusion": Model(
        functools.partial(random_weights, UNet2DConditionModel, STABLE_DIFFUSION),
        "conditional_unet",
        image_and_text,
    ),
    "flux": Model(functools.partial(random_weights, FluxTransformer2DModel, FLUX), "flux", tokens),
}


class Row(NamedTuple):
    """What is timed: a model, its inputs, and how often."""

    model: str
    batch: int
    side: int
    rounds: int
    repeats: int = 1

    @property
    def title(self):
        what = "tokens" if self.model == "flux" else "pixels"
        return f"{self.model.replace('_', ' ')}, {self.batch} of {self.side}x{self.side} {what}"


ROWS = [
    Row("digits_unet", 64, 16, rounds=15),
    Row("digits_unet", 1, 16, rounds=15, repeats=16),
    Row("digits_transformer", 64, 16, rounds=15),
    Row("digits_transformer", 1, 16, rounds=15, repeats=16),
    Row("photographs", 64, 32, rounds=7),
    Row("photographs", 1, 32, rounds=15, repeats=8),
    Row("stable_diffusion", 2, 32, rounds=3),
    Row("stable_diffusion", 2, 64, rounds=2),
    Row("flux", 1, 8, rounds=5),
]


def eager(network, inputs):
    return lambda: network(**inputs, return_dict=False)[0]


def in_bfloat16(network, inputs):
    return eager(copy.deepcopy(network).bfloat16(), cast(inputs, torch.bfloat16))


def emulated(network, inputs):
    forward = eager(network, inputs)

    def emulation():
        with floats_only():
            return forward()

    return emulation


def compiled(network, inputs):
    forward = eager(torch.compile(network, fullgraph=True, dynamic=False), inputs)
    forward()
    return forward


class Positional(nn.Module):
    """A network that takes tensors in order, and returns one."""

    def __init__(self, network, names):
        super().__init__()
        self.network, self.names = network, names

    def forward(self, *values):
        arguments = dict(zip(self.names, values, strict=True))
        return self.network(**arguments, return_dict=False)[0]


def exported(network, inputs):
    return torch.export.export(Positional(network, tuple(inputs)), tuple(inputs.values()))


def in_openvino(network, inputs):
    """Static INT8 of OpenVINO by NNCF, with its defaults."""
    import nncf
    import openvino

    arrays = [value.numpy() for value in inputs.values()]
    # Of an exported network, OpenVINO 2026.4 cannot run the INT8 convolutions in bfloat16.
    shapes, values = [array.shape for array in arrays], tuple(inputs.values())
    traced = Positional(network, tuple(inputs))
    model = openvino.convert_model(traced, example_input=values, input=shapes)
    kind = None if hasattr(network, "down_blocks") else nncf.ModelType.TRANSFORMER
    model = nncf.quantize(model, nncf.Dataset([arrays]), model_type=kind, subset_size=1)
    core = openvino.Core()
    ready = core.compile_model(model, "CPU", {"INFERENCE_NUM_THREADS": 1})
    request = ready.create_infer_request()
    return lambda: torch.from_numpy(request.infer(arrays)[0])


def in_pt2e(network, inputs):
    """Static INT8 of PyTorch itself by torchao, compiled."""
    from torch._inductor import config
    from torchao.quantization.pt2e import quantize_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    values = tuple(inputs.values())
    quantizer = x86.X86InductorQuantizer()
    quantizer.set_global(x86.get_default_x86_inductor_quantization_config())
    model = quantize_pt2e.prepare_pt2e(exported(network, inputs).module(), quantizer)
    model(*values)
    model = quantize_pt2e.convert_pt2e(model)
    with config.patch(freezing=True):
        ready = torch.compile(model, dynamic=False)
        ready(*values)
    return lambda: ready(*values)


CONTENDERS = {
    "float32": ("float32", eager),
    "bfloat16": ("float32", in_bfloat16),
    "emulation": ("packed", emulated),
    "integers": ("packed", eager),
    "emulation, branches": ("branches", emulated),
    "integers, branches": ("branches", eager),
    "float32, compiled": ("float32", compiled),
    "integers, compiled": ("packed", compiled),
    "integers, branches, compiled": ("branches", compiled),
    "OpenVINO INT8": ("float32", in_openvino),
    "PT2E INT8, compiled": ("float32", in_pt2e),
}
"""Which network each takes, and what makes a forward of it."""
PEERS = ("OpenVINO INT8", "PT2E INT8, compiled")
UNTIMED = tuple(CONTENDERS)[:6]
"""Those that run when nothing is timed: to compile takes minutes."""


def packed(subject, calibration, rank=0):
    """The network of a copy, quantized and packed, with branches of a rank."""
    subject = copy.deepcopy(subject)
    network = denoiser_of(subject)
    quantize(subject, QuantizationConfig(refine=None), calibration=calibration)
    if rank:
        add_branches(network, rank)
    pack(network)
    return network


@functools.lru_cache(maxsize=1)
def networks_of(name, timed):
    """The networks of a model, by what is done to them; tiny ones if nothing is timed."""
    keep_memory()
    model = MODELS[name]
    subject, calibration = model.make() if timed else (families.make(model.tiny), None)
    network = denoiser_of(subject)
    inputs = model.inputs(network, *TINY)
    with torch.no_grad():
        calibration = calibration or (lambda network: network(**inputs))
        made = {"float32": network, "packed": packed(subject, calibration)}
        if model.branches:
            made["branches"] = packed(subject, calibration, RANK if timed else 1)
    return made


def forwards_of(networks, inputs, names):
    """The contenders that run here, and why the others do not."""
    forwards, missing = {}, {}
    for name in names:
        key, make = CONTENDERS[name]
        if key in networks:
            try:
                forwards[name] = make(networks[key], inputs)
            except Exception as error:
                if name not in PEERS:
                    raise
                missing[name] = f"{type(error).__name__}: {error}".splitlines()[0]
    return forwards, missing


each_row = pytest.mark.parametrize(
    "row", [pytest.param(row, id=f"{row.model}-{row.batch}x{row.side}") for row in ROWS]
)


@each_row
def test_time_of_a_forward(benchmark, row):
    size = (row.batch, row.side)
    if not benchmark.enabled:
        if row != next(other for other in ROWS if other.model == row.model):
            pytest.skip("differs from another row only if timed")
        size = TINY
    torch.compiler.reset()
    networks = networks_of(row.model, benchmark.enabled)
    inputs = MODELS[row.model].inputs(networks["float32"], *size)
    with torch.no_grad():
        names = CONTENDERS if benchmark.enabled else UNTIMED
        forwards, missing = forwards_of(networks, inputs, names)
        predictions = {name: forward().float() for name, forward in forwards.items()}
        ratios = race(benchmark, forwards, row.rounds, baseline="float32", repeats=row.repeats)
    layers = quantized_layers(networks["packed"]).values()
    on_integers = f"{sum(map(runs_on_integers, layers))} of {len(layers)} layers on integer units"
    benchmark.extra_info.update(table="denoisers", title=row.title, missing=missing)
    print(f"{row.title}; {on_integers}\n  {'':28}  x float32  difference")
    for name, ratio in ratios.items():
        far = (predictions[name] - predictions["float32"]).norm() / predictions["float32"].norm()
        print(f"  {name:28}  {ratio:9.3f}  {far:10.4f}")
    for name, why in missing.items():
        print(f"  {name} is left out: {why}")
    for branches in ("", ", branches")[: len(networks) - 1]:
        ours, emulation = (predictions[f"{name}{branches}"] for name in ("integers", "emulation"))
        assert torch.equal(ours, emulation)


MEMORY = """
import sys
sys.path[:0] = sys.argv[3:]
from test_denoisers import print_memory
print_memory(*sys.argv[1:3])
"""


def resident():
    """Bytes of this process now, from which its peak counts."""
    forget_peak()
    return peak_bytes()


def print_memory(name, file):
    """Megabytes beyond the imports that a contender holds, and the peak of its second forward."""
    torch.set_num_threads(1)
    keep_memory()
    before = resident()
    network, inputs = torch.load(file, weights_only=False)
    with torch.no_grad():
        forward = CONTENDERS[name][1](network, inputs)
        del network
        forward()
        gc.collect()
        release_memory()
        held = resident()
        forward()
    print("megabytes", (held - before) >> 20, (peak_bytes() - before) >> 20)


def in_its_own_process(name, file, folder):
    """Megabytes held and at the peak; None for a peer that does not run."""
    paths = [str(folder), str(Path(families.__file__).parent)]
    command = [sys.executable, "-c", MEMORY, name, str(file), *paths]
    process = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    if process.returncode and name in PEERS:
        return None
    assert not process.returncode, process.stderr
    return list(map(int, process.stdout.splitlines()[-1].split()[1:]))


@each_row
def test_memory_of_a_forward(benchmark, row, request):
    if not benchmark.enabled or peak_bytes() is None:
        pytest.skip(
            "measures with --benchmark-enable, where the system tells the peak of a process"
        )
    benchmark.pedantic(lambda: None, rounds=1)
    networks = networks_of(row.model, timed=True)
    inputs = MODELS[row.model].inputs(networks["float32"], row.batch, row.side)
    megabytes = {}
    print(f"\n{row.title}\n  {'':28}  held MB  peak MB")
    with tempfile.TemporaryDirectory() as space:
        for key, network in networks.items():
            file = Path(space) / "network"
            torch.save((network, inputs), file)
            for name in (name for name in CONTENDERS if CONTENDERS[name][0] == key):
                found = in_its_own_process(name, file, request.path.parent)
                if found is not None:
                    megabytes[name] = found
                    print(f"  {name:28}  {found[0]:7}  {found[1]:7}", flush=True)
    benchmark.extra_info.update(table="memory", title=row.title, megabytes=megabytes)
    assert "integers" in megabytes
