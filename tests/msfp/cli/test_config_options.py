import argparse
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from msfp import FinetuneConfig, LearningRates, QuantizationConfig, RefinementConfig
from msfp.cli.commands import demo, finetune, quantize
from msfp.cli.config_options import add_config, config_from, described
from msfp.cli.main import main, parser

COMMANDS = {
    "quantize": (quantize, QuantizationConfig, ["quantize", "digits", "--output", "x"]),
    "demo": (demo, QuantizationConfig, ["demo"]),
    "finetune": (
        finetune,
        FinetuneConfig,
        ["finetune", "q", "--original", "digits", "--output", "x"],
    ),
}
"""By name: the command, the config that gives its options, and the fewest words that it takes."""
OTHERWISE = {("finetune", "seed"), ("quantize", "budget")}
"""Given in another way: by the seed of the sampler, by --bits-per-weight or --max-size."""
PARTS = {"refine": RefinementConfig, "rates": LearningRates}
"""Fields that are configs themselves."""


def names(config):
    return [each.name for each in dataclasses.fields(config)]


def actions(name):
    """The options of a command, by what they set."""
    commands = argparse.ArgumentParser().add_subparsers()
    COMMANDS[name][0].add(commands)
    return {action.dest: action for action in commands.choices[name]._actions}


def given(name, *words):
    """The config that a command makes of words behind the fewest."""
    _, config, fewest = COMMANDS[name]
    return config_from(parser().parse_args([*fewest, *map(str, words)]), config)


def taken(config, *words):
    """The config that a command line of its options alone gives."""
    command = argparse.ArgumentParser()
    add_config(command, config, "options")
    return config_from(command.parse_args([str(word) for word in words]), config)


@pytest.fixture
def skipped(monkeypatch):
    """What each command says that it has no option for, by its name."""
    found = {}
    for name, (module, config, _) in COMMANDS.items():

        def spy(command, kind, *args, skip=(), _name=name, _config=config, **more):
            assert kind is _config
            found[_name] = set(skip)
            add_config(command, kind, *args, skip=skip, **more)

        monkeypatch.setattr(module, "add_config", spy)
    return found


@pytest.mark.parametrize("name", COMMANDS)
def test_every_field_has_an_option_unless_the_command_says_that_it_has_none(name, skipped):
    options, config = actions(name), COMMANDS[name][1]
    assert skipped[name] <= set(names(config))
    for each in names(config):
        flags = {each} if each != "rates" else set()
        flags |= {f"{each}_{part}" for part in names(PARTS[each])} if each in PARTS else set()
        if each in skipped[name] and (name, each) not in OTHERWISE:
            assert not flags & options.keys()
        else:
            assert flags <= options.keys()


def test_quantize_and_finetune_leave_out_what_the_pipeline_tells_alone(skipped):
    for name in ("quantize", "finetune"):
        actions(name)
    assert skipped["quantize"] == {"budget"}
    assert skipped["finetune"] == {"seed", "guidance_branches", "guidance_rows"}


def test_an_empty_command_line_gives_the_default_config():
    assert given("quantize") == QuantizationConfig()
    assert given("demo") == QuantizationConfig()
    assert given("finetune") == FinetuneConfig(seed=100, evaluate_every=40)
    for config in (RefinementConfig, LearningRates):
        assert taken(config) == config()


def test_values_of_every_kind_are_parsed():
    made = given(
        "quantize",
        *("--weight-bits", 5, "--activation-bits", "none", "--attention-bits", 6),
        *("--scheme", "signed", "--granularity", "tensor"),
        *("--include", "mid_block", "--include", "*.to_q", "--exclude", "conv_in"),
        *("--overrides", '{"conv_out": {"weight_bits": 6}}'),
        *("--refine-rounding", "nearest", "--refine-correct-bias", "none"),
        *("--no-refine-match-inputs", "--refine-split-inputs"),
        *("--refine-damping", 0.5, "--refine-samples", "none", "--refine-branch-rank", 0),
    )
    assert made == QuantizationConfig(
        weight_bits=5,
        activation_bits=None,
        attention_bits=6,
        scheme="signed",
        granularity="tensor",
        include=("mid_block", "*.to_q"),
        exclude=("conv_in",),
        overrides={"conv_out": {"weight_bits": 6}},
        refine=RefinementConfig(
            rounding="nearest",
            correct_bias="none",
            match_inputs=False,
            damping=0.5,
            branch_rank=0,
        ),
    )


def test_a_config_in_place_of_a_value_may_be_named_by_that_too():
    assert given("quantize", "--refine", "none").refine is None
    assert given("quantize", "--refine", "auto").refine == "auto"
    assert given("quantize", "--refine-samples", 8).refine == RefinementConfig(samples=8)


def test_values_of_fine_tuning_are_parsed():
    made = given(
        "finetune",
        *("--hub", 2, "--dfa-power", 1, "--clip", 0.5, "--lora-position", "beside"),
        *("--no-cache-teacher", "--checkpointing", "--precision", "bf16"),
        *("--rates-router", 0.1, "--rates-norms", 0, "--evaluate-every", 0),
    )
    assert made == FinetuneConfig(
        hub=2,
        dfa_power=1.0,
        clip=0.5,
        lora_position="beside",
        cache_teacher=False,
        checkpointing=True,
        precision="bf16",
        rates=LearningRates(router=0.1, norms=0.0),
        seed=100,
    )
    assert given("finetune", "--clip", "none").clip is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--weight-bits", "four"], "argument --weight-bits: invalid int value: 'four'"),
        (["--activation-bits", "no"], "argument --activation-bits: invalid int value: 'no'"),
        (["--refine-damping", "little"], "invalid float value: 'little'"),
        (["--scheme", "fp"], "'fp' is not allowed: choose from mixup, signed, int_minmax"),
        (["--refine", "no"], "'no' is not allowed: choose from auto, none"),
        (["--granularity", "none"], "'none' is not allowed: choose from channel, tensor"),
        (["--overrides", "{"], "argument --overrides: '{' is not JSON: "),
        (["--refine-match-inputs=no"], "--no-refine-match-inputs: ignored explicit argument 'no'"),
        (
            ["--refine", "none", "--refine-rounding", "gptq"],
            "msfp: --refine cannot be combined with --refine-rounding",
        ),
        (
            ["--refine", "auto", "--refine-branch-rank", "4"],
            "msfp: --refine cannot be combined with --refine-branch-rank",
        ),
        (["--overrides", '{"*": {"first": 4}}'], r"msfp: overrides of '*' has no 'first'"),
        (["--overrides", "[]"], "msfp: overrides must be a table of settings by glob, not []"),
        (["--max-size", "5"], "msfp: budget must be a size such as '500MB' or '1.5GB', not '5'"),
        (["--bits-per-weight", "2"], "msfp: budget must be between 3 and 32, not 2.0"),
        (["--max-size", "5MB", "--bits-per-weight", "4"], "not allowed with argument --max-size"),
        (["--weight-bits", "9"], "msfp: weight_bits must be between 3 and 8, not 9"),
    ],
)
def test_what_cannot_be_used_is_refused_in_one_sentence(words, message, tmp_path, capsys):
    try:
        code = main(["quantize", "digits", "--output", str(tmp_path / "x"), *words])
    except SystemExit as stopped:
        code = stopped.code
    assert code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not list(tmp_path.iterdir())


def shown(value):
    """A default as help shows it."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, tuple):
        return " ".join(value) or "none"
    return "none" if value in (None, {}) else str(value)


def test_a_budget_is_given_as_bits_or_as_a_size():
    assert given("quantize", "--bits-per-weight", 4.5).budget == 4.5
    assert given("quantize", "--max-size", "500MB").budget == "500MB"


@pytest.mark.parametrize("name", COMMANDS)
def test_help_is_the_documentation_of_the_fields_with_their_defaults(name):
    options, config = actions(name), COMMANDS[name][1]
    default, texts = config(), described(config)
    told = {each: (texts[each], getattr(default, each)) for each in names(config)}
    for part, kind in PARTS.items():
        if part in told:
            parts = described(kind)
            told |= {f"{part}_{n}": (parts[n], getattr(kind(), n)) for n in names(kind)}
    if name == "finetune":
        told["evaluate_every"] = told["evaluate_every"][0], 40
        del told["seed"]
    if name == "quantize":
        del told["budget"]
    for each in told.keys() & options.keys():
        text, value = told[each]
        assert options[each].help == f"{text} (default: {shown(value)})"
        assert text


@pytest.mark.parametrize(
    "config", [QuantizationConfig, RefinementConfig, FinetuneConfig, LearningRates]
)
def test_every_field_is_documented_once_and_by_its_name(config):
    assert list(described(config)) == names(config)


@dataclass(frozen=True)
class Percent:
    """Something.

    Attributes:
        share: In %, as
            "all" or 5%.

    Raises:
        Nothing: Ever.
    """

    share: Literal["all"] | None = None


def test_documentation_of_any_characters_is_shown():
    assert described(Percent) == {"share": 'In %, as "all" or 5%.'}
    command = argparse.ArgumentParser()
    add_config(command, Percent, "shares")
    assert 'In %, as "all" or 5%. (default: none)' in " ".join(command.format_help().split())
    assert taken(Percent, "--share", "all") == Percent("all")


def test_the_value_of_a_caller_goes_before_what_was_given():
    command = argparse.ArgumentParser()
    add_config(command, RefinementConfig, "options", defaults={"seed": 3})
    arguments = command.parse_args(["--samples", "8"])
    assert config_from(arguments, RefinementConfig) == RefinementConfig(samples=8, seed=3)
    assert config_from(arguments, RefinementConfig, samples=9).samples == 9


@pytest.mark.parametrize(
    "kind",
    [
        complex,
        str,
        list[int],
        tuple[float, ...],
        tuple[str, ...] | None,
        bool | None,
        int | float,
        Literal["auto"] | int,
        set[str],
    ],
)
def test_a_field_whose_type_has_no_option_is_an_error_of_the_program(kind):
    config = dataclasses.make_dataclass("Config", [("value", kind, None)], frozen=True)
    with pytest.raises(TypeError, match="there is no option for a field of the type"):
        taken(config)


def test_a_part_that_is_a_table_or_a_config_in_a_config_is_found():
    inner = dataclasses.make_dataclass("Inner", [("few_of", int, 1)], frozen=True)
    outer = dataclasses.make_dataclass(
        "Outer",
        [
            ("part", inner, field(default_factory=inner)),
            ("by_name", Mapping[str, Any] | None, None),
        ],
        frozen=True,
    )
    assert taken(outer) == outer()
    made = taken(outer, "--part-few-of", 3, "--by-name", '{"a": [1]}')
    assert made == outer(inner(3), {"a": [1]})
