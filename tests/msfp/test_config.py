import json

import pytest

from msfp import FinetuneConfig, InputError, MSFPConfig, QuantizationConfig, RefinementConfig


@pytest.mark.parametrize("name", ["weight_bits", "activation_bits", "end_bits"])
@pytest.mark.parametrize("bits", [-1, 0, 2, 9])
def test_bits_out_of_range_are_refused_by_name_value_and_range(name, bits):
    with pytest.raises(InputError, match=rf"{name} must be between 3 and 8, not {bits}"):
        QuantizationConfig(**{name: bits})


def test_an_unknown_scheme_is_refused_with_the_list_of_schemes():
    with pytest.raises(InputError, match=r"scheme must be one of .*mixup.*, not 'fp'"):
        QuantizationConfig(scheme="fp")


@pytest.mark.parametrize(
    ("name", "value"), [("hub", 0), ("hub", 17), ("rank", 0), ("steps", 0), ("batch", 0)]
)
def test_finetune_values_out_of_range_are_refused(name, value):
    with pytest.raises(InputError, match=rf"{name} must be between .* not {value}"):
        FinetuneConfig(**{name: value})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"hub": 2.0}, r"hub must be a whole number, not 2\.0"),
        ({"rank": 1.5}, r"rank must be a whole number, not 1\.5"),
        ({"seed": 1.5}, r"seed must be a whole number, not 1\.5"),
        ({"seed": 2**63}, "seed must be between"),
        ({"steps": 2.5}, r"steps must be a whole number, not 2\.5"),
        ({"batch": True}, "batch must be a whole number, not True"),
        ({"ema": True}, "ema must be a number, not True"),
        ({"clip": "1"}, "clip must be a number, not '1'"),
        ({"shard": "no"}, "shard must be True or False, not 'no'"),
        ({"guidance_branches": 1.0}, r"guidance_branches must be a list of numbers, not 1\.0"),
        ({"guidance_branches": ("a",)}, "guidance_branches must be a number, not 'a'"),
        ({"rates": {"lora": 1}}, "rates has no 'lora': it may have adapters, router, "),
        ({"rates": {"norms": False}}, "rate of norms must be a number, not False"),
        ({"rates": 0.1}, r"rates must be LearningRates or a table of them, not 0\.1"),
    ],
)
def test_finetune_values_of_another_type_are_refused(config, message):
    with pytest.raises(InputError, match=message):
        FinetuneConfig(**config)


@pytest.mark.parametrize("config", [QuantizationConfig, MSFPConfig])
@pytest.mark.parametrize("name", ["weight_bits", "activation_bits", "end_bits", "attention_bits"])
@pytest.mark.parametrize("bits", [4.5, 4.0, True, "4"])
def test_bits_that_are_no_whole_number_are_refused(config, name, bits):
    with pytest.raises(InputError, match=f"^{name} must be a whole number, not {bits!r}$"):
        config(**{name: bits})


@pytest.mark.parametrize("name", ["samples", "branch_rank", "positions", "seed"])
@pytest.mark.parametrize("value", [1.5, False, "a"])
def test_counts_of_refinement_that_are_no_whole_number_are_refused(name, value):
    with pytest.raises(InputError, match=f"^{name} must be a whole number, not {value!r}$"):
        RefinementConfig(**{name: value})


@pytest.mark.parametrize("name", ["match_inputs", "split_inputs"])
def test_what_refinement_does_or_not_is_true_or_false(name):
    for value in ("no", 1, None):
        with pytest.raises(InputError, match=f"^{name} must be True or False, not {value!r}$"):
            RefinementConfig(**{name: value})


def test_configs_survive_json():
    config = QuantizationConfig(
        weight_bits=3,
        activation_bits=6,
        end_bits=4,
        scheme="signed",
        overrides={"*.to_q": {"weight_bits": 6}},
    )
    assert QuantizationConfig(**json.loads(json.dumps(config.to_dict()))) == config
    tuning = FinetuneConfig(hub=4, dfa_power=2.0)
    assert FinetuneConfig(**json.loads(json.dumps(tuning.to_dict()))) == tuning


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"granularity": "row"}, r"granularity must be one of \('channel', 'tensor'\), not 'row'"),
        (
            {"scheme": "mx", "weight_bits": 5},
            r"weight_bits must be one of \(4, 6, 8\) with scheme 'mx'",
        ),
        ({"scheme": "nvfp4", "end_bits": 6}, r"end_bits must be one of \(4, 8\)"),
        (
            {"overrides": {"conv*": {"bits": 4}}},
            r"overrides of 'conv\*' has no 'bits': it may have weight_bits, ",
        ),
        ({"overrides": [4]}, "overrides must be a table of settings by glob"),
        ({"exclude": None}, "exclude must be a list of names or globs, not None"),
        ({"include": (1,)}, r"include must be a list of names or globs, not \(1,\)"),
    ],
)
def test_settings_that_do_not_exist_are_refused(config, message):
    with pytest.raises(InputError, match=message):
        QuantizationConfig(**config)
