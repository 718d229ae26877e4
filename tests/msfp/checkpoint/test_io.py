import json
import shutil

import pytest
import torch
from elsewhere import sample
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from scripts import forked
from tiny import tiny_pipeline, tiny_quantized
from torch import nn

from msfp import (
    FinetuneConfig,
    InputError,
    QuantizationConfig,
    finetune,
    load,
    pack,
    quantize,
    save,
)
from msfp.checkpoint.integrity import describe
from msfp.checkpoint.io import packed_size
from msfp.layers.attention import OPERANDS
from msfp.layers.lora.routers import Router
from msfp.layers.packed import packed_layers


@pytest.fixture
def routed(quantized, trajectories):
    """A fine-tuned pipeline with a hub of two."""
    pipe, _ = quantized()
    finetune(pipe.unet, FinetuneConfig(hub=2, rank=2, steps=3, batch=4), trajectories=trajectories)
    return pipe


@pytest.fixture
def saved(packed, tmp_path):
    save(packed[0], tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.slow
def test_a_new_process_samples_bit_equal(routed, sampler, tmp_path):
    expected = sampler(routed, 8, 3)
    save(routed, tmp_path / "model")
    output = tmp_path / "images.safetensors"
    forked(sample, (tmp_path / "model", torch.get_num_threads(), output), processes=1)
    assert torch.equal(load_file(output)["images"], expected)


def test_the_file_holds_the_bits_of_the_weights_and_little_else(saved):
    unet = load(saved).unet
    bits = 8 * packed_size(unet)
    for layer in packed_layers(unet).values():
        bits -= layer.weight_shape.numel() * layer.formats.weight.bits
        bits -= 32 * (len(layer.weight_scale) + 1 + (layer.input_zero_point is not None))
    plain = sum(p.numel() for p in unet.parameters() if p.dtype == torch.float32)
    assert bits == 32 * plain
    size = (saved / TENSORS).stat().st_size
    assert packed_size(unet) < size < 1.05 * packed_size(unet)


def test_saving_what_was_loaded_gives_the_same_tensors_and_formats(saved, tmp_path):
    save(load(saved), tmp_path / "again")
    assert description(saved) == description(tmp_path / "again")
    assert header(saved / TENSORS) == header(tmp_path / "again" / TENSORS)  # with the checksum


def test_a_router_is_saved_and_stays_float32_in_a_half_precision_pipeline(routed, tmp_path):
    save(routed, tmp_path / "model")
    loaded = type(routed.unet).from_pretrained(
        tmp_path / "model" / "unet", torch_dtype=torch.float16
    )
    assert {p.dtype for p in loaded.router.parameters()} == {torch.float32}
    routed.unet.half()
    assert isinstance(loaded.router, Router)
    assert {p.dtype for p in routed.unet.router.parameters()} == {torch.float32}
    x = torch.randn(3, 1, 16, 16).half()
    for timesteps in (900, torch.tensor([900, 500, 20])):
        with torch.no_grad():
            expected = routed.unet(x, timesteps).sample
            assert torch.equal(loaded(x, timesteps).sample, expected)


def test_a_routed_denoiser_cannot_be_dequantized(routed):
    with pytest.raises(InputError, match="with 2 weights for each layer cannot be dequantized"):
        routed.unet.dequantize()


class Network(nn.Module):
    """A network that diffusers knows nothing of."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Sequential(nn.Conv1d(4, 8, 3, padding=1), nn.SiLU())
        self.out = nn.Linear(8, 4)

    def forward(self, x):
        return self.out(self.inner(x).transpose(1, 2))


@pytest.fixture
def network():
    network = Network()
    quantize(network, QuantizationConfig(), calibration=lambda net: net(torch.randn(2, 4, 100)))
    pack(network)
    return network


def test_a_plain_network_is_saved_and_loaded_into_its_like(network, tmp_path):
    save(network, tmp_path / "model")
    assert sorted(file.name for file in (tmp_path / "model").iterdir()) == [
        "README.md",
        "config.json",
        "diffusion_pytorch_model.safetensors",
    ]
    loaded = load(tmp_path / "model", into=Network())
    x = torch.randn(2, 4, 8)
    assert torch.equal(loaded(x), network(x))
    save(loaded, tmp_path / "again")
    files = [tmp_path / name / "diffusion_pytorch_model.safetensors" for name in ("model", "again")]
    assert header(files[0]) == header(files[1])  # with the checksum


def test_another_network_is_told_which_layer_it_lacks(network, tmp_path):
    save(network, tmp_path / "model")
    with pytest.raises(InputError, match=r"Sequential has no layer 'inner\.0'"):
        load(tmp_path / "model", into=nn.Sequential(nn.Linear(8, 4)))


def test_a_trainable_denoiser_is_not_saved(quantized, tmp_path):
    with pytest.raises(InputError, match=r"layer conv_in is trainable: call msfp\.pack before"):
        save(quantized()[0], tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_a_plain_denoiser_is_not_saved(reference, tmp_path):
    with pytest.raises(InputError, match=r"call msfp\.quantize first"):
        save(reference, tmp_path / "model")


def test_a_folder_that_is_not_empty_is_refused_and_left_alone(saved):
    before = {path: path.stat().st_mtime_ns for path in saved.rglob("*")}
    with pytest.raises(InputError, match="exists and is not empty"):
        save(load(saved), saved)
    assert {path: path.stat().st_mtime_ns for path in saved.rglob("*")} == before


def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(InputError, match="no component that is quantized by msfp"):
        load(tmp_path)
    with pytest.raises(InputError, match="no quantization config of msfp"):
        load(tmp_path, into=Network())


def test_the_folder_of_a_network_by_itself_says_how_it_is_read(saved, network, tmp_path):
    message = r"a denoiser without a pipeline: read it with UNet2DModel\.from_pretrained"
    with pytest.raises(InputError, match=message):
        load(saved / "unet")
    save(network, tmp_path / "network")
    with pytest.raises(InputError, match="without a pipeline: into must be a network of the same"):
        load(tmp_path / "network")
    with pytest.raises(InputError, match="into is quantized already"):
        load(tmp_path / "network", into=network)


def test_a_folder_that_does_not_exist_is_refused(tmp_path):
    for arguments in ({}, {"into": Network()}):
        with pytest.raises(InputError, match="nowhere cannot be loaded: it is not a folder"):
            load(tmp_path / "nowhere", **arguments)


def header(file):
    with safe_open(file, "pt") as opened:
        return opened.metadata()


def description(folder):
    return json.loads((folder / "unet" / "config.json").read_text())["quantization_config"]


def rewrite(folder, config, tensors=None):
    """Write changed files with a checksum that fits, as a wrong program would."""
    whole = json.loads((folder / "unet" / "config.json").read_text())
    whole["quantization_config"] = config
    (folder / "unet" / "config.json").write_text(json.dumps(whole))
    tensors = load_file(folder / TENSORS) if tensors is None else tensors
    save_file(tensors, folder / TENSORS, describe(tensors, config))


def damage_json(change):
    def apply(folder):
        config = description(folder)
        change(config)
        rewrite(folder, config)

    return apply


def damage_tensors(change):
    def apply(folder):
        tensors = load_file(folder / TENSORS)
        change(tensors)
        rewrite(folder, description(folder), tensors)

    return apply


def replace_tensor(name, tensor):
    return damage_tensors(lambda tensors: tensors.update({name: tensor}))


def truncate(folder):
    (folder / TENSORS).write_bytes((folder / TENSORS).read_bytes()[:-100])


def flip_a_byte(folder):
    data = bytearray((folder / TENSORS).read_bytes())
    data[-1000] ^= 1
    (folder / TENSORS).write_bytes(data)


def tamper_with_json(folder):
    file = folder / "unet" / "config.json"
    file.write_text(file.read_text().replace("E2M2U", "E3M1U"))


def without_metadata(folder):
    save_file(load_file(folder / TENSORS), folder / TENSORS)


def tell(**changes):
    """Change what the file of tensors says of itself."""

    def apply(folder):
        told = json.loads(header(folder / TENSORS)["msfp"]) | changes
        save_file(load_file(folder / TENSORS), folder / TENSORS, {"msfp": json.dumps(told)})

    return apply


def other_library(folder):
    file = folder / "model_index.json"
    index = json.loads(file.read_text())
    index["unet"] = ["antigravity", "UNet2DModel"]
    file.write_text(json.dumps(index))


def formats_of(layer, **changes):
    return damage_json(lambda d: d["layers"][layer].update(changes))


def bits_of(*numbers):
    return torch.tensor(numbers).view(torch.int32)


TENSORS = "unet/diffusion_pytorch_model.safetensors"
UNSIGNED = "down_blocks.0.resnets.0.conv1"
DAMAGE = {
    "truncated": (truncate, r"diffusion_pytorch_model\.safetensors"),
    "flipped byte": (flip_a_byte, "checksum"),
    "tampered": (tamper_with_json, "checksum"),
    "no metadata": (without_metadata, "must be a quantized denoiser, but its metadata have no"),
    "kind": (tell(kind="a calibration"), "must be a quantized denoiser, not a calibration"),
    "file version": (tell(version=99), "a quantized denoiser of version 99; this msfp reads"),
    "no checksum": (tell(facts={}), "checksum"),
    "no tensors": (lambda folder: (folder / TENSORS).unlink(), r"no file named|cannot be loaded"),
    "no json": (lambda folder: (folder / "unet" / "config.json").write_text("{"), "cannot be"),
    "a list": (lambda folder: (folder / "unet" / "config.json").write_text("[]"), "no component"),
    "version": (damage_json(lambda d: d.update(format_version=99)), "denoiser of version 99; this"),
    "library": (other_library, "must be a class of diffusers, not of antigravity"),
    "unknown key": (
        damage_json(lambda d: d.update(colour=1)),
        "has no 'colour': it may have",
    ),
    "format": (formats_of("conv_in", weight_format="E9"), "layer 'conv_in'.*'E9' is not a format"),
    "wide format": (formats_of("conv_in", weight_format="E5M10"), "has 16 bits, more than 8"),
    "granularity": (
        formats_of("conv_in", weight_granularity="row"),
        r"one of \('channel', 'block'\), not",
    ),
    "input granularity": (
        formats_of("conv_in", input_granularity="row"),
        r"\('tensor', 'channel', 'token'\), not",
    ),
    "token scales": (
        formats_of("conv_in", input_granularity="token"),
        "layer 'conv_in': input_granularity 'token' is for linear layers",
    ),
    "channel scales": (
        formats_of(UNSIGNED, input_granularity="channel"),
        "input_scale expected shape",
    ),
    "rank": (formats_of("conv_in", branch_rank=-1), "branch_rank must be a whole number from 0"),
    "branches": (
        formats_of("conv_in", branch_adapters=1),
        "branch_adapters must be a whole number",
    ),
    "unrouted": (
        formats_of("conv_in", branch_rank=1, branch_adapters=2),
        "branch_adapters must be the 1 adapters, not 2",
    ),
    "no branch": (formats_of("conv_in", branch_rank=1), r"missing: \['conv_in\.branch_down"),
    "no attention": (
        damage_json(lambda d: d.update(products={"conv_in": dict.fromkeys(OPERANDS, "E2M1")})),
        "an attention module 'conv_in', but UNet2DModel has none",
    ),
    "format key": (formats_of("conv_in", more=1), "layer 'conv_in'.*must have the keys"),
    "layer": (damage_json(lambda d: d["layers"].pop("conv_in")), r"missing: \['conv_in\.weight"),
    "other layer": (
        damage_json(lambda d: d["layers"].update(conv_on=d["layers"]["conv_in"])),
        "UNet2DModel has no layer 'conv_on'",
    ),
    "no adapters": (damage_json(lambda d: d.update(adapters=0)), "adapters must be a positive int"),
    "no router": (damage_json(lambda d: d.update(adapters=2)), "missing.*router"),
    "missing": (damage_tensors(lambda t: t.pop("conv_in.codes")), r"missing: \['conv_in\.codes"),
    "no zero point": (
        damage_tensors(lambda t: t.pop(f"{UNSIGNED}.input_zero_point")),
        "missing.*zero_point",
    ),
    "extra": (replace_tensor("extra", torch.ones(1)), r"unexpected tensors: \['extra'\]"),
    "short": (
        damage_tensors(lambda t: t.update({"conv_in.codes": t["conv_in.codes"][:-1].clone()})),
        r"conv_in\.codes expected shape",
    ),
    "bias": (replace_tensor("conv_in.bias", torch.ones(3)), r"conv_in\.bias expected shape"),
    "scales": (replace_tensor("conv_in.weight_scale", bits_of(1.0)), r"weight_scale expected"),
    "float scales": (
        replace_tensor("conv_in.weight_scale", torch.ones(8)),
        r"conv_in\.weight_scale must be torch\.int32, not torch\.float32",
    ),
    "wide codes": (
        damage_tensors(lambda t: t.update({"conv_in.codes": t["conv_in.codes"].long()})),
        r"conv_in\.codes must be torch\.uint8, not torch\.int64",
    ),
    "nan": (
        replace_tensor("conv_in.input_scale", bits_of(torch.nan)[0]),
        r"conv_in\.input_scale must be positive and finite float32 numbers",
    ),
    "negative": (replace_tensor("conv_in.weight_scale", bits_of(*[-1.0] * 8)), "positive"),
    "infinite": (
        replace_tensor(f"{UNSIGNED}.input_zero_point", bits_of(torch.inf)[0]),
        "input_zero_point must be finite float32",
    ),
    "vector": (replace_tensor("conv_in.input_scale", bits_of(*[1.0] * 16)), "expected shape"),
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A whole checkpoint; not to be changed."""
    pipe = tiny_quantized(tiny_pipeline())
    pack(pipe)
    folder = tmp_path_factory.mktemp("tiny") / "model"
    save(pipe, folder)
    assert load(folder)
    return folder


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_refused_with_what_is_wrong(tiny, tmp_path, damage):
    change, message = DAMAGE[damage]
    folder = tmp_path / "model"
    shutil.copytree(tiny, folder)
    change(folder)
    with pytest.raises(InputError, match=message) as caught:
        load(folder)
    assert len(str(caught.value).splitlines()) == 1
