"""The shape of the public API, over all names in `msfp.__all__`."""

import ast
import copy
import inspect
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from tiny import SAMPLER, SHORT, tiny_pipeline

import msfp
from msfp.support.progress import shown_progress

FUNCTIONS = [name for name in msfp.__all__ if inspect.isfunction(getattr(msfp, name))]
WITHOUT_MODEL = {
    "dataset_statistics": "folder",
    "denoising_factors": "scheduler",
    "load": "folder",
    "load_calls": "folder",
    "progress_bars": None,
    "prompt_calls": "conditions",
    "reference_pipeline": "name",
    "show_progress": "enabled",
    "timestep_weights": "factors",
}
"""Functions that take no model, and their first argument."""
SECOND = {"config", "folder", "bits", "lora", "names", "rank"}
"""What may be given by position after the model."""
CHANGES = {
    "add_branches", "cache_weights", "finetune", "fuse_lora", "pack", "quantize",
    "quantize_attention", "refine", "rotate_inputs", "scale_tokens", "split_inputs", "unpack",
}  # fmt: skip
"""Functions that change their model."""
NAMES_OF_LAYERS = CHANGES - {"cache_weights", "finetune", "fuse_lora", "quantize"}
"""Functions that change layers and return the names of those."""
CONFIG = msfp.QuantizationConfig(refine=None)
STEP = SHORT | {"steps": 1}
OF_MODELS = [name for name in FUNCTIONS if name not in {*WITHOUT_MODEL, "fuse_lora"}]
"""Functions that are tried here; diffusers loads no LoRAs into the denoiser of these tests."""


def parameters(name):
    return list(inspect.signature(getattr(msfp, name)).parameters.values())


def test_the_stub_and_the_package_have_the_same_names():
    stub = Path(msfp.__file__).with_suffix(".pyi")
    (names,) = (node.value for node in ast.parse(stub.read_text()).body if "Assign" in str(node))
    assert ast.literal_eval(names) == sorted(ast.literal_eval(names)) == msfp.__all__
    for name in msfp.__all__:
        assert getattr(msfp, name) is not None
    assert set(msfp.__all__) <= set(dir(msfp))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_model_comes_first_then_the_config_and_data_by_keyword(name):
    found = parameters(name)
    first = found[0].name if found else None
    assert first == WITHOUT_MODEL.get(name, "model")
    if first != "model":
        return
    by_position = [each for each in found if each.kind is each.POSITIONAL_OR_KEYWORD]
    assert len(by_position) <= 2
    assert {each.name for each in by_position[1:]} <= SECOND


@pytest.mark.parametrize("name", FUNCTIONS)
def test_progress_is_of_one_kind(name):
    for each in parameters(name):
        assert each.name not in ("advance", "callback")
        if each.name == "progress":
            assert (each.annotation, each.default) == ("Progress", shown_progress)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_what_changes_its_model_says_so_in_its_first_line(name):
    first = inspect.getdoc(getattr(msfp, name)).splitlines()[0]
    assert ("in place" in first) == (name in CHANGES), first


@pytest.fixture(scope="module")
def states():
    """A pipeline in full precision, and copies that were quantized, packed and fine-tuned."""
    plain = tiny_pipeline()
    calls = SAMPLER.calls(4, seed=1)
    calibration = msfp.calibrate(plain, calls=calls)
    path = msfp.record_trajectories(plain, calls=calls)

    def quantized():
        pipe = copy.deepcopy(plain)
        msfp.quantize(pipe, CONFIG, calibration=calibration)
        return pipe

    def finetuned(**options):
        pipe = quantized()
        msfp.finetune(
            pipe, msfp.FinetuneConfig(**SHORT | {"steps": 1}, **options), trajectories=path
        )
        return pipe

    trainable = quantized()
    packed = copy.deepcopy(trainable)
    msfp.pack(packed)
    return {
        "plain": plain,
        "trainable": trainable,
        "packed": packed,
        "hub": finetuned(hub=2),
        "beside": finetuned(lora_position="beside"),
        "calibration": calibration,
        "path": path,
        "calls": calls,
    }


def call(denoiser):
    """A call of a bare denoiser, or of that of a pipeline."""
    torch.manual_seed(0)
    unet = getattr(denoiser, "unet", denoiser)
    for timestep in (900, 100):
        unet(torch.randn(2, 1, 8, 8), timestep)


TRAINED_ON = {"trajectories": "path"}
CASES = {
    "add_branches": ("trainable", {"rank": 1}),
    "allocate_bits": (
        "plain",
        TRAINED_ON | {"config": msfp.QuantizationConfig(budget=8), "calibration": "calibration"},
    ),
    "cache_weights": ("packed", {}),
    "calibrate": ("plain", {"calls": call}),
    "compare": ("packed", {"original": "plain", "sampler": SAMPLER, "count": 4, "seed": 0}),
    "data_trajectories": ("plain", {"calls": "calls", "images": torch.zeros(2, 1, 8, 8)}),
    "estimate": ("plain", {"config": CONFIG, "calls": call}),
    "export_adapters": ("hub", {}),
    "export_lora": ("beside", {}),
    "finetune": ("trainable", TRAINED_ON | {"config": msfp.FinetuneConfig(**STEP)}),
    "inspect_coverage": ("packed", {}),
    "inspect_layers": ("packed", {}),
    "noise_errors": ("packed", TRAINED_ON),
    "pack": ("trainable", {}),
    "precompute_routing": ("hub", {"timesteps": [900, 100]}),
    "quantize": ("plain", {"config": CONFIG, "calibration": "calibration"}),
    "quantize_attention": ("trainable", TRAINED_ON | {"bits": 4, "samples": 4}),
    "record_trajectories": ("plain", {"calls": call}),
    "refine": ("trainable", TRAINED_ON | {"config": msfp.RefinementConfig(samples=4)}),
    "rotate_inputs": ("trainable", TRAINED_ON | {"samples": 4}),
    "save": ("packed", {}),
    "save_calls": ("plain", {"calls": call}),
    "select_denoisers": ("plain", {"names": ["unet"]}),
    "scale_tokens": ("trainable", TRAINED_ON | {"samples": 4}),
    "split_inputs": ("trainable", TRAINED_ON | {"samples": 4}),
    "unpack": ("packed", {"original": "plain"}),
}
"""For each function of a model: the state that it needs, and its other arguments; those that are
strings are states too, and a folder is new."""


def arguments_of(name, states, folder):
    """The other arguments of a function."""
    known = {
        key: states[value] if isinstance(value, str) else value
        for key, value in CASES[name][1].items()
    }
    new = {"folder": folder} if any(each.name == "folder" for each in parameters(name)) else {}
    return known | new


def test_every_function_of_a_model_is_tried():
    assert set(CASES) == set(OF_MODELS)


@pytest.mark.parametrize("name", OF_MODELS)
def test_pipelines_are_taken_and_denoisers_too_or_refused_in_a_sentence(name, states, tmp_path):
    state, function = CASES[name][0], getattr(msfp, name)
    pipe = copy.deepcopy(states[state])
    found = function(pipe, **arguments_of(name, states, tmp_path / "pipeline"))
    if name in NAMES_OF_LAYERS:
        assert found == [str(each) for each in found]
    denoiser = copy.deepcopy(states[state]).unet
    others = arguments_of(name, states, tmp_path / "denoiser")
    if "Module" in inspect.signature(function).parameters["model"].annotation:
        function(denoiser, **others)
        assert state_of(denoiser) == state_of(pipe.unet)
    else:
        kind = DiffusionPipeline.__name__
        with pytest.raises(msfp.InputError, match=f"model must be of the type {kind}, not UNet2D"):
            function(denoiser, **others)


def state_of(denoiser):
    return {name: tensor.tolist() for name, tensor in denoiser.state_dict().items()}


@pytest.mark.parametrize("name", OF_MODELS)
def test_a_model_that_is_none_is_refused_in_a_sentence(name, states, tmp_path):
    with pytest.raises(msfp.InputError, match=r"^model must be .* not int$"):
        getattr(msfp, name)(42, **arguments_of(name, states, tmp_path / "new"))


FREE = {"progress", "description", "features_name"}
"""Arguments that are called or kept, and not looked at."""
WRONG = [
    (name, each.name)
    for name in OF_MODELS
    for each in parameters(name)[1:]
    if each.name not in FREE
]


@pytest.mark.parametrize(("name", "argument"), WRONG)
def test_an_argument_of_another_type_is_refused_by_its_name(name, argument, states, tmp_path):
    arguments = arguments_of(name, states, tmp_path / "new") | {argument: object()}
    with pytest.raises(msfp.InputError, match=argument):
        getattr(msfp, name)(copy.deepcopy(states[CASES[name][0]]), **arguments)


HEAVY = ("torch", "numpy", "diffusers", "transformers", "rich", "matplotlib", "fpformats")


def test_importing_msfp_imports_nothing_heavy_until_it_is_needed():
    code = (
        "import sys, msfp\n"
        f"assert not [name for name in {HEAVY} if name in sys.modules], 'msfp'\n"
        "msfp.QuantizationConfig(), msfp.FinetuneConfig(), msfp.InputError, dir(msfp)\n"
        f"assert not [name for name in {HEAVY} if name in sys.modules], 'configs'\n"
        "msfp.quantize\n"
        "assert 'torch' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)  # noqa: S603
