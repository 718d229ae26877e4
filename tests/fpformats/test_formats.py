import dataclasses
import math
import pickle
import re
from fractions import Fraction

import numpy as np
import pytest
from oracles import edge_formats, small_formats, wide_formats

from fpformats import FloatFormat, Specials, exact, p3109, parse
from fpformats.kernels.grid import FLOAT_DTYPES, holds

# The table of OCP OFP8 1.0 and OCP MX 1.0, of LLVM's float types and of IEEE 754.
STANDARD = [
    # name, bits, bias, max, smallest normal, smallest subnormal
    ("E2M1", 4, 1, 6, 1, 0.5),
    ("E2M3", 6, 1, 7.5, 1, 0.125),
    ("E3M2", 6, 3, 28, 0.25, 0.0625),
    ("E4M3", 8, 7, 448, 2**-6, 2**-9),
    ("E5M2", 8, 15, 57344, 2**-14, 2**-16),
    ("E4M3IEEE", 8, 7, 240, 2**-6, 2**-9),
    ("E3M4IEEE", 8, 3, 15.5, 2**-2, 2**-6),
    ("E4M3FNUZ", 8, 8, 240, 2**-7, 2**-10),
    ("E5M2FNUZ", 8, 16, 57344, 2**-15, 2**-17),
    ("E4M3B11FNUZ", 8, 11, 30, 2**-10, 2**-13),
    ("E4M3UFN", 7, 7, 448, 2**-6, 2**-9),
    ("E5M3UFN", 8, 15, 114688, 2**-14, 2**-17),
    ("E5M10IEEE", 16, 15, 65504, 2**-14, 2**-24),
    ("E8M7IEEE", 16, 127, (2 - 2**-7) * 2.0**127, 2.0**-126, 2.0**-133),
    ("E8M10IEEE", 19, 127, (2 - 2**-10) * 2.0**127, 2.0**-126, 2.0**-136),
    ("E8M23IEEE", 32, 127, (2 - 2**-23) * 2.0**127, 2.0**-126, 2.0**-149),
    ("E11M52IEEE", 64, 1023, 1.7976931348623157e308, 2.0**-1022, 5e-324),
    ("E4M3F", 8, 7, 480, 2**-6, 2**-9),
    ("E5M2F", 8, 15, 114688, 2**-14, 2**-16),
    ("E2M1U", 3, 1, 6, 1, 0.5),
    ("E1M3U", 4, 0, 3.75, 2, 0.25),
    ("E4M0U", 4, 7, 256, 2**-6, None),
    ("E3M0", 4, 3, 16, 0.25, None),
    ("E0M4U", 4, 0, 1.875, None, 0.125),
]


@pytest.mark.parametrize(("name", "bits", "bias", "largest", "normal", "subnormal"), STANDARD)
def test_the_standards_numbers(name, bits, bias, largest, normal, subnormal):
    fmt = parse(name)
    assert (fmt.bits, fmt.bias, fmt.max) == (bits, bias, largest)
    assert (fmt.smallest_normal, fmt.smallest_subnormal) == (normal, subnormal)
    assert fmt.min == (-largest if fmt.signed else 0)


@pytest.mark.parametrize(
    ("name", "nan", "infinity"),
    [
        ("E4M3", 0x7F, None),
        ("E5M2", 0x7E, 0x7C),
        ("E4M3IEEE", 0x7C, 0x78),
        ("E4M3FNUZ", 0x80, None),
        ("E4M3UFN", 0x7F, None),
        ("E3M0IEEE", None, 7),
        ("E2M1", None, None),
    ],
)
def test_the_codes_of_specials(name, nan, infinity):
    fmt = parse(name)
    assert (fmt.nan_code, fmt.infinity_code) == (nan, infinity)
    assert (fmt.has_nan, fmt.has_infinity) == (nan is not None, infinity is not None)


@pytest.mark.parametrize("fmt", small_formats() + edge_formats() + wide_formats(), ids=str)
def test_derived_facts_agree_with_the_definition(fmt):
    assert fmt.exact_max == exact.decode(fmt.max_code, fmt)
    assert fmt.smallest == exact.decode(1, fmt)
    assert 2 ** Fraction(fmt.max_exponent) <= fmt.exact_max < 2 ** Fraction(fmt.max_exponent + 1)
    codes = [fmt.max_code + 1, fmt.code_count - 1, 1 << fmt.magnitude_bits]
    last_is_finite = fmt.max_code + 1 == 1 << fmt.magnitude_bits
    after = [abs(exact.decode(code, fmt)) for code in codes if code < fmt.code_count]
    assert last_is_finite or not after[0] <= fmt.exact_max
    if fmt.nan_code is not None:
        assert exact.decode(fmt.nan_code, fmt) != exact.decode(fmt.nan_code, fmt)
    if fmt.infinity_code is not None:
        assert exact.decode(fmt.infinity_code, fmt) == float("inf")


def test_repr_says_bits_max_and_specials():
    assert repr(parse("E4M3")) == (
        "FloatFormat(E4M3: 8 bits, signed, bias 7, max 448, NaN at all-ones magnitude, no infinity)"
    )
    assert repr(parse("E8M7")) == (
        "FloatFormat(E8M7: 16 bits, signed, bias 127, max 255 * 2**121, finite only)"
    )
    assert "no subnormals" in repr(parse("E2M1NS"))


def test_formats_are_values():
    fmt = FloatFormat(2, 1, signed=False)
    assert fmt == FloatFormat(2, 1, False, 1, Specials.FINITE_ONLY, True) == parse("E2M1U")
    assert len({fmt, parse("E2M1U"), parse("E2M1")}) == 2
    assert pickle.loads(pickle.dumps(fmt)) == fmt  # noqa: S301
    with pytest.raises(dataclasses.FrozenInstanceError):
        fmt.bias = 2
    assert not hasattr(fmt, "__dict__")


def test_methods_delegate():
    fmt = parse("E2M1")
    assert fmt.quantize(1.27) == 1.5
    assert fmt.encode(float("nan"), nan=3) == 3
    assert fmt.decode(7) == 6.0
    assert fmt.values()[0] == -6.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": 2, "p": 1}, "k is 2; it must be an integer above 2"),
        ({"k": 8, "p": 8}, "p is 8; it must be an integer from 1 to 7"),
        ({"k": 8, "p": 9, "signed": False}, "p is 9; it must be an integer from 1 to 8"),
        ({"k": 8.0, "p": 3}, "k is 8.0"),
        ({"k": 40, "p": 2}, "exponent_bits is 38"),
    ],
)
def test_impossible_formats_of_p3109_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        p3109(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"exponent_bits": 17, "mantissa_bits": 1}, "exponent_bits is 17; .* from 0 to 16"),
        ({"exponent_bits": -1, "mantissa_bits": 1}, "exponent_bits is -1"),
        ({"exponent_bits": 2.0, "mantissa_bits": 1}, r"exponent_bits is 2\.0"),
        ({"exponent_bits": True, "mantissa_bits": 1}, "exponent_bits is True"),
        ({"exponent_bits": 2, "mantissa_bits": 53}, "mantissa_bits is 53; .* from 0 to 52"),
        ({"exponent_bits": 0, "mantissa_bits": 0}, "no finite nonzero value .* add a bit"),
        ({"exponent_bits": 1, "mantissa_bits": 0, "specials": Specials.IEEE}, "no finite nonzero"),
        ({"exponent_bits": 0, "mantissa_bits": 4, "specials": Specials.IEEE}, "no finite nonzero"),
        ({"exponent_bits": 2, "mantissa_bits": 1, "bias": 1.5}, r"bias is 1\.5; .* integer"),
        ({"exponent_bits": 2, "mantissa_bits": 1, "specials": "IEEE"}, "specials is 'IEEE'"),
        (
            {"exponent_bits": 2, "mantissa_bits": 1, "signed": False, "specials": Specials.FNUZ},
            "no negative zero",
        ),
        ({"exponent_bits": 2, "mantissa_bits": 1, "zero": False}, "zero is False; that needs sub"),
        (
            {"exponent_bits": 2, "mantissa_bits": 1, "signed": 2},
            "signed is 2; allowed: True, False",
        ),
        ({"exponent_bits": 2, "mantissa_bits": 1, "subnormals": None}, "subnormals is None"),
        ({"exponent_bits": 10**11, "mantissa_bits": 1}, "exponent_bits is 100000000000; it must"),
        (
            {
                "exponent_bits": 2,
                "mantissa_bits": 1,
                "zero": False,
                "subnormals": False,
                "specials": Specials.FNUZ,
            },
            "zero is False; FNUZ puts NaN",
        ),
    ],
)
def test_impossible_formats_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        FloatFormat(**arguments)


def test_a_maximum_beyond_float64_is_exact_as_a_fraction():
    fmt = parse("E11M52")
    assert fmt.exact_max == (2**53 - 1) * Fraction(2) ** (2047 - 1023 - 52)
    with pytest.raises(OverflowError, match="max of E11M52 is beyond float64"):
        _ = fmt.max
    wide = p3109(16, 1)
    with pytest.raises(OverflowError, match="smallest of Binary16p1se is beyond float64"):
        _ = wide.smallest
    assert wide.exact_smallest == Fraction(2) ** -16383


def test_formats_wider_than_float64_have_exact_tables_and_no_dtype():
    wide = [
        p3109(k, p, signed=signed, extended=extended)
        for k in range(3, 17)
        for p in range(1, k + 1)
        for signed in (True, False)
        for extended in (True, False)
        if p < k or not signed
    ]
    beyond = [fmt for fmt in wide if not holds(FLOAT_DTYPES["float64"], fmt)]
    assert (len(wide), len(beyond)) == (504, 50)
    assert sum(not holds(FLOAT_DTYPES["float32"], fmt) for fmt in wide) == 128
    for fmt in (p3109(13, 1), p3109(13, 2, signed=False, extended=False)):
        table = exact.values(fmt)
        assert len(table) == fmt.code_count - 1 - fmt.has_infinity * (1 + fmt.signed)
        assert table[-1] == fmt.exact_max
        assert [exact.decode(exact.encode(value, fmt), fmt) for value in table[-9:]] == table[-9:]
        for function in (fmt.quantize, fmt.encode):
            with pytest.raises(ValueError, match=r"float64 cannot hold .* use fpformats\.exact"):
                function(1.0)
        with pytest.raises(ValueError, match="float64 cannot hold"):
            fmt.values()


P3109_BY_ITS_FORMULAS = [p3109(k, p, signed=s, extended=x) for k, p, s, x in [
    (3, 1, True, True), (3, 2, False, False), (4, 4, False, True), (5, 2, True, False),
    (8, 3, True, True), (8, 1, False, False), (8, 8, False, True), (9, 4, False, False),
]]  # fmt: skip


@pytest.mark.parametrize("fmt", P3109_BY_ITS_FORMULAS, ids=str)
def test_codes_of_p3109_decode_by_its_formulas(fmt):
    # Interim report 4.0, 4.2 and 4.5, in its own symbols.
    name = re.fullmatch(r"Binary(\d+)p(\d+)([su])([ef])", {
        "E4M3FNUZ": "Binary8p4sf", "E3M1FNUZ": "Binary5p2sf"}.get(str(fmt), str(fmt)))  # fmt: skip
    k, p, signed, extended = int(name[1]), int(name[2]), name[3] == "s", name[4] == "e"
    b = 2 ** (k - p - 1) if signed else 2 ** (k - p)
    half = 2 ** (k - 1)
    for code in range(2**k):
        value = exact.decode(code, fmt)
        if code == (half if signed else 2**k - 1):
            assert math.isnan(value)
            continue
        if extended and code == (half - 1 if signed else 2**k - 2):
            assert value == math.inf
            continue
        if extended and signed and code == 2**k - 1:
            assert value == -math.inf
            continue
        negative = signed and code > half
        e, t = divmod(code - half if negative else code, 2 ** (p - 1))
        unit = Fraction(2) ** (1 - p)
        magnitude = t * unit * Fraction(2) ** (1 - b) if e == 0 else (
            (1 + t * unit) * Fraction(2) ** (e - b))  # fmt: skip
        assert value == (-magnitude if negative else magnitude)


def test_the_block_scale_has_no_zero():
    fmt = parse("E8M0")
    assert (fmt.bits, fmt.min, fmt.max, fmt.smallest_code) == (8, 2.0**-127, 2.0**127, 0)
    assert fmt.values().tolist() == [2.0**e for e in range(-127, 128)]
    assert (fmt.nan_code, fmt.infinity_code, fmt.has_negative_zero) == (255, None, False)
    assert "no zero" in repr(fmt)


def test_without_mantissa_bits_there_are_no_subnormals_to_leave_out():
    assert FloatFormat(3, 0, subnormals=False) == FloatFormat(3, 0)


@pytest.mark.parametrize("fmt", small_formats(), ids=str)
def test_eps_is_the_step_after_one(fmt):
    listed = exact.values(fmt)
    above = [value for value in listed if value > 1]
    if 1 in listed and above:
        assert fmt.eps == min(above) - 1
    else:
        assert fmt.eps is None


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_facts_are_those_that_numpy_tells(dtype):
    fmt, info = parse(np.dtype(dtype).name), np.finfo(dtype)
    assert fmt.bits == info.bits
    assert fmt.eps == info.eps
    assert fmt.max == info.max
    assert fmt.smallest_normal == info.smallest_normal
    assert fmt.smallest_subnormal == info.smallest_subnormal


def test_a_format_knows_its_name_and_shows_itself_in_a_notebook():
    fmt = parse("E4M3FN")
    assert fmt.name == str(fmt) == "E4M3"
    assert fmt._repr_html_().startswith("<table><caption>E4M3</caption>")
