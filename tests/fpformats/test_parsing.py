import importlib
import itertools

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import edge_formats, small_formats, wide_formats

import fpformats
from fpformats import (
    E2M1,
    FloatFormat,
    Specials,
    dtype_of,
    exact,
    format_name,
    parse,
    parsing,
    static_names,
    strategies,
)


@pytest.mark.parametrize("fmt", small_formats() + edge_formats() + wide_formats(), ids=str)
def test_names_lead_back_to_their_formats(fmt):
    assert parse(str(fmt)) == fmt
    assert str(fmt).isidentifier()


@given(strategies.formats())
def test_names_of_any_format_lead_back_to_it(fmt):
    assert parse(format_name(fmt)) == fmt


@pytest.mark.parametrize(
    ("name", "fmt"),
    [
        ("E4M3", FloatFormat(4, 3, specials=Specials.NAN_ONLY)),
        ("E4M3FN", FloatFormat(4, 3, specials=Specials.NAN_ONLY)),
        ("E4M3B7", FloatFormat(4, 3, specials=Specials.NAN_ONLY)),
        ("E4M3F", FloatFormat(4, 3)),
        ("E4M3IEEE", FloatFormat(4, 3, specials=Specials.IEEE)),
        ("E5M2", FloatFormat(5, 2, specials=Specials.IEEE)),
        ("E4M3U", FloatFormat(4, 3, signed=False)),
        ("E5M2U", FloatFormat(5, 2, signed=False)),
        ("E2M1", FloatFormat(2, 1)),
        ("E3M4", FloatFormat(3, 4)),
        ("E2M1B3", FloatFormat(2, 1, bias=3)),
        ("E2M1BN3UNS", FloatFormat(2, 1, signed=False, bias=-3, subnormals=False)),
        ("E4M3FNUZ", FloatFormat(4, 3, bias=8, specials=Specials.FNUZ)),
        ("E4M3B7FNUZ", FloatFormat(4, 3, bias=7, specials=Specials.FNUZ)),
        ("E8M0F", FloatFormat(8, 0)),
        ("E8M0U", FloatFormat(8, 0, signed=False)),
        ("E2M1B9999999999", FloatFormat(2, 1, bias=9999999999)),
    ],
)
def test_what_names_mean(name, fmt):
    assert parse(name) == fmt


@pytest.mark.parametrize(
    "name",
    ["", "E2", "M1", "e2m", "E2M1 ", "E2M1\n", "E02M1", "E2M1UB3", "E2M1FNX", "E2M1B", "E2M1B-3"],
)
def test_malformed_names_are_told_the_grammar(name):
    with pytest.raises(ValueError, match=r"is not a format name; the grammar is E\{x\}M\{y\}"):
        parse(name)


@pytest.mark.parametrize(
    ("alias", "name"),
    [
        ("E8M0", "E8M0UNZFN"),
        ("UE4M3", "E4M3UFN"),
        ("UE5M3", "E5M3UFN"),
        ("BF16", "E8M7IEEE"),
        ("FP16", "E5M10IEEE"),
        ("TF32", "E8M10IEEE"),
        ("FP32", "E8M23IEEE"),
        ("FP64", "E11M52IEEE"),
        ("Binary8p3se", "E5M2EXT"),
        ("Binary8p3sf", "E5M2FNUZ"),
        ("Binary8p3uf", "E6M2B32UFN"),
        ("Binary8p8ue", "E1M7UEXT"),
        ("float8_e4m3fn", "E4M3"),
        ("torch.float8_e5m2", "E5M2"),
        ("ml_dtypes.float4_e2m1fn", "E2M1"),
        ("float4_e2m1fn_x2", "E2M1"),
        (torch.float8_e8m0fnu, "E8M0"),
        (torch.bfloat16, "BF16"),
        (ml_dtypes.float8_e3m4, "E3M4IEEE"),
        (np.dtype(np.float16), "FP16"),
        (np.float32, "FP32"),
    ],
)
def test_aliases_mean_what_their_source_says(alias, name):
    assert parse(alias) == parse(name)
    assert parse(str(parse(name))) == parse(name)


def test_the_block_scale_is_not_the_format_with_zero():
    assert str(parse("E8M0")) == "E8M0"
    assert str(parse("E8M0F")) == "E8M0F"
    assert len({parse("E8M0"), parse("E8M0F"), parse("E8M0U"), parse("E8M0UFN")}) == 4


def test_dtypes_convert_back_where_one_exists():
    for name, meaning in parsing._DTYPES.items():
        libraries = [lib for lib in (torch, ml_dtypes, np) if hasattr(lib, name)]
        assert libraries
        for library in libraries:
            assert dtype_of(parse(meaning), library.__name__) == getattr(library, name)
    with pytest.raises(ValueError, match="which torch has no dtype for"):
        dtype_of(parse("E2M1U"), "torch")
    with pytest.raises(ValueError, match="library is 'jax'; allowed: torch, ml_dtypes, numpy"):
        dtype_of(parse("E4M3"), "jax")


@given(strategies.formats(max_bits=10))
def test_only_well_formed_formats_of_p3109_take_its_names(fmt):
    if str(fmt).startswith("Binary"):
        assert fmt.bits > 2
        assert fmt.has_nan


@given(st.text("EMBUNSZFXTIpsefu0123456789", max_size=14))
def test_any_text_is_a_format_or_told_the_grammar(text):
    try:
        fmt = parse(text)
    except ValueError as error:
        assert str(error)
    else:
        assert parse(str(fmt)) == fmt


def test_any_format_name_can_be_imported():
    from fpformats import E1M3U, E4M3

    assert parse("E1M3U") == E1M3U
    assert parse("E4M3") == E4M3
    from fpformats import UE5M3, Binary8p3se

    assert parse("Binary8p3se") == Binary8p3se
    assert parse("UE5M3") == UE5M3
    assert not hasattr(fpformats, "E17M1")
    assert not hasattr(fpformats, "Binary2p1se")
    assert not hasattr(fpformats, "__wrapped__")
    assert importlib.import_module("fpformats.exact") is exact
    with pytest.raises(ImportError):
        importlib.import_module("fpformats.E2M1")
    with pytest.raises(ImportError):
        from fpformats import E2M1X  # noqa: F401


def test_dir_lists_what_is_public_and_the_formats_with_static_names():
    listed = dir(fpformats)
    assert listed == sorted(listed)
    assert set(listed) - set(fpformats.__all__) == set(static_formats())
    assert all(hasattr(fpformats, name) for name in listed)


def static_formats():
    return [name for name, value in vars(static_names).items() if isinstance(value, FloatFormat)]


def test_static_names_mean_what_they_say_and_cover_all_small_formats():
    for name in static_formats():
        assert parse(name) == getattr(fpformats, name)
    for bits, signed in itertools.product(range(2, 9), (True, False)):
        width = bits - signed
        for exponent_bits in range(width + 1):
            name = f"E{exponent_bits}M{width - exponent_bits}{'' if signed else 'U'}"
            assert name in static_formats()


@pytest.mark.parametrize("name", ["e2m1", "E2m1", "fp4", "FP4_E2M1", "float4_e2m1fn", "E2M1"])
def test_case_does_not_matter_and_common_names_are_known(name):
    assert parse(name) == E2M1
    assert getattr(fpformats, name) == E2M1


@pytest.mark.parametrize(
    ("name", "meaning"),
    [
        ("fp8_e4m3", "E4M3"), ("fp8_e5m2", "E5M2"), ("fp6_e3m2", "E3M2"), ("bf16", "BF16"),
        ("half", "FP16"), ("binary8p3se", "Binary8p3se"), ("e3m0bn2u", "E3M0BN2U"),
        ("fp8_e4m3fnuz", "E4M3FNUZ"), ("ue4m3", "E4M3UFN"), ("tf32", "E8M10IEEE"),
    ],
)  # fmt: skip
def test_names_in_use_mean_the_format_that_is_called_so(name, meaning):
    assert parse(name) == parse(meaning)


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("fp8", "write E4M3 or E5M2"), ("FP6", "write E2M3 or E3M2"), ("int4", "write E0M3"),
        ("fp6_e4m3", "the grammar is"), ("fp8_e99", "the grammar is"), ("", "the grammar is"),
    ],
)  # fmt: skip
def test_names_of_several_formats_are_told_what_to_write(name, advice):
    with pytest.raises(ValueError, match=f"{name!r} is not a format name; {advice}"):
        parse(name)
