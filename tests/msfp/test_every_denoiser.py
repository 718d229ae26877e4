"""A small denoiser of every class that diffusers exports is taken all the way."""

import copy
import math
import subprocess
import sys
from pathlib import Path

import diffusers
import pytest
import torch
from denoisers import CASES, exported
from packaging.version import Version

from msfp import (
    FinetuneConfig,
    InputError,
    QuantizationConfig,
    allocate_bits,
    calibrate,
    finetune,
    pack,
    quantize,
    record_trajectories,
)
from msfp.layers.base import quantized_layers
from msfp.layers.selection import quantizable_layers
from msfp.pipelines.trajectories import as_vector
from msfp.support.decibels import sqnr
from msfp.support.fingerprints import digest

RUN = sorted(name for name, case in CASES.items() if not case.reason and hasattr(diffusers, name))
"""Classes that are taken all the way; an older diffusers has fewer."""
LONG = {
    "HunyuanVideo15Transformer3DModel", "I2VGenXLUNet", "Kandinsky3UNet", "UNet1DModel",
    "UNet3DConditionModel", "UNetControlNetXSModel", "UNetMotionModel",
    "UNetSpatioTemporalConditionModel", "MotifVideoTransformer3DModel",
    "HunyuanVideoTransformer3DModel", "WanAnimate2Transformer3DModel",
    "Kandinsky6Transformer3DModel", "WanVACETransformer3DModel",
}  # fmt: skip
"""Classes that take the longest; always slow."""
NAMES = [
    pytest.param(name, marks=[pytest.mark.slow] * (number % 3 > 0 or name in LONG))
    for number, name in enumerate(RUN)
]
HELD_BY_OTHERS = {
    "FluxMultiControlNetModel", "MultiAdapter", "MultiControlNetModel", "MultiControlNetUnionModel",
    "SD3MultiControlNetModel",
}  # fmt: skip
"""Lists of models of other classes in the sweep."""


def test_every_class_of_diffusers_has_an_entry():
    assert set(exported()) - HELD_BY_OTHERS <= set(CASES)


def plain(name):
    """The denoiser in full precision and its output; skipped if an older diffusers differs."""
    try:
        full = CASES[name].make(name)
        return full, as_vector(CASES[name].call(full))
    except (TypeError, ValueError) as error:
        if Version(diffusers.__version__) >= Version("0.42"):
            raise
        pytest.skip(f"diffusers {diffusers.__version__} takes other arguments: {error}")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_denoiser_is_taken_all_the_way(name, tmp_path):
    case = CASES[name]
    full, before = plain(name)
    paths = record_trajectories(full, calls=case.call)
    denoiser = copy.deepcopy(full)
    quantize(denoiser, calibration=case.call)
    assert denoiser.hf_quantizer.quantization_config.request.refine is not None
    assert set(quantized_layers(denoiser)) <= set(quantizable_layers(full))
    trained = copy.deepcopy(denoiser)
    pack(denoiser)
    after = as_vector(case.call(denoiser))
    assert after.isfinite().all()
    assert not torch.equal(after, before)
    if case.saved:
        denoiser.save_pretrained(tmp_path)
        loaded = type(denoiser).from_pretrained(tmp_path)
        assert torch.equal(as_vector(case.call(loaded)), after)
    assert torch.equal(as_vector(case.call(copy.deepcopy(denoiser))), after)
    assert as_vector(case.call(copy.deepcopy(denoiser).dequantize())).isfinite().all()
    if case.trained:
        config = FinetuneConfig(rank=2, steps=2, batch=2)
        history = finetune(trained, config, trajectories=paths, original=full)
        assert len(history.losses) == 2


FLEX = {"AnyFlowFARTransformer3DModel", "Kandinsky6SRTransformer3DModel"}
"""Classes whose attention has no gradient on a CPU."""


@pytest.mark.slow
@pytest.mark.parametrize("name", RUN)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_budget_is_divided(name, monkeypatch):
    monkeypatch.setattr("msfp.ptq.sensitivity.SAMPLES", 3)
    case, (full, _) = CASES[name], plain(name)
    given = {
        "calibration": calibrate(full, calls=case.call),
        "trajectories": record_trajectories(full, calls=case.call),
    }
    if name in FLEX:
        with pytest.raises(InputError, match=f"{name} computes no gradient: FlexAttention"):
            allocate_bits(full, QuantizationConfig(budget=10), **given)
        return
    found = allocate_bits(full, QuantizationConfig(budget=10), **given)
    assert set(found.chosen) < set(quantizable_layers(full))
    assert 3 < found.bits_per_weight <= 10
    assert len(set(found.chosen.values())) > 2
    assert found.predicted_sqnr > 5


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_new_process_loads_every_class_to_the_same_bits(tmp_path):
    expected = {}
    for name in RUN:
        case = CASES[name]
        if case.saved:
            denoiser = case.make(name)
            quantize(denoiser, QuantizationConfig(refine=None), calibration=case.call)
            pack(denoiser)
            denoiser.save_pretrained(tmp_path / name)
            expected[name] = digest([("output", as_vector(case.call(denoiser)))])
    script = Path(__file__).parents[1] / "helpers" / "load_denoisers.py"
    process = subprocess.run(  # noqa: S603
        [sys.executable, script, tmp_path], capture_output=True, text=True, check=False
    )
    assert process.returncode == 0, process.stderr
    assert dict(line.split() for line in process.stdout.splitlines()) == expected


def ratio(expected, found):
    energy, noise = expected.double().square().sum(), (found - expected).double().square().sum()
    return sqnr(energy.item(), noise.item())


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", RUN)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_denoiser_runs_in_a_narrow_dtype_where_the_plain_one_does(name, dtype):
    case = CASES[name]
    full = case.make(name)
    wide = as_vector(case.call(full))
    try:
        narrow = as_vector(case.call(copy.deepcopy(full).to(dtype))).float()
    except (RuntimeError, ValueError, NotImplementedError) as error:
        pytest.skip(f"diffusers does not run it in {dtype}: {error}")
    if not narrow.isfinite().all():
        pytest.skip(f"it is not finite in {dtype}")
    quantize(full, QuantizationConfig(refine=None), calibration=case.call)
    pack(full)
    packed = as_vector(case.call(full))
    found = as_vector(case.call(full.to(dtype))).float()
    assert found.isfinite().all()
    # An ulp of the narrow dtype moves a 4-bit rounding by a step: the error is another, not larger.
    noise = 10 ** (-ratio(wide, packed) / 10) + 10 ** (-ratio(wide, narrow) / 10)
    assert ratio(wide, found) > -10 * math.log10(noise) - 3
