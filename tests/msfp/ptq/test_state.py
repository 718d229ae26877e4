import shutil
from dataclasses import replace

import families
import pytest
import torch
from torch import nn

from msfp import InputError, QuantizationConfig, pack, quantize
from msfp.config import RefinementConfig
from msfp.layers.base import quantized_layers
from msfp.pipelines.denoiser import denoiser_of

CONFIG = QuantizationConfig(refine=RefinementConfig(samples=8, branch_rank=2))
CALLS = [families.images, families.images]


def run(pipe, folder=None, config=CONFIG, **arguments):
    """The packed tensors after a quantization."""
    quantize(pipe, config, calibration=CALLS, state=folder, **arguments)
    pack(pipe)
    return denoiser_of(pipe).state_dict()


def interrupt_at(stage, done):
    def tell(now, so_far, _total, _note="", /):
        if (now, so_far) == (stage, done):
            raise KeyboardInterrupt

    return tell


@pytest.fixture(scope="module")
def expected():
    return run(families.pipeline("unet", None))


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.slow
def test_a_run_that_is_stopped_again_and_again_ends_with_the_same_bits(tmp_path, expected):
    made = []
    for stage, done in (
        ("calibrating", 1),
        ("calibrating", 2),
        ("searching", 1),
        ("searching", 30),
        ("adding branches", 5),
        ("refining", 1),
        ("refining", 17),
        ("refining", 50),
    ):
        pipe = families.pipeline("unet", None)
        pipe.unet.register_forward_hook(lambda *_: made.append(None))
        with pytest.raises(KeyboardInterrupt):
            run(pipe, tmp_path, progress=interrupt_at(stage, done))
        assert not quantized_layers(pipe.unet)
        before = len(made)
    assert same(run(families.pipeline("unet", None), tmp_path), expected)
    assert before < 60


@pytest.mark.slow
def test_calls_and_layers_that_are_done_are_not_done_again(tmp_path, expected, monkeypatch):
    run(families.pipeline("unet", None), tmp_path)
    for name in ("state.quantize_layer", "low_rank_branches._add_branch", "refinement.ROUNDINGS"):
        monkeypatch.setattr(f"msfp.ptq.{name}", None)
    monkeypatch.setattr("msfp.search.observers._seen", None)
    assert same(run(families.pipeline("unet", None), tmp_path), expected)


@pytest.mark.slow
def test_one_stage_that_is_lost_is_done_again(tmp_path, expected):
    run(families.pipeline("unet", None), tmp_path)
    for lost in ("refined", "branches", "searched", "calls"):
        shutil.rmtree(tmp_path / lost)
        assert same(run(families.pipeline("unet", None), tmp_path), expected)


def other_weights():
    pipe = families.pipeline("unet", None)
    with torch.no_grad():
        pipe.unet.conv_in.bias += 1
    return pipe


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"config": replace(CONFIG, weight_bits=5)}, "of another run: its config is"),
        ({"pipe": other_weights}, "of another run: its weights is"),
    ],
)
def test_the_state_of_another_run_is_refused(change, text, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(families.pipeline("unet", None), tmp_path, progress=interrupt_at("searching", 2))
    pipe = change.pop("pipe", lambda: families.pipeline("unet", None))()
    with pytest.raises(InputError, match=text):
        run(pipe, tmp_path, **change)
    assert not quantized_layers(pipe.unet)


@pytest.mark.parametrize("refine", ["auto", None])
def test_the_calls_of_another_model_are_refused(refine, tmp_path):
    config = QuantizationConfig(refine=refine)
    with pytest.raises(KeyboardInterrupt):
        run(
            families.pipeline("unet", None), tmp_path, config, progress=interrupt_at("searching", 1)
        )
    shutil.rmtree(tmp_path / "searched")
    pipe = other_weights()
    with pytest.raises(InputError, match="weights"):
        run(pipe, tmp_path, config)
    assert not quantized_layers(pipe.unet)


def test_overrides_in_another_order_are_another_run(tmp_path):
    overrides = {"*": {"weight_bits": 5}, "conv_in": {"weight_bits": 8}}
    config = replace(CONFIG, overrides=overrides)
    with pytest.raises(KeyboardInterrupt):
        run(
            families.pipeline("unet", None), tmp_path, config, progress=interrupt_at("searching", 9)
        )
    other = replace(CONFIG, overrides=dict(reversed(overrides.items())))
    with pytest.raises(InputError, match="of another run: its config is"):
        run(families.pipeline("unet", None), tmp_path, other)


def test_weights_without_numbers_are_named():
    pipe = families.pipeline("unet", None)
    pipe.unet.conv_in.to("meta")
    with pytest.raises(InputError, match=r"conv_in\.weight has no numbers: it is on the"):
        quantize(pipe, CONFIG, calibration=CALLS, state="unused")


def test_a_state_that_cannot_be_written_is_refused_before_work_starts(tmp_path):
    file = tmp_path / "file"
    file.touch()
    pipe = families.pipeline("unet", None)
    for given, text in ((file / "below", "state .* must be a folder"), (3, "must be a path")):
        with pytest.raises(InputError, match=text):
            quantize(pipe, calibration=families.images, state=given)
    with pytest.raises(InputError, match="offload must be True or False"):
        quantize(pipe, calibration=families.images, offload="folder")
    assert not quantized_layers(pipe.unet)


class Lists(nn.Module):
    """A network with lists of arguments, recorded as whole forwards."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.out = nn.Linear(6, 16), nn.Linear(16, 6)

    def forward(self, x, *, scale=None):
        return [self.out(self.inner(each).relu()) * (scale or 1) for each in x]


def lists(network):
    draw = torch.Generator().manual_seed(0)
    return network([torch.randn(rows, 6, generator=draw) for rows in (40, 30)], scale=0.5)


def test_whole_forwards_and_block_formats_resume_too(tmp_path):
    states = []
    for folder in (None, tmp_path / "a", tmp_path / "a"):
        network = Lists()
        config = replace(CONFIG, end_bits=4)
        quantize(network, config, calibration=[lists, lists], state=folder)
        pack(network)
        states.append(network.state_dict())
    assert same(states[0], states[1])
    assert same(states[0], states[2])
    assert len(list((tmp_path / "a" / "calls").iterdir())) == 2
    for _ in range(2):
        config = QuantizationConfig(scheme="mx", end_bits=4)
        quantize(Lists(), config, calibration=[lists], state=tmp_path / "b")
