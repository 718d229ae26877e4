import itertools

import numpy as np
import pytest
import torch

from fpformats import quantize_scaled
from fpformats.fitting.search import search
from fpformats.parsing import parse
from msfp.ptq.rounding.gptq import output_error
from msfp.ptq.weight_search import search_scales

FORMATS = [parse(name) for name in ("E1M2", "E2M1", "E3M0")]
RATIOS = np.linspace(0.3, 1.0, 8)


def problem(groups=2, rows=5, columns=12):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(groups, columns, 4, generator=generator) @ torch.randn(
        groups, 4, 100, generator=generator
    )
    matrix = torch.randn(groups, rows, columns, generator=generator)
    return matrix, x @ x.mT / 100


def total(matrix, second, fmt, scale):
    return output_error(matrix - quantize_scaled(matrix, fmt, scale), second).sum().item()


def test_no_other_candidate_has_less_error_of_the_output():
    matrix, second = problem()
    fmt, scale = search_scales(matrix, second, FORMATS, ratios=RATIOS)
    assert scale.shape == (2, 5, 1)
    best = total(matrix, second, fmt, scale)
    for group, row in itertools.product(range(2), range(5)):
        one = matrix[group : group + 1, row : row + 1]
        errors = [
            total(one, second[group : group + 1], fmt, one.abs().max() * float(r) / float(fmt.max))
            for r in RATIOS
        ]
        found = total(one, second[group : group + 1], fmt, scale[group, row])
        assert found == pytest.approx(min(errors), rel=1e-5)
    for other in FORMATS:
        alone = search_scales(matrix, second, [other], ratios=RATIOS)[1]
        assert best <= total(matrix, second, other, alone) * (1 + 1e-6)


def test_with_the_identity_it_is_the_search_on_the_weights():
    matrix, _ = problem(groups=1)
    expected = search(matrix[0], FORMATS, ratios=RATIOS, axis=0, refine=False)
    for second in (torch.eye(12)[None], torch.ones(1, 12)):
        fmt, scale = search_scales(matrix, second, FORMATS, ratios=RATIOS)
        assert fmt == expected.format
        torch.testing.assert_close(scale.flatten(), expected.scale.flatten())


def test_the_diagonal_alone_is_the_moments_without_what_columns_share():
    matrix, second = problem()
    diagonal = second.diagonal(dim1=-2, dim2=-1)
    short = search_scales(matrix, diagonal, FORMATS)
    long = search_scales(matrix, torch.diag_embed(diagonal), FORMATS)
    assert short[0] == long[0]
    assert torch.equal(short[1], long[1])


def test_rows_of_zeros_have_a_usable_scale_and_no_formats_are_refused():
    matrix, second = problem()
    matrix[0, 0] = 0
    _, scale = search_scales(matrix, second, FORMATS)
    assert scale[0, 0] == 1
    with pytest.raises(ValueError, match="formats must hold at least one"):
        search_scales(matrix, second, [])
