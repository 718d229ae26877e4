import copy
import json
import math

import pytest
import torch
from diffusers import UNet2DModel
from families import pipeline
from tiny import tiny_pipeline, tiny_quantized
from torch import nn

import msfp
from msfp import InputError, MSFPConfig, QuantizationConfig, Sampler, inspect_layers
from msfp.checkpoint.facts import in_order, matching
from msfp.config import RefinementConfig
from msfp.experiments.reference.pipelines import FOLDER
from msfp.reports.layer_table import cells
from msfp.reports.model_page import ModelReport
from msfp.search.summary import LayerSummary


@pytest.fixture(scope="module")
def saved(packed, tmp_path_factory):
    """A packed pipeline, its summaries, and the folder that it was saved to."""
    folder = tmp_path_factory.mktemp("saved") / "pipe"
    msfp.save(packed[0], folder)
    return *packed, folder


def test_a_folder_a_pipeline_and_a_loaded_one_say_the_same(saved):
    pipe, summaries, folder = saved
    facts = inspect_layers(folder)
    rows = [cells(each) for each in facts]
    assert rows == [cells(each) for each in inspect_layers(pipe)]
    assert rows == [cells(each) for each in inspect_layers(msfp.load(folder))]
    assert [each.summary.to_dict() for each in facts] == [each.to_dict() for each in summaries]


def test_facts_are_those_of_the_tensors(saved):
    pipe, _, folder = saved
    for facts in inspect_layers(folder):
        layer = pipe.unet.get_submodule(facts.layer)
        everything = {**dict(layer.named_parameters()), **dict(layer.named_buffers())}
        assert facts.bytes == sum(tensor.nbytes for tensor in everything.values())
        assert facts.weight_clip >= layer.weight.abs().max()
        wide = torch.tensor([-1e9, 1e9])
        assert layer.quantize_input(wide).tolist() == pytest.approx(facts.clip, rel=1e-6)


def test_every_way_of_saving_keeps_the_summaries(saved, tmp_path):
    pipe, summaries, _ = saved
    pipe.save_pretrained(tmp_path / "pipe")
    pipe.unet.save_pretrained(tmp_path / "sharded", max_shard_size="300KB")
    again = UNet2DModel.from_pretrained(tmp_path / "sharded")
    again.save_pretrained(tmp_path / "again")
    for folder in ("pipe", "sharded", "again"):
        facts = inspect_layers(tmp_path / folder)
        assert [each.summary.to_dict() for each in facts] == [each.to_dict() for each in summaries]


def test_a_network_outside_diffusers_keeps_its_summaries(tmp_path):
    network = nn.Sequential(nn.Linear(8, 16), nn.SiLU(), nn.Linear(16, 8))
    plain = copy.deepcopy(network)
    summaries = msfp.quantize(
        network,
        QuantizationConfig(end_bits=4),
        calibration=lambda network: network(torch.randn(64, 8)),
    )
    msfp.pack(network)
    msfp.save(network, tmp_path / "network")
    loaded = msfp.load(tmp_path / "network", into=plain)
    for source in (tmp_path / "network", loaded):
        assert [each.summary for each in inspect_layers(source)] == summaries


def test_weights_quantized_as_they_are_loaded_have_weight_summaries(tmp_path):
    unet = UNet2DModel.from_pretrained(
        FOLDER / "digits-ddpm", subfolder="unet", quantization_config=MSFPConfig()
    )
    unet.save_pretrained(tmp_path)
    facts = inspect_layers(tmp_path)
    assert len(facts) == 65
    assert all(each.weight_sqnr > 10 and each.input is None for each in facts)
    assert cells(facts[0])[3:11] == ("",) * 8


def test_without_summaries_the_file_speaks_for_itself(saved, tmp_path):
    pipe = copy.deepcopy(saved[0])
    pipe.unet.hf_quantizer.quantization_config.summaries.clear()
    msfp.save(pipe, tmp_path / "bare")
    config = json.loads((tmp_path / "bare" / "unet" / "config.json").read_text())
    assert "summaries" not in config["quantization_config"]
    assert msfp.load(tmp_path / "bare")
    bare, full = inspect_layers(tmp_path / "bare"), in_order(inspect_layers(saved[2]), "layer")
    for mine, theirs in zip(bare, full, strict=True):
        assert (mine.clip, mine.zero_point, mine.bytes) == (
            theirs.clip, theirs.zero_point, theirs.bytes
        )  # fmt: skip
        assert mine.summary is None
        assert math.isnan(mine.input_sqnr)
    assert all(each.to_dict()["input_sqnr"] is None for each in bare)


def test_changed_summaries_break_the_checksum(saved, tmp_path):
    pipe = saved[0]
    msfp.save(pipe, tmp_path / "pipe")
    file = tmp_path / "pipe" / "unet" / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"]["summaries"][0]["weight_sqnr"] += 1.0
    file.write_text(json.dumps(config))
    with pytest.raises(InputError, match="do not match their checksum"):
        msfp.load(tmp_path / "pipe")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"colour": 1}, "unknown key 'colour'"),
        ({"weight_sqnr": "high"}, "weight_sqnr .* must not be 'high'"),
        ({"input_choices": {"E2M1": None}}, "input_choices"),
    ],
)
def test_a_summary_that_cannot_be_is_refused(change, message):
    good = LayerSummary("a", "E2M1", 20.0).to_dict()
    assert LayerSummary.from_dict(good).weight_sqnr == 20.0
    with pytest.raises(InputError, match=message):
        LayerSummary.from_dict(good | change)


def test_the_cost_of_the_other_sign_is_that_of_the_best_format_of_it(saved):
    for facts in inspect_layers(saved[2]):
        choices = facts.summary.input_choices
        unsigned = {name for name in choices if name.endswith("U")}
        others = choices.keys() - unsigned if facts.sign == "unsigned" else unsigned
        if not others:
            assert math.isnan(facts.cost_of_other_sign)
        else:
            best = max(choices[name] for name in others)
            assert facts.cost_of_other_sign == facts.input_sqnr - best > 0


def test_layers_are_sorted_from_the_worst_and_filtered_by_module(saved):
    facts = inspect_layers(saved[2])
    worst = in_order(facts, "input_sqnr")
    assert worst[0].input_sqnr == min(each.input_sqnr for each in facts)
    assert in_order(facts, "bytes")[0].bytes == max(each.bytes for each in facts)
    costs = [each.cost_of_other_sign for each in in_order(facts, "cost_of_other_sign")]
    known = [cost for cost in costs if not math.isnan(cost)]
    assert known == sorted(known)
    assert costs[: len(known)] == known
    assert in_order(facts, "model") == facts
    assert {each.layer for each in matching(facts, "mid_block")} == {
        each.layer for each in facts if each.layer.startswith("mid_block.")
    }
    with pytest.raises(InputError, match="matches none of the 65"):
        matching(facts, "nothing")


def test_what_is_not_packed_or_not_quantized_is_refused(reference, tmp_path):
    with pytest.raises(InputError, match="is not quantized"):
        inspect_layers(reference)
    with pytest.raises(InputError, match=r"conv_in is trainable: call msfp\.pack first"):
        inspect_layers(tiny_quantized(tiny_pipeline()))
    with pytest.raises(InputError, match="has no component that is quantized"):
        inspect_layers(tmp_path)
    with pytest.raises(InputError, match="is not a folder"):
        inspect_layers(tmp_path / "absent")


@pytest.mark.slow
def test_a_split_input_shows_the_largest_of_its_clips(tmp_path):
    pipe = pipeline("unet", tmp_path)
    config = QuantizationConfig(refine=RefinementConfig(split_inputs=True, branch_rank=2))
    msfp.quantize(pipe, config, calibration=Sampler(2, 2).calls(2, seed=0))
    msfp.pack(pipe.unet)
    msfp.save(pipe, tmp_path / "split")
    facts = inspect_layers(tmp_path / "split")
    # Branches too count as they are stored, in half as many bits.
    assert [each.bytes for each in inspect_layers(pipe)] == [each.bytes for each in facts]
    layers = {each.layer: pipe.unet.get_submodule(each.layer) for each in facts}
    split = [each for each in facts if layers[each.layer].formats.input_granularity == "channel"]
    assert split
    for each in split:
        scales = layers[each.layer].input_scale.view(torch.float32)
        assert scales.min() < scales.max() == each.input_scale
        assert each.clip[1] == pytest.approx(
            each.input_scale * float(each.input.max) + (each.zero_point or 0.0)
        )
    weights = {each.layer: torch.ones_like(layers[each.layer].weight) for each in facts}
    assert "Layer by layer" in ModelReport("split", pipe.unet, {}, weights).html()
