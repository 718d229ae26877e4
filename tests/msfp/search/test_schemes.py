from typing import get_args

import numpy as np
import pytest

from fpformats import FloatFormat
from msfp.config import BLOCK_SCHEMES, Scheme
from msfp.search.schemes import (
    SCHEMES,
    BlockScheme,
    float_formats,
    formats_like,
    integer_formats,
    scaled_scheme,
)


def test_configs_name_the_schemes_that_there_are():
    assert tuple(SCHEMES) == get_args(Scheme)
    in_blocks = {name for name, scheme in SCHEMES.items() if isinstance(scheme, BlockScheme)}
    assert in_blocks == BLOCK_SCHEMES.keys()


def test_candidates_at_four_bits_are_those_of_the_paper():
    assert [str(f) for f in float_formats(4, signed=True)] == ["E1M2", "E2M1", "E3M0"]
    assert [str(f) for f in float_formats(4, signed=False)] == ["E1M3U", "E2M2U", "E3M1U", "E4M0U"]


@pytest.mark.parametrize("bits", range(3, 9))
@pytest.mark.parametrize("signed", [True, False])
def test_candidates_have_the_width_asked_for_and_no_special_values(bits, signed):
    for fmt in float_formats(bits, signed=signed):
        assert fmt.bits == bits
        assert not fmt.has_nan
        assert not fmt.has_infinity


@pytest.mark.parametrize("bits", range(3, 9))
def test_integers_are_uniform_and_symmetric(bits):
    (fmt,) = integer_formats(bits, signed=True)
    grid = fmt.values()
    assert len(grid) == 2**bits - 1
    assert len(np.unique(np.diff(grid))) == 1
    assert grid[0] == -grid[-1]


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("formats", [float_formats, integer_formats])
def test_formats_like_one_are_all_that_were_chosen_from(formats, signed):
    for fmt in formats(5, signed=signed):
        assert formats_like(fmt) == formats(5, signed=signed)
    assert FloatFormat(2, 1) in formats_like(FloatFormat(1, 2))


@pytest.mark.parametrize("name", BLOCK_SCHEMES)
def test_a_scheme_of_blocks_is_not_taken_for_one_with_scales(name):
    with pytest.raises(ValueError, match=f"scheme '{name}' is a block scheme"):
        scaled_scheme(name)
