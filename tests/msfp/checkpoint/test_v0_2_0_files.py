"""Files of msfp 0.2.0 are still read, and runs of it resume.

`tests/data/v0.2.0/make.py` wrote them with that version, and with them what they must give. Weights
come from codes and scales alone, so they have the same bits everywhere. Outputs, losses and
measures are sums of products, which may differ in the last bit between CPUs: they are compared up
to rounding.
"""

import copy
import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from calibrations import same
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import fpformats
import msfp
from fpformats import quantize_blocks
from msfp import Calibration, DatasetStatistics, InputError, QuantizationConfig
from msfp.checkpoint.diffusers_config import MSFPConfig
from msfp.evaluation.dataset_statistics import dataset_statistics
from msfp.evaluation.fingerprint import STATE, comparison_fingerprint
from msfp.layers.attention import attention_products
from msfp.layers.block import BlockLayer
from msfp.layers.packed import packed_layers
from msfp.search import layer_search
from msfp.support.container import check_fingerprint

FOLDER = Path(__file__).parents[2] / "data" / "v0.2.0"
EXPECTED = json.loads((FOLDER / "expected.json").read_text())
TENSORS = load_file(FOLDER / "expected.safetensors")
PIPELINES = (
    "default", "adaround", "branch", "products", "nvfp4", "hub", "segments", "embedding", "beside",
)  # fmt: skip
CHECKPOINTS = (*PIPELINES, "network")
CALIBRATION = FOLDER / "calibration.safetensors"
SAMPLER = msfp.Sampler(steps=4, batch=4)
TUNING = msfp.FinetuneConfig(
    hub=2, rank=2, steps=4, batch=8, ema=0.5, evaluate_every=2, save_every=1, clip=0.1,
    dfa_power=1.0,
)  # fmt: skip
FACTORS = {999: -3.0, 500: -2.0, 1: -1.0}
GIVEN = torch.linspace(-2, 2, 30).reshape(5, 6)


class Denoiser(nn.Module):
    """Two layers and the timestep, as in `make.py`."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 6)

    def forward(self, sample, timestep):
        scale = 1 + torch.as_tensor(timestep).float().reshape(-1, 1) / 1000
        return self.last(nn.functional.silu(self.first(sample)) * scale)


@pytest.fixture
def fractional_zero_points(monkeypatch):
    """Let the search find zero points as it did in 0.2.0: not whole numbers of steps."""

    def search(*arguments, whole_zero_points=False, **options):
        del whole_zero_points
        return fpformats.search(*arguments, **options)

    monkeypatch.setattr(layer_search, "search", search)


def denoiser():
    torch.manual_seed(2)
    return Denoiser()


def call(network):
    torch.manual_seed(3)
    for timestep in (999, 500, 1):
        network(torch.randn(5, 6), timestep)


def full_precision():
    """The pipeline that the checkpoints were quantized from."""
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(4, 8),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=2,
        attention_head_dim=4,
    ).eval()
    return silent(DDIMPipeline(unet, DDIMScheduler(clip_sample=False)))


def few_features(images):
    return images.mean(dim=1).flatten(1)[:, :4]


def silent(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def load(folder, name):
    """The checkpoint of a name in a folder, and its network."""
    if name == "network":
        network = msfp.load(folder, into=denoiser())
        return network, network
    pipe = silent(msfp.load(folder))
    return pipe, pipe.unet


def weights(network):
    """Digest of the dequantized weights of all layers and their adapters."""
    found = hashlib.sha256()
    for layer in packed_layers(network).values():
        for adapter in range(layer.adapters):
            weight = layer.quantized_weight(adapter, torch.float32)
            found.update(weight.detach().contiguous().numpy().tobytes())
    return found.hexdigest()


@pytest.fixture(autouse=True)
def one_scale_for_the_batch(monkeypatch):
    """That version had one tensor scale of NVFP4 for a batch; now each sample has its own."""

    def of_the_batch(x, blocks, axis, *, searched):
        assert not searched
        return quantize_blocks(x, blocks, axis=axis)

    monkeypatch.setattr("msfp.layers.block.quantize_input_blocks", of_the_batch)


@torch.no_grad()
def assert_outputs(network, name):
    if name == "network":
        torch.testing.assert_close(network(GIVEN, 10), TENSORS[name])
        return
    for timestep in (900, 100):
        prediction = network(TENSORS["x"], timestep).sample
        torch.testing.assert_close(prediction, TENSORS[f"{name}/{timestep}"], atol=1e-5, rtol=1e-4)


def copied(name, folder):
    """A copy of a file or a folder, to be changed."""
    source, target = FOLDER / name, folder / name
    (shutil.copytree if source.is_dir() else shutil.copyfile)(source, target)
    return target


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_checkpoint_gives_the_same_weights_and_outputs_also_when_saved_again(name, tmp_path):
    model, network = load(FOLDER / name, name)
    assert weights(network) == EXPECTED[name]
    assert_outputs(network, name)
    msfp.save(model, tmp_path / name)
    _, again = load(tmp_path / name, name)
    assert weights(again) == EXPECTED[name]
    assert_outputs(again, name)
    facts = [
        [each.to_dict() for each in msfp.inspect_layers(source)]
        for source in (FOLDER / name, model, tmp_path / name)
    ]
    assert facts[0] == facts[1] == facts[2]
    assert len(facts[0]) == len(packed_layers(network))


def test_what_makes_a_checkpoint_special_is_there():
    networks = {name: load(FOLDER / name, name)[1] for name in PIPELINES}
    layers = {name: list(packed_layers(network).values()) for name, network in networks.items()}
    assert {layer.formats.branch_rank for layer in layers["branch"]} == {0, 1}
    assert any(layer.formats.input_granularity == "channel" for layer in layers["default"])
    assert attention_products(networks["products"])
    assert all(isinstance(layer, BlockLayer) for layer in layers["nvfp4"])
    kinds = {"hub": "learned", "segments": "segments", "embedding": "denoiser", "beside": "learned"}
    for name, kind in kinds.items():
        assert networks[name].router.kind == kind
        assert {layer.choices for layer in layers[name]} == {2}
    assert {layer.formats.branch_adapters for layer in layers["beside"]} == {2}


def test_the_request_of_a_checkpoint_has_the_names_of_today():
    request = load(FOLDER / "products", "products")[1].config.quantization_config.request
    expected = QuantizationConfig(attention_bits=4, refine=None, include=("conv_in", "conv_out"))
    assert request == expected


def test_settings_that_are_gone_are_kept_as_retired(tmp_path):
    model, network = load(FOLDER / "adaround", "adaround")
    msfp.save(model, tmp_path / "again")
    for unet in (network, load(tmp_path / "again", "adaround")[1]):
        config = unet.config.quantization_config
        assert config.retired == {"rounding": "adaround", "scales": "output", "sweeps": 1}
        assert config.request.overrides == {"conv_in": {"weight_bits": 6}}
        assert unet.conv_in.formats.weight.bits == 6
    assert MSFPConfig().retired == {}


def test_a_changed_checkpoint_does_not_match_its_checksum(tmp_path):
    folder = copied("products", tmp_path)
    file = folder / "unet" / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"]["weights"] = 5
    file.write_text(json.dumps(config))
    with pytest.raises(InputError, match="do not match their checksum"):
        msfp.load(folder)


@pytest.mark.usefixtures("fractional_zero_points")
def test_a_calibration_is_read_and_no_call_of_it_is_made_again(tmp_path):
    saved = Calibration.load(CALIBRATION)
    file = copied(CALIBRATION.name, tmp_path)
    made = []
    resumed = msfp.calibrate(denoiser(), calls=made.append, file=file, description={"seed": 3})
    assert made == []
    assert same(saved, resumed)
    assert same(saved, Calibration.load(file))  # which is of today's version now
    assert saved.timesteps == {999: 1, 500: 1, 1: 1}
    assert [histogram.count for histogram in saved.inputs.values()] == [90, 120]
    network = denoiser()
    msfp.quantize(network, QuantizationConfig(end_bits=4, refine=None), calibration=saved)
    msfp.pack(network)
    assert weights(network) == EXPECTED["network"]
    assert_outputs(network, "network")


def test_a_calibration_of_other_calls_is_not_resumed(tmp_path):
    file = copied(CALIBRATION.name, tmp_path)
    with pytest.raises(InputError, match="of different calls: seed 4 and 3"):
        msfp.calibrate(denoiser(), calls=call, file=file, description={"seed": 4})


def test_saved_calls_are_made_again():
    seen = []
    network = denoiser()
    network.register_forward_pre_hook(lambda _network, args: seen.append(args))
    for each in (*msfp.load_calls(FOLDER / "calls"), call):
        each(network)
    assert len(seen) == 6
    for (sample, timestep), (expected, time) in zip(seen[:3], seen[3:], strict=True):
        assert torch.equal(sample, expected)
        assert timestep == time


def test_statistics_are_read_and_resume(tmp_path):
    saved = DatasetStatistics.load(FOLDER / "statistics.safetensors")
    saved.check_features(few_features)
    assert (saved.features, saved.size, saved.resize) == ("few", 8, "bicubic")
    state, told = copied("statistics-state.safetensors", tmp_path), []
    found = dataset_statistics(
        FOLDER / "images", few_features, name="few", size=8, state=state,
        progress=lambda *stage: told.append(stage),
    )  # fmt: skip
    assert told == [("images", 4, 6), ("images", 6, 6)]
    assert found.statistics.count == saved.statistics.count == 6
    torch.testing.assert_close(found.statistics.mean, saved.statistics.mean)
    torch.testing.assert_close(found.statistics.covariance, saved.statistics.covariance)
    with pytest.raises(InputError, match="its size is 8, not 16"):
        dataset_statistics(FOLDER / "images", few_features, name="few", size=16, state=state)


def test_a_comparison_resumes(tmp_path):
    state, told = copied("evaluation-state.safetensors", tmp_path), []
    found = msfp.compare(
        load(FOLDER / "default", "default")[0], original=full_precision(), sampler=SAMPLER,
        count=12, seed=3, features=few_features, state=state,
        progress=lambda _stage, done, _total: told.append(done),
    )  # fmt: skip
    assert told[:2] == [8, 12]
    expected = {key: float(value) for key, value in EXPECTED["comparison"].items()}
    values = {**found.values, "noise_error": found.noise_error}
    assert values == pytest.approx(expected, rel=1e-3, nan_ok=True)
    assert len(found.images[0]) == 12


def test_the_comparison_of_a_hub_of_branches_is_known_by_its_formats(tmp_path):
    pipe = load(FOLDER / "beside", "beside")[0]
    now = comparison_fingerprint([(pipe, 3), (full_precision(), 3)], SAMPLER, 12, None)
    config = json.loads((FOLDER / "beside" / "unet" / "config.json").read_text())
    layers = config["quantization_config"]["layers"]
    first = {**now, "version": 1, "reference": now["statistics"]}
    del first["statistics"]
    first["formats"] = [
        "weight={weight_format}, input={input_format}, branch_rank={branch_rank}, "
        "branch_entries={branch_entries}".format_map(layers[name])
        for name in packed_layers(pipe.unet)
    ]
    file = tmp_path / "e.safetensors"
    save_file({"0/count": torch.tensor(4)}, file, {STATE.first_key: json.dumps({"run": first})})
    assert check_fingerprint(file, STATE, now).facts == {}


def finetuned(**options):
    """A fine-tuned network and what was measured; its quantization is that of the calibration."""
    network = denoiser()
    path = msfp.record_trajectories(network, calls=call)
    quantized = copy.deepcopy(network)
    config = QuantizationConfig(end_bits=4, refine=None)
    msfp.quantize(quantized, config, calibration=Calibration.load(CALIBRATION))
    history = msfp.finetune(
        quantized, TUNING, trajectories=path, factors=FACTORS, held_out=path, **options
    )
    return quantized, history


@pytest.mark.usefixtures("fractional_zero_points")
def test_fine_tuning_resumes_to_the_same_losses_and_weights(tmp_path):
    state, told = copied("finetuning-state.safetensors", tmp_path), []
    network, history = finetuned(
        state=state, resume=True, progress=lambda _stage, step, *_rest: told.append(step)
    )
    assert told == [3, 4]
    expected = EXPECTED["finetuned"]
    assert history.losses == pytest.approx(expected["losses"], rel=1e-4)
    errors = {int(step): error for step, error in expected["errors"].items()}
    assert history.errors == pytest.approx(errors, rel=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(network(GIVEN, 500), TENSORS["finetuned"], atol=1e-5, rtol=1e-4)
    whole, _ = finetuned()
    for name, layer in packed_layers(network).items():
        other = packed_layers(whole)[name]
        assert torch.equal(layer.codes, other.codes)
        for adapter in range(layer.adapters):
            one, two = (each.quantized_weight(adapter) for each in (layer, other))
            torch.testing.assert_close(one, two)


def test_fine_tuning_with_an_option_that_is_gone_is_not_resumed(tmp_path):
    state = copied("finetuning-state.safetensors", tmp_path)
    key = "a state of fine-tuning"
    with safe_open(state, "pt") as opened:
        told = json.loads(opened.metadata()[key])
    told["run"]["student_every"] = 2
    save_file(load_file(state), state, {key: json.dumps(told)})
    with pytest.raises(InputError, match="student_every is 2, which this run does not have"):
        finetuned(state=state, resume=True)
