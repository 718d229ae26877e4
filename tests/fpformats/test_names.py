import importlib

import pytest
from hypothesis import given
from oracles import edge_formats, small_formats, wide_formats

import fpformats
from fpformats import FloatFormat, Specials, exact, format_name, parse, strategies


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
    ["", "E2", "M1", "e2m1", "E2M1 ", "E2M1\n", "E02M1", "E2M1UB3", "E2M1FNX", "E2M1B", "E2M1B-3"],
)
def test_malformed_names_are_told_the_grammar(name):
    with pytest.raises(ValueError, match=r"is not a format name; the grammar is E\{x\}M\{y\}"):
        parse(name)


def test_the_block_scale_is_not_mistaken_for_a_format_with_zero():
    with pytest.raises(ValueError, match=r"'E8M0' is the OCP MX block scale.*not supported"):
        parse("E8M0")


def test_any_format_name_can_be_imported():
    from fpformats import E1M3U, E4M3

    assert parse("E1M3U") == E1M3U
    assert parse("E4M3") == E4M3
    assert not hasattr(fpformats, "E8M0")
    assert not hasattr(fpformats, "E12M1")
    assert not hasattr(fpformats, "__wrapped__")
    assert importlib.import_module("fpformats.exact") is exact
    with pytest.raises(ImportError):
        importlib.import_module("fpformats.E2M1")
    with pytest.raises(ImportError):
        from fpformats import E2M1X  # noqa: F401


def test_dir_lists_exactly_what_is_public():
    assert dir(fpformats) == sorted(fpformats.__all__)
    assert all(hasattr(fpformats, name) for name in fpformats.__all__)
