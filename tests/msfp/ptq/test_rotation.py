"""Which layers rotate their input, that they are better for it, and that the bits stay."""

import copy
from dataclasses import replace

import families
import pytest
import torch

import msfp
from msfp import (
    FinetuneConfig,
    InputError,
    QuantizationConfig,
    RefinementConfig,
    finetune,
    pack,
    quantize,
    rotate_inputs,
    unpack,
)
from msfp.evaluation.prediction_errors import noise_errors
from msfp.layers.base import quantized_layers
from msfp.layers.execution import backends
from msfp.layers.trainable import full_precision, trainable_layers
from msfp.pipelines.denoiser import denoiser_of
from msfp.training.teacher import Teacher

PLAIN = QuantizationConfig(refine=None)
ROTATED = RefinementConfig(samples=8, branch_rank=2, rotate_inputs=True)
SCHEMES = ["mixup", "nvfp4_int4"]


@pytest.fixture(scope="module")
def paths():
    return msfp.record_trajectories(families.pipeline("dit", None), calls=families.images)


def quantized(family="dit", **config):
    pipe = families.pipeline(family, None)
    quantize(pipe, QuantizationConfig(**config), calibration=families.images)
    return pipe


def rotations(pipe):
    return {name: each.rotation for name, each in quantized_layers(denoiser_of(pipe)).items()}


@pytest.mark.parametrize("scheme", ["mixup", "mx"])
def test_rotation_lowers_the_error_of_outputs(paths, scheme):
    refine = RefinementConfig(samples=8, branch_rank=0, rotate_inputs=False)
    pipe = quantized(scheme=scheme, refine=refine)
    other = quantized(scheme=scheme, refine=replace(refine, rotate_inputs=True))
    assert any(size > 1 for size in rotations(other).values())
    errors = [sum(noise_errors(each, trajectories=paths)) for each in (pipe, other)]
    assert errors[1] < errors[0]


def test_layers_of_8_bits_and_without_a_matrix_are_not_rotated(paths):
    pipe = quantized(refine=None)
    chosen = rotate_inputs(pipe, trajectories=paths)
    found = rotations(pipe)
    assert chosen == [name for name, size in found.items() if size > 1]
    for name, layer in trainable_layers(denoiser_of(pipe)).items():
        if layer.input_quantizer.format.bits == 8 or layer.weight.shape[1] % 16:
            assert found[name] == 1
        if found[name] > 1:
            assert layer.input_quantizer.format.signed
            assert layer.weight.shape[1] % found[name] == 0


def test_in_full_precision_a_rotated_network_computes_the_same(paths):
    pipe = families.pipeline("dit", None)
    network = denoiser_of(pipe)
    step, row = torch.tensor([0, 1]), torch.tensor([0, 1])
    with torch.no_grad():
        wanted = paths.predict(network, step, row)
        quantize(pipe, PLAIN, calibration=families.images)
        assert rotate_inputs(pipe, trajectories=paths)
        with full_precision(network):
            found = paths.predict(network, step, row)
    assert torch.allclose(found, wanted, atol=1e-5)
    assert not torch.equal(found, wanted)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_checkpoint_keeps_rotations_and_bits(tmp_path, scheme):
    pipe = quantized(scheme=scheme, refine=ROTATED)
    before = rotations(pipe)
    assert max(before.values()) > 1
    wanted = families.images(pipe)
    pack(pipe)
    assert rotations(pipe) == before
    assert torch.equal(families.images(pipe), wanted)
    msfp.save(pipe, tmp_path / "packed")
    loaded = msfp.load(tmp_path / "packed")
    assert rotations(loaded) == before
    assert torch.equal(families.images(loaded), wanted)
    facts = {each.layer: each.formats.rotation for each in msfp.inspect_layers(tmp_path / "packed")}
    assert facts == before
    with backends.floats_only():
        assert torch.equal(families.images(loaded), wanted)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_weight_that_others_see_is_that_of_the_input(scheme):
    pipe = quantized(scheme=scheme, refine=ROTATED)
    pack(pipe)
    network = denoiser_of(pipe)
    plain = copy.deepcopy(network).dequantize()
    assert not quantized_layers(plain)
    full = denoiser_of(families.pipeline("dit", None))
    for name, layer in quantized_layers(network).items():
        weight = full.get_submodule(name).weight
        found = plain.get_submodule(name).weight
        assert (found - weight).norm() < 0.4 * weight.norm(), name
        if layer.branch_down is None:
            assert torch.equal(found, layer.weight.as_subclass(torch.Tensor))


def test_a_packed_network_is_unpacked_to_the_same_bits():
    pipe = quantized(refine=ROTATED)
    wanted = families.images(pipe)
    pack(pipe)
    unpack(pipe, original=families.pipeline("dit", None))
    assert max(rotations(pipe).values()) > 1
    assert torch.equal(families.images(pipe), wanted)


def test_the_original_teaches_a_rotated_network(paths):
    pipe, original = quantized(refine=ROTATED), families.pipeline("dit", None)
    step, row = torch.tensor([0, 1]), torch.tensor([0, 1])
    with Teacher(denoiser_of(pipe), denoiser_of(original)).active() as teacher:
        found = paths.predict(teacher, step, row)
    with torch.no_grad():
        wanted = paths.predict(denoiser_of(original), step, row)
    assert torch.allclose(found, wanted, atol=1e-5)
    config = FinetuneConfig(steps=2, batch=4)
    finetune(pipe, config, trajectories=paths, original=original)
    assert max(rotations(pipe).values()) > 1


def test_a_state_resumes_to_the_same_bits(tmp_path):
    found = []
    for _ in range(2):
        pipe = families.pipeline("dit", None)
        config = QuantizationConfig(refine=ROTATED)
        quantize(pipe, config, calibration=families.images, state=tmp_path / "state")
        found.append((rotations(pipe), denoiser_of(pipe).state_dict()))
    assert found[0][0] == found[1][0]
    assert all(torch.equal(each, found[1][1][name]) for name, each in found[0][1].items())


@pytest.mark.slow
def test_convolutions_are_rotated_over_their_channels():
    pipe = quantized("unet", scheme="mx", refine=ROTATED)
    kinds = {
        type(layer).__name__ for layer in quantized_layers(pipe.unet).values() if layer.rotation > 1
    }
    assert any("Conv" in kind for kind in kinds)
    wanted = families.images(pipe)
    pack(pipe)
    assert torch.equal(families.images(pipe), wanted)


def test_a_rotated_layer_compiles_without_a_graph_break():
    pipe = quantized(refine=ROTATED)
    pack(pipe)
    layers = quantized_layers(denoiser_of(pipe)).values()
    layer = next(each for each in layers if each.rotation > 1).requires_grad_(False)
    x = torch.randn(3, 5, layer.weight_shape[1], generator=torch.Generator().manual_seed(0))
    torch._dynamo.reset()
    with torch.no_grad():
        assert torch.equal(torch.compile(layer, fullgraph=True)(x), layer(x))


def test_branches_read_the_input_as_it_is():
    pipe = quantized(refine=ROTATED)
    pack(pipe)
    full = denoiser_of(families.pipeline("dit", None))
    for name, layer in quantized_layers(denoiser_of(pipe)).items():
        if layer.branch_down is not None:
            matrix = full.get_submodule(name).weight.flatten(1)
            left = torch.linalg.qr(layer.branch_up).Q.mT @ (
                matrix - layer.branch_up @ layer.branch_down
            )
            assert left.norm() < 0.01 * matrix.norm(), name


def test_tokens_of_rotated_inputs_may_have_scales():
    refine = RefinementConfig(samples=8, branch_rank=0, rotate_inputs=True, token_scales=True)
    pipe = quantized(refine=refine)
    kinds = {
        (each.rotation > 1, each.formats.input_granularity)
        for each in quantized_layers(denoiser_of(pipe)).values()
    }
    assert (True, "token") in kinds


def test_wrong_arguments_are_refused(paths):
    with pytest.raises(InputError, match="rotate_inputs must be"):
        RefinementConfig(rotate_inputs=1)
    with pytest.raises(InputError, match="samples must be between 1 and"):
        rotate_inputs(quantized(refine=None), trajectories=paths, samples=0)
    with pytest.raises(InputError, match="token_scales must be"):
        rotate_inputs(quantized(refine=None), trajectories=paths, token_scales=None)
    pipe = quantized(refine=None)
    pack(pipe)
    with pytest.raises(InputError, match="not yet packed"):
        rotate_inputs(pipe, trajectories=paths)
