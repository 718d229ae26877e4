import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import (
    MODES,
    SATURATIONS,
    STOCHASTIC,
    aimed_inputs,
    assert_same_bits,
    definition_by_table,
    dtypes_of,
    every_format,
)

from fpformats import FloatFormat, decode, encode, exact, p3109, parse, quantize, strategies
from fpformats.kernels import philox

on_backends = pytest.mark.usefixtures("backend")

BITS = range(1, 9)
POLICIES = [(mode, saturation) for mode in MODES for saturation in SATURATIONS]


def of_width(bits, most=9):
    """Formats by their bits below the sign, of at most some bits with it."""
    return [fmt for fmt in every_format(8) if fmt.magnitude_bits == bits and fmt.bits <= most]


def check_deterministic(fmt, dtype, each_backend, *wraps):
    x = aimed_inputs(fmt, dtype)
    expected = {policy: definition_by_table(x, fmt, *policy).astype(dtype) for policy in POLICIES}

    def check():
        for given_x in (wrap(x) for wrap in wraps):
            for (mode, saturation), wanted in expected.items():
                check_policy(given_x, fmt, {"rounding": mode, "saturation": saturation}, wanted)

    each_backend(check)


def check_policy(x, fmt, policy, expected):
    assert_same_bits(np.asarray(quantize(x, fmt, **policy)), expected)
    nan = fmt.nan_code if fmt.has_nan else 0
    codes = np.asarray(encode(x, fmt, **policy, nan=nan))
    numbers = ~np.isnan(expected)
    assert_same_bits(decode(codes[numbers], fmt, dtype=expected.dtype.name), expected[numbers])
    assert (codes[~numbers] == nan).all()


@pytest.mark.parametrize(
    "bits", [pytest.param(n, marks=[pytest.mark.slow] * (n in (3, 4, 5, 6, 7))) for n in BITS]
)
def test_every_format_rounds_and_saturates_as_defined(bits, each_backend):
    wraps = [np.asarray, torch.from_numpy] if bits < 5 else [np.asarray]
    for fmt in of_width(bits, most=8):
        check_deterministic(fmt, dtypes_of(fmt)[0], each_backend, *wraps)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("bits", BITS)
def test_every_format_rounds_and_saturates_as_defined_everywhere(bits, dtype, each_backend):
    for fmt in of_width(bits):
        if dtype in dtypes_of(fmt):
            check_deterministic(fmt, dtype, each_backend, np.asarray, torch.from_numpy)


@pytest.mark.parametrize("bits", [1, 2])
def test_the_table_agrees_with_the_definition_in_rationals(bits):
    for fmt in of_width(bits):
        x = np.unique(aimed_inputs(fmt, "float64"))
        for mode, saturation in POLICIES:
            expected = [float(exact.quantize(float(v), fmt, mode, saturation)) for v in x]
            assert_same_bits(definition_by_table(x, fmt, mode, saturation), np.array(expected))


@pytest.mark.parametrize("mode", STOCHASTIC)
def test_stochastic_rounding_of_every_format_is_as_defined(mode, each_backend):
    generator, cases = np.random.default_rng(0), []
    for index, fmt in enumerate(every_format(8)):
        dtype = dtypes_of(fmt)[index % len(dtypes_of(fmt))]
        bits = int(generator.integers(1, 33))
        saturation = SATURATIONS[index % len(SATURATIONS)]
        x = generator.choice(aimed_inputs(fmt, dtype), 12)
        x = np.where(generator.random(12) < 0.5, x, x * generator.random(12)).astype(dtype)
        words = generator.integers(0, 2**bits, 12)
        expected = [
            float(exact.quantize(float(v), fmt, mode, saturation, int(word), bits))
            for v, word in zip(x, words, strict=True)
        ]
        options = {"rounding": mode, "saturation": saturation, "random_bits": bits}
        cases.append((fmt, x, words, options, np.array(expected, dtype=dtype)))

    def check():
        for index, (fmt, x, words, options, expected) in enumerate(cases):
            assert_same_bits(quantize(x, fmt, random=words, **options), expected)
            if index % 4 == 0:
                tensors = torch.from_numpy(x), torch.from_numpy(words)
                rounded = quantize(tensors[0], fmt, random=tensors[1], **options)
                assert_same_bits(rounded.numpy(), expected)

    each_backend(check)


@settings(max_examples=400, deadline=None)
@given(data=st.data())
def test_any_format_rounds_as_defined_under_any_policy(data, each_backend):
    dtype = data.draw(st.sampled_from(["float32", "float64"]))
    fmt = data.draw(strategies.formats(dtype))
    policy = data.draw(strategies.policies())
    x = data.draw(strategies.near_ties(fmt, dtype) | strategies.floats(dtype))
    random = policy.pop("random")
    words = None if random is None else np.array(random)
    word = {} if random is None else {"word": random}
    expected = float(exact.quantize(float(x), fmt, **policy, **word))
    nothing = math.isnan(expected)
    code = None if nothing else exact.encode(float(x), fmt, **policy, **word)

    def check():
        rounded = quantize(x, fmt, **policy, random=words)
        assert_same_bits(rounded, np.dtype(dtype).type(expected))
        assert nothing or encode(x, fmt, **policy, random=words) == code

    each_backend(check)


@pytest.mark.parametrize("name", ["E2M1", "E3M0", "E4M3", "E2M2NS", "E8M0", "Binary8p3se"])
@pytest.mark.parametrize("mode", STOCHASTIC)
def test_all_words_together_give_the_exact_probability(name, mode, each_backend):
    each_backend(lambda: check_probabilities(parse(name), mode, bits=6))


def check_probabilities(fmt, mode, bits):
    words = np.arange(2**bits)
    steps = np.linspace(0, 1, 2 ** (bits + 1) + 1)  # halfway between probabilities too
    for code in [fmt.smallest_code, fmt.smallest_code + 1, fmt.max_code // 2, fmt.max_code - 1]:
        low, high = Fraction(exact.decode(code, fmt)), Fraction(exact.decode(code + 1, fmt))
        for x in float(low) + steps * float(high - low):
            v = (Fraction(x) - low) / (high - low)
            options = {"rounding": mode, "random": words, "random_bits": bits}
            result = quantize(np.full(2**bits, x), fmt, **options)
            assert np.isin(result, [float(low), float(high)]).all()
            ups = int((result == float(high)).sum()) if v > 0 else 0
            if mode == "StochasticA":  # the probability is v, cut to the bits
                assert ups == math.floor(v * 2**bits)
            elif mode == "StochasticB":  # rounded to the nearest, halves up
                assert ups == math.floor(v * 2**bits + Fraction(1, 2))
            else:  # rounded to the nearest, halves to even
                assert ups == round(v * 2**bits)


@on_backends
@pytest.mark.parametrize("mode", STOCHASTIC)
def test_values_stay_where_they_are_whatever_the_word(mode):
    for name in ("E2M1", "E3M0", "E2M2NS"):
        fmt = parse(name)
        for word in (0, 7, 255):
            listed = fmt.values()
            words = np.full(listed.shape, word)
            kept = quantize(listed, fmt, rounding=mode, random=words, random_bits=8)
            np.testing.assert_array_equal(kept, listed)


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        (
            (0, 0, 0, 0),
            (0, 0),
            (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8),
        ),
        (
            (0xFFFFFFFF,) * 4,
            (0xFFFFFFFF,) * 2,
            (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
        ),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_the_generator_gives_the_known_answers_of_its_authors(counter, key, expected):
    for make in (np.array, torch.tensor):
        words = philox.philox(tuple(make([word]) for word in counter), key)
        assert tuple(int(word[0]) for word in words) == expected


@on_backends
def test_a_seed_gives_the_same_words_whatever_the_shape_and_library():
    fmt, x = parse("E2M1"), np.random.default_rng(0).standard_normal(4096).astype(np.float32)
    rounded = quantize(x, fmt, rounding="StochasticA", random=5)
    for shape in ((64, 64), (4096, 1), (2, 2, 1024)):
        view = x.reshape(shape)
        np.testing.assert_array_equal(
            quantize(view, fmt, rounding="StochasticA", random=5).ravel(), rounded
        )
    strided = torch.from_numpy(x.reshape(64, 64).T.copy()).T
    tensor = quantize(strided, fmt, rounding="StochasticA", random=5)
    np.testing.assert_array_equal(tensor.numpy().ravel(), rounded)
    assert (rounded != quantize(x, fmt, rounding="StochasticA", random=6)).any()
    words = philox.random_words(np, x, 5, 32)
    np.testing.assert_array_equal(quantize(x, fmt, rounding="StochasticA", random=words), rounded)
    fewer = quantize(x, fmt, rounding="StochasticA", random=5, random_bits=3)
    np.testing.assert_array_equal(
        quantize(x, fmt, rounding="StochasticA", random=words >> 29, random_bits=3), fewer
    )


@on_backends
def test_a_seed_gives_an_unbiased_mean():
    x = np.full(200_000, 1.125)
    mean = quantize(x, parse("E2M1"), rounding="StochasticC", random=0).mean()
    assert abs(mean - 1.125) < 4 * 0.5 * math.sqrt(0.25 * 0.75 / x.size)


@on_backends
@pytest.mark.parametrize("saturation", SATURATIONS)
@pytest.mark.parametrize("mode", [*MODES, *STOCHASTIC])
def test_nan_stays_nan_under_every_policy(mode, saturation):
    random = 0 if mode in STOCHASTIC else None
    for name in ("E2M1", "E2M1U", "E8M0", "E4M3", "Binary8p1ue", "E3M0IEEE"):
        policy = {"rounding": mode, "saturation": saturation, "random": random}
        assert math.isnan(quantize(math.nan, parse(name), **policy))
        assert quantize(torch.tensor([math.nan]), parse(name), **policy).isnan().all()


@on_backends
@pytest.mark.parametrize(
    ("name", "saturation", "x", "expected"),
    [
        # P3109: signed and unsigned, extended and finite.
        ("Binary8p3se", "SatFinite", math.inf, 49152.0),
        ("Binary8p3se", "SatPropagate", math.inf, math.inf),
        ("Binary8p3se", "SatPropagate", 1e9, 49152.0),
        ("Binary8p3se", "SatNone", 1e9, math.inf),
        ("Binary8p3se", "SatNone", -1e9, -math.inf),
        ("Binary8p3sf", "SatPropagate", math.inf, 57344.0),
        ("Binary8p3sf", "SatNone", math.inf, 57344.0),
        ("Binary8p3sf", "SatNone", -1e9, -57344.0),
        ("Binary8p3ue", "SatPropagate", -math.inf, 0.0),
        ("Binary8p3ue", "SatNone", -1.0, math.nan),
        ("Binary8p3ue", "SatNone", -math.inf, math.nan),
        ("Binary8p3ue", "SatNone", -1e-30, 0.0),
        ("Binary8p3uf", "SatNone", -1.0, math.nan),
        # OCP OFP8 conversions: saturating is SatFinite, non-saturating is OverflowNaN.
        ("E4M3", "SatFinite", 464.1, 448.0),
        ("E4M3", "OverflowNaN", 464.0, 448.0),
        ("E4M3", "OverflowNaN", 464.1, math.nan),
        ("E4M3", "OverflowNaN", math.inf, math.nan),
        ("E5M2", "SatFinite", 61440.0, 57344.0),
        ("E5M2", "OverflowNaN", 61440.0, math.inf),
        ("E5M2", "OverflowNaN", 61439.9, 57344.0),
        ("E5M2", "SatNone", 61440.0, math.inf),
        # Unsigned and finite, without a code for NaN: the dtype holds it.
        ("E2M1U", "SatFinite", -3.0, 0.0),
        ("E2M1U", "SatNone", -3.0, math.nan),
        ("E2M1U", "OverflowNaN", 9.0, math.nan),
        # The block scale: zero is out of its range.
        ("E8M0", "SatFinite", 0.0, 2.0**-127),
        ("E8M0", "SatFinite", -1.0, 2.0**-127),
        ("E8M0", "SatNone", 0.0, math.nan),
        ("E8M0", "SatNone", -1.0, math.nan),
        ("E8M0", "SatNone", 2.0**-127, 2.0**-127),
    ],
)
def test_saturation_by_example(name, saturation, x, expected):
    for value in (x, np.float64(x), torch.tensor(x, dtype=torch.float64)):
        rounded = float(quantize(value, parse(name), saturation=saturation))
        assert rounded == expected or (math.isnan(rounded) and math.isnan(expected))


@on_backends
@pytest.mark.parametrize(
    ("name", "mode", "x", "expected"),
    [
        ("Binary8p3se", "TowardZero", 1e9, 49152.0),
        ("Binary8p3se", "TowardNegative", 1e9, 49152.0),
        ("Binary8p3se", "TowardPositive", 1e9, math.inf),
        ("Binary8p3se", "TowardPositive", -1e9, -49152.0),
        ("Binary8p3se", "ToOdd", 1e9, math.inf),
        ("Binary8p3ue", "ToOdd", 1e30, p3109(8, 3, signed=False).max),
        ("Binary8p3ue", "TowardZero", -1.0, 0.0),
        ("Binary8p3ue", "TowardNegative", -1e-30, math.nan),
        ("E5M2", "ToOdd", 1e9, 57344.0),
        ("E4M3", "ToOdd", 4.0, 4.0),
        ("E4M3", "ToOdd", 4.0 + 2**-40, 4.5),
        ("E4M3", "ToOdd", -4.5 - 2**-40, -4.5),
        ("E2M1", "NearestTiesToAway", -2.5, -3.0),
        ("E2M1", "NearestTiesToAway", 0.25, 0.5),
    ],
)
def test_directed_modes_without_saturation_by_example(name, mode, x, expected):
    rounded = quantize(x, parse(name), rounding=mode, saturation="SatNone")
    assert rounded == expected or (math.isnan(rounded) and math.isnan(expected))


@on_backends
def test_what_saturation_makes_nan_is_not_encoded_silently():
    fmt = parse("E2M1U")
    with pytest.raises(ValueError, match="x goes beyond E2M1U, which SatNone makes NaN"):
        encode(-3.0, fmt, saturation="SatNone")
    assert encode(-3.0, fmt, saturation="SatNone", nan=7) == 7
    assert encode(-1e-9, fmt, saturation="SatNone") == 0


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"rounding": "Nearest"}, ValueError, "rounding is 'Nearest'; allowed: NearestTiesToEven"),
        ({"saturation": "OvfInf"}, ValueError, "saturation is 'OvfInf'; allowed: SatFinite"),
        ({"random": 1}, ValueError, "random must be None: NearestTiesToEven uses no random"),
        ({"rounding": "StochasticA"}, ValueError, "random is None; StochasticA needs a seed"),
        ({"random_bits": 0}, ValueError, "random_bits is 0; it must be an integer from 1 to 32"),
        ({"random_bits": 33}, ValueError, "random_bits is 33"),
    ],
)
def test_bad_policies_are_refused(options, error, message):
    for function in (quantize, encode):
        with pytest.raises(error, match=message):
            function(1.0, parse("E2M1"), **options)


@pytest.mark.parametrize(
    ("random", "error", "message"),
    [
        (-1, ValueError, "random is the seed -1"),
        (2**64, ValueError, "random is the seed"),
        (True, TypeError, "random is a bool"),
        (0.5, TypeError, "random is a float"),
        (torch.zeros(2, dtype=torch.int64), TypeError, "random is a Tensor; .* library of x"),
        (np.zeros(3, np.int64), ValueError, r"random has shape \(3,\); x has shape \(2,\)"),
        (np.zeros(2), TypeError, "random are of type float64; they must be integers"),
        (np.array([0, 16]), ValueError, "random are 0 to 16; words of 4 bits are 0 to 15"),
        (np.array([-1, 1]), ValueError, "random are -1 to 1"),
    ],
)
def test_bad_random_words_are_refused(random, error, message):
    out = np.array([1.1, 1.2])
    for function, options in ((quantize, {"out": out}), (encode, {})):
        with pytest.raises(error, match=message):
            function(
                np.array([0.3, 0.4]),
                parse("E2M1"),
                rounding="StochasticB",
                random=random,
                random_bits=4,
                **options,
            )
    np.testing.assert_array_equal(out, [1.1, 1.2])


def check_compiled(name, function):
    fmt, x = parse(name), torch.from_numpy(aimed_inputs(parse("E4M3"), "float32"))
    words = torch.arange(x.numel()) * 7919 % 2**16
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, dynamic=False)(x, words, fmt)
    for ours, theirs in zip(compiled, function(x, words, fmt), strict=True):
        assert_same_bits(ours.numpy(), theirs.numpy())


def test_compiled_policies_give_the_same_bits():
    check_compiled(
        "E3M0U",
        lambda x, words, fmt: (
            quantize(x, fmt, rounding="ToOdd", saturation="SatNone"),
            quantize(x, fmt, rounding="StochasticB", random=words, random_bits=16),
        ),
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["E4M3", "E8M0", "Binary8p2se"])
def test_compiled_policies_and_seeds_give_the_same_bits(name):
    check_compiled(
        name,
        lambda x, words, fmt: (
            quantize(x, fmt, rounding="TowardNegative", saturation="OverflowNaN"),
            quantize(x, fmt, rounding="StochasticA", random=words, random_bits=16),
            quantize(x, fmt, rounding="StochasticC", saturation="SatPropagate", random=3),
        ),
    )


@on_backends
def test_the_way_of_the_default_agrees_with_the_general_one():
    # SatPropagate differs only for infinities, so it sends finite numbers the general way.
    for fmt in (f for f in every_format(8) if f.magnitude_bits in (3, 7)):
        for dtype in dtypes_of(fmt):
            x = aimed_inputs(fmt, dtype)
            x = x[np.isfinite(x)]
            assert_same_bits(quantize(x, fmt), quantize(x, fmt, saturation="SatPropagate"))


@on_backends
@pytest.mark.parametrize("name", ["E2M1B149", "E1M2B148", "E0M0B127UNZ", "E3M0B140IEEE"])
def test_formats_below_the_normal_numbers_of_float32(name):
    fmt = parse(name)
    x = aimed_inputs(fmt, "float32")
    for mode, saturation in POLICIES:
        expected = definition_by_table(x, fmt, mode, saturation).astype(np.float32)
        rounded = quantize(x, fmt, rounding=mode, saturation=saturation)
        assert_same_bits(rounded, expected)
        tensor = quantize(torch.from_numpy(x), fmt, rounding=mode, saturation=saturation)
        assert_same_bits(tensor.numpy(), expected)


@on_backends
def test_wide_formats_follow_policies_at_the_ends_of_float64():
    fmt = FloatFormat(11, 52, specials=parse("E5M2").specials)
    info = np.finfo(np.float64)
    x = np.array([info.max, info.tiny, info.smallest_subnormal, 0.1, -info.max, math.inf])
    for mode in [*MODES, *STOCHASTIC]:
        random = 9 if mode in STOCHASTIC else None
        kept = quantize(x, fmt, rounding=mode, saturation="SatNone", random=random)
        np.testing.assert_array_equal(kept, x)


@pytest.mark.parametrize(
    "wrap", [np.asarray, torch.from_numpy, float], ids=["NumPy", "torch", "float"]
)
def test_a_generator_gives_a_seed_each_time_and_reproduces(wrap):
    x = wrap(np.full(200, 0.3)) if wrap is not float else 0.3
    options = {"rounding": "StochasticA"}
    for make in (np.random.default_rng, torch.Generator().manual_seed):
        first, again = make(7), None
        drawn = [np.asarray(quantize(x, "E2M1", random=first, **options)) for _ in range(2)]
        again = make(7)
        for each in drawn:
            assert_same_bits(np.asarray(quantize(x, "E2M1", random=again, **options)), each)
        if wrap is not float:
            assert not np.array_equal(*drawn)


@on_backends
def test_a_generator_gives_the_same_words_to_numpy_and_torch():
    x, options = np.linspace(-6, 6, 100, dtype=np.float32), {"rounding": "StochasticB"}
    here = quantize(x, "E2M1", random=np.random.default_rng(3), **options)
    there = quantize(torch.from_numpy(x), "E2M1", random=np.random.default_rng(3), **options)
    assert_same_bits(there.numpy(), here)


def test_a_generator_is_not_taken_where_nothing_is_drawn():
    with pytest.raises(ValueError, match="NearestTiesToEven uses no random words"):
        quantize(np.ones(3), "E2M1", random=np.random.default_rng(0))
