import json

import pytest

from msfp import FinetuneConfig, InputError, QuantizationConfig


@pytest.mark.parametrize("name", ["weights", "activations", "first_last"])
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


def test_configs_survive_json():
    config = QuantizationConfig(
        weights=3,
        activations=6,
        first_last=4,
        scheme="signed",
        overrides={"*.to_q": {"weights": 6}},
    )
    assert QuantizationConfig(**json.loads(json.dumps(config.to_dict()))) == config
    tuning = FinetuneConfig(hub=4, denoising_power=2.0)
    assert FinetuneConfig(**json.loads(json.dumps(tuning.to_dict()))) == tuning


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"granularity": "row"}, r"granularity must be one of \('channel', 'tensor'\), not 'row'"),
        ({"scheme": "mx", "weights": 5}, r"weights must be one of \(4, 6, 8\) with scheme 'mx'"),
        ({"scheme": "nvfp4", "first_last": 6}, r"first_last must be one of \(4, 8\)"),
        ({"overrides": {"conv*": {"bits": 4}}}, r"overrides has 'bits' for 'conv\*': it may have"),
        ({"overrides": [4]}, "overrides must be a table of settings by glob"),
    ],
)
def test_settings_that_do_not_exist_are_refused(config, message):
    with pytest.raises(InputError, match=message):
        QuantizationConfig(**config)
