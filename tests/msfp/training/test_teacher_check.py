import copy
import re

import pytest
import torch
from families import pipeline
from torch import nn

import msfp
from msfp import InputError, QuantizationConfig, RefinementConfig, pack
from msfp.cli.main import main
from msfp.layers.base import quantized_layers
from msfp.layers.kinds import KINDS
from msfp.layers.trainable import trainable_layers
from msfp.ptq.low_rank_branches import add_branches
from msfp.training.teacher_check import check_weights
from msfp.training.unpacking import unpack

REFINED = {"samples": 16, "positions": 1024}


@pytest.fixture(scope="module")
def full():
    """A tiny full-precision pipeline; not to be changed."""
    return pipeline("unet", None)


def noisy(denoiser, share, seed=0):
    """A copy whose weights have noise of a share of their standard deviation."""
    other = copy.deepcopy(denoiser)
    generator = torch.Generator().manual_seed(seed)
    for module in other.modules():
        if isinstance(module, tuple(KINDS)):
            weight = module.weight.data
            weight += share * weight.std() * torch.randn(weight.shape, generator=generator)
    return other


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.SiLU(), nn.Conv2d(32, 32, 3))


def packed(full, change=lambda _: None, **config):
    packed = copy.deepcopy(full)
    config = QuantizationConfig(**{"end_bits": 4, "activation_bits": None, "refine": None} | config)
    msfp.quantize(packed, config)
    change(packed)
    pack(packed)
    return packed


def refused(student, original, message):
    with pytest.raises(InputError, match=message):
        unpack(student, original=original)
    assert not trainable_layers(student)


@pytest.mark.parametrize(
    ("bits", "refine"),
    [
        (4, None),
        (3, RefinementConfig(**REFINED, rounding="nearest", split_inputs=False)),
        (4, RefinementConfig(samples=1, positions=16, correct_bias="none")),
    ],
)
def test_the_true_original_is_taken_and_a_noisy_one_is_not(bits, refine, full, sampler):
    """Also in narrow dtypes, where both are rounded."""
    pipe = copy.deepcopy(full)
    config = QuantizationConfig(bits, activation_bits=bits, end_bits=bits, refine=refine)
    msfp.quantize(pipe, config, calibration=sampler.calls(8, seed=1))
    pack(pipe.unet)
    taken_in_every_dtype(pipe.unet, full.unet)
    with pytest.raises(InputError, match="its weights differ: "):
        check_weights(pipe.unet, noisy(full.unet, 0.5))


def taken_in_every_dtype(student, original):
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for other in (torch.float32, torch.bfloat16):
            check_weights(copy.deepcopy(student).to(other), copy.deepcopy(original).to(dtype))


def test_a_model_of_another_seed_is_refused():
    student = packed(network())
    torch.manual_seed(1)
    other = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.SiLU(), nn.Conv2d(32, 32, 3))
    refused(student, other, r"its weights differ: [02]\.weight is 1\d\d % off")


def test_branches_tell_little_noise_and_the_layer_that_differs():
    full = network()
    student = packed(full, lambda network: add_branches(network, 4))
    taken_in_every_dtype(student, full)
    refused(student, noisy(full, 0.1), r"0\.weight has \d+\.\d % where its branch has taken")
    other = copy.deepcopy(full)
    other[2].weight.data *= 2
    refused(student, other, r"2\.weight has \d+\.\d % where its branch has taken")
    unpack(student, original=full)


def test_a_branch_that_fine_tuning_added_to_is_not_taken_for_that_of_another():
    def with_lora(network):
        add_branches(network, 4)
        layer = network[2]
        torch.manual_seed(1)
        for name, dim in (("branch_down", 0), ("branch_up", 1)):
            factor = layer._parameters[name]
            more = 0.3 * factor.std() * torch.randn_like(factor)
            setattr(layer, name, nn.Parameter(torch.cat([factor, more], dim), requires_grad=False))

    full = network()
    student = packed(full, with_lora)
    assert quantized_layers(student)["2"].branch_up.shape == (32, 8)
    unpack(student, original=full)


def test_weights_that_are_not_quantized_must_be_the_same():
    full = network()
    student = packed(full, exclude=("2",))
    other = copy.deepcopy(full)
    other[2].weight.data *= 1.05
    refused(student, other, r"2\.weight is 4\.8 % off")
    unpack(student, original=full.bfloat16())


def test_layers_that_are_far_are_taken_where_weights_that_are_not_quantized_are_the_same():
    def move(network):
        layer = network[2]
        noise = 0.6 * layer.weight.std() * torch.randn_like(layer.weight)
        layer.weight = nn.Parameter(layer.weight_quantizer(layer.weight + noise).detach())

    full = network()
    unpack(packed(full, move, exclude=("0",)), original=full)
    refused(packed(full, move), noisy(full, 0.5), r"0\.weight is \d\d % off")


def test_the_command_refuses_another_original_before_anything_is_recorded(
    full, tmp_path, capsys, monkeypatch
):
    def fail(*_args, **_more):
        raise AssertionError

    quantized, changed = copy.deepcopy(full), copy.deepcopy(full)
    msfp.quantize(quantized, QuantizationConfig(4, activation_bits=None, refine=None))
    pack(quantized.unet)
    msfp.save(quantized, tmp_path / "q")
    changed.unet = noisy(changed.unet, 0.5)
    changed.save_pretrained(tmp_path / "changed")
    monkeypatch.setattr("msfp.cli.finetuning_run.record_trajectories", fail)
    words = ["finetune", tmp_path / "q", "--original", tmp_path / "changed", "--output"]
    assert main([*map(str, words), str(tmp_path / "tuned")]) == 2
    error = capsys.readouterr().err
    wanted = r"original must be the model that was quantized, but its weights differ: \S+ is"
    assert re.search(wanted, error)
    assert not list(tmp_path.glob("tuned*"))
