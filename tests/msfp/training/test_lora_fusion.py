"""A LoRA that is fused with a packed denoiser gives what quantizing the fused teacher gives."""

import copy

import pytest
import torch
from accelerate import cpu_offload
from families import call, images, load_pipeline, pipeline, quantized
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from torch import nn

from msfp import InputError, QuantizationConfig, fuse_lora, pack, quantize, reference_pipeline, save
from msfp.layers.packed import packed_layers
from msfp.pipelines.denoiser import denoiser_name, denoiser_of

TARGETS = {
    "conditional_unet": ["to_q", "to_v", "conv1"],
    "flux": ["to_q", "to_v", "proj_mlp"],
}


def lora_of(network, targets, prefix, std=0.3):
    """The tensors of a LoRA of random weights, as in a file of diffusers."""
    network = copy.deepcopy(network)
    inject_adapter_in_model(LoraConfig(r=4, lora_alpha=4, target_modules=targets), network)
    torch.manual_seed(1)
    tensors = get_peft_model_state_dict(network).items()
    return {f"{prefix}.{name}": std * torch.randn_like(value) for name, value in tensors}


def denoiser_lora(pipe, family, **options):
    return lora_of(denoiser_of(pipe), TARGETS[family], denoiser_name(pipe), **options)


def distance(found, wanted):
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.parametrize(
    "family", ["flux", pytest.param("conditional_unet", marks=pytest.mark.slow)]
)
def test_it_is_the_quantized_teacher_with_the_lora_and_much_nearer_than_without(family, tmp_path):
    teacher, config = pipeline(family, tmp_path), QuantizationConfig(6, 6)
    lora, calls = denoiser_lora(teacher, family), [images]
    packed = copy.deepcopy(teacher)
    quantize(packed, config, calibration=calls)
    pack(packed)
    own, without = denoiser_of(packed), call(denoiser_of(packed))
    direct = copy.deepcopy(teacher)
    direct.load_lora_weights(dict(lora))
    wanted = call(denoiser_of(direct))
    with pytest.warns(UserWarning, match="LoRAs of .* were merged"):
        quantize(direct, config, calibration=calls)
    pack(direct)
    before = copy.deepcopy(denoiser_of(teacher).state_dict())
    fuse_lora(packed, lora, teacher=teacher, calibration=calls)
    assert denoiser_of(packed) is own
    fused = call(own)
    assert torch.equal(fused, call(denoiser_of(direct)))
    assert distance(fused, wanted) < 0.5 * distance(without, wanted)
    after = denoiser_of(teacher).state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    save(packed, tmp_path / "saved")
    assert torch.equal(call(denoiser_of(load_pipeline(tmp_path / "saved"))), fused)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return pipeline("conditional_unet", tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def packed(plain):
    pipe = copy.deepcopy(plain)
    quantized(pipe.unet)
    return pipe


@pytest.fixture(scope="module")
def lora(plain):
    return denoiser_lora(plain, "conditional_unet")


def calls(pipe):
    return call(pipe.unet)


def test_a_lora_of_text_encoders_is_merged_into_those_of_the_pipeline(plain, packed, lora):
    pipe = copy.copy(packed)
    pipe.unet = copy.deepcopy(packed.unet)
    both = lora | lora_of(plain.text_encoder, ["q_proj"], "text_encoder")
    wanted = copy.deepcopy(plain)
    wanted.load_lora_weights(dict(both))
    words = torch.tensor([[0, 2, 1]])
    before = plain.text_encoder(words)[0]
    fuse_lora(pipe, both, teacher=plain, calibration=calls)
    found = pipe.text_encoder(words)[0]
    torch.testing.assert_close(found, wanted.text_encoder(words)[0])
    assert distance(found, before) > 0.01
    assert torch.equal(plain.text_encoder(words)[0], before)
    assert torch.equal(packed.text_encoder(words)[0], before)


@pytest.mark.slow
def test_another_lora_is_fused_with_the_teacher_of_the_last(plain, packed, lora, tmp_path):
    pipe, teacher = copy.deepcopy(packed), copy.deepcopy(plain)
    type(plain).save_lora_weights(
        tmp_path, {name.removeprefix("unet."): value for name, value in lora.items()}
    )
    fuse_lora(pipe, tmp_path, teacher=teacher, scale=0.5, calibration=calls)
    other = lora_of(plain.unet, ["to_k"], "unet")
    teacher.load_lora_weights(dict(lora))
    teacher.fuse_lora(lora_scale=0.5)
    teacher.unload_lora_weights()
    fuse_lora(pipe, other, teacher=teacher, calibration=calls)
    teacher.load_lora_weights(dict(other))
    nearest = copy.deepcopy(teacher.unet)
    with pytest.warns(UserWarning, match="LoRAs of .* were merged"):
        quantize(nearest, QuantizationConfig(refine=None), calibration=call)
    pack(nearest)
    assert torch.equal(call(pipe.unet), call(nearest))


def test_a_failure_leaves_the_pipeline_as_it_was(plain, packed, lora):
    pipe, both = copy.copy(packed), lora | lora_of(plain.text_encoder, ["q_proj"], "text_encoder")
    state = copy.deepcopy(pipe.unet.state_dict())
    layers, before = packed_layers(pipe.unet), call(pipe.unet)

    def fail(pipe):
        assert not packed_layers(pipe.unet)
        raise KeyError

    with pytest.raises(KeyError):
        fuse_lora(pipe, both, teacher=plain, calibration=fail)
    assert packed_layers(pipe.unet) == layers
    assert pipe.text_encoder is packed.text_encoder
    assert all(torch.equal(value, state[name]) for name, value in pipe.unet.state_dict().items())
    assert torch.equal(call(pipe.unet), before)


def adapted(pipe, lora):
    pipe.load_lora_weights(dict(lora))
    return pipe


def turned(pipe):
    for parameter in pipe.unet.parameters():
        parameter.data = parameter.flip(0)
    return pipe


def routed(pipe):
    for layer in packed_layers(pipe.unet).values():
        layer.adapters = 2
    return pipe


REFUSALS = {
    "model of no network": (lambda _: {"model": 42}, "^model must be .* not int"),
    "model in full precision": (lambda p: {"model": p["teacher"]}, "model must be quantized and"),
    "model with a hub": (lambda p: {"model": routed(p["model"])}, "model was fine-tuned with a"),
    "model with a LoRA": (
        lambda p: {"model": adapted(p["model"], p["lora"])}, "model has LoRAs loaded: call unload",
    ),
    "model offloaded": (
        lambda p: {"model": (cpu_offload(p["model"].unet, torch.device("cpu")), p["model"])[1]},
        "model is offloaded",
    ),
    "teacher of no network": (lambda _: {"teacher": 42}, "^teacher must be .* not int"),
    "teacher quantized": (lambda p: {"teacher": p["model"]}, "teacher is quantized already"),
    "teacher with a LoRA": (
        lambda p: {"teacher": adapted(p["teacher"], p["lora"])}, "teacher has LoRAs loaded",
    ),
    "teacher of another class": (
        lambda _: {"teacher": nn.Sequential(nn.Linear(2, 2))},
        "teacher must be the model .* a UNet2DConditionModel, not a Sequential",
    ),
    "teacher of other weights": (
        lambda p: {"teacher": turned(p["teacher"])}, "teacher must be the .* weights differ",
    ),
    "teacher of another dtype": (
        lambda p: {"teacher": p["teacher"].to(torch.bfloat16)}, "teacher must have the dtype of m",
    ),
    "lora of another type": (lambda _: {"lora": 42}, "lora must be a path, a name or tensors"),
    "lora that is not there": (lambda _: {"lora": "./no.bin"}, "^lora cannot be loaded: "),
    "lora of another network": (
        lambda _: {"lora": {"unet.x.lora_A.weight": torch.ones(1, 2)}}, "^lora cannot be loaded: ",
    ),
    "lora of a text encoder alone": (
        lambda p: {"lora": lora_of(p["teacher"].text_encoder, ["q_proj"], "text_encoder")},
        "lora has no layer of UNet2DConditionModel",
    ),
    "scale of another type": (lambda _: {"scale": "1"}, "scale must be a number, not '1'"),
    "calibration missing": (lambda _: {"calibration": None}, "calibration must be given"),
    "trajectories of another type": (lambda _: {"trajectories": 1}, "trajectories must be of the"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSALS)
def test_bad_input_is_refused_by_its_name(plain, packed, lora, case):
    change, message = REFUSALS[case]
    good = {
        "model": copy.deepcopy(packed),
        "lora": dict(lora),
        "teacher": copy.deepcopy(plain),
        "calibration": calls,
    }
    arguments = good | change(good)
    with pytest.raises(InputError, match=message):
        fuse_lora(arguments.pop("model"), arguments.pop("lora"), **arguments)


def test_a_network_without_loras_in_diffusers_is_refused():
    pipe = reference_pipeline()
    model = copy.deepcopy(pipe)
    quantize(model, QuantizationConfig(refine=None, activation_bits=None))
    pack(model)
    with pytest.raises(InputError, match="model is a UNet2DModel, for which diffusers loads no Lo"):
        fuse_lora(model, {}, teacher=pipe)
