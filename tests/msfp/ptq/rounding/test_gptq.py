import pytest
import torch

from fpformats import quantize_scaled
from fpformats.parsing import parse
from msfp.layers.kinds import kind_of
from msfp.ptq.moments import as_matrix
from msfp.ptq.rounding import gptq as rounding
from msfp.ptq.rounding.gptq import damped, output_error, upper_factor
from msfp.ptq.rounding.weight_grid import WeightGrid

FORMATS = ("E1M2", "E2M1", "E3M0", "E0M3", "E2M2U", "E4M3")


def problem(rows=8, columns=24, groups=1, seed=0, dtype=torch.float64):
    """A random matrix, and second moments of columns that share much."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(groups, columns, columns, generator=generator, dtype=dtype)
    x = mixing @ torch.randn(groups, columns, 4 * columns, generator=generator, dtype=dtype)
    matrix = torch.randn(groups, rows, columns, generator=generator, dtype=dtype)
    scale = matrix.abs().amax(dim=-1, keepdim=True) / 6
    return matrix, x @ x.mT / x.shape[-1], scale


def gptq(matrix, second, fmt, scale):
    return rounding.gptq(matrix, WeightGrid(fmt, scale), upper=upper_factor(second))


def by_the_book(weight, second, fmt, scale):
    """GPTQ as published: one column, then all the rest updated by the inverse Hessian."""
    weight, inverse = weight.clone(), torch.linalg.inv(second)
    rounded = torch.zeros_like(weight)
    for j in range(weight.shape[1]):
        rounded[:, j] = quantize_scaled(weight[:, j].clone(), fmt, scale[:, 0])
        error = (weight[:, j] - rounded[:, j]) / inverse[j, j]
        weight[:, j:] -= error[:, None] * inverse[j, j:]
        inverse = inverse - torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return rounded


def error_of(matrix, rounded, second):
    return output_error(matrix - rounded, second).sum().item()


def test_the_upper_factor_gives_the_moments_back():
    _, second, _ = problem(groups=3)
    upper = upper_factor(second)
    assert torch.equal(upper, upper.triu())
    assert (upper.diagonal(dim1=-2, dim2=-1) > 0).all()
    torch.testing.assert_close(upper @ upper.mT, second)


def test_moments_that_are_not_positive_definite_are_refused():
    _, second, _ = problem()
    with pytest.raises(torch.linalg.LinAlgError):
        upper_factor(-second)


def test_damping_adds_to_the_diagonal_in_units_of_its_mean():
    second = torch.tensor([[[1.0, 0.5], [0.5, 3.0]], [[0.0, 0.0], [0.0, 0.0]]])
    expected = torch.tensor([[[1.2, 0.5], [0.5, 3.2]], [[1.0, 0.0], [0.0, 1.0]]])
    torch.testing.assert_close(damped(second, 0.1), expected)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("columns", [1, 24, 150])
def test_it_is_the_published_algorithm(name, columns):
    fmt = parse(name)
    matrix, second, scale = problem(columns=columns, seed=columns)
    ours = gptq(matrix, second, fmt, scale)
    book = by_the_book(matrix[0], second[0], fmt, scale[0])
    assert torch.equal(ours[0], book)


@pytest.mark.parametrize("name", FORMATS)
def test_every_value_is_one_of_the_format_times_the_scale(name):
    fmt = parse(name)
    matrix, second, scale = problem(dtype=torch.float32)
    rounded = gptq(matrix, second, fmt, scale)
    assert torch.equal(rounded, quantize_scaled(rounded, fmt, scale))


@pytest.mark.parametrize("name", ["E1M2", "E2M1", "E3M0"])
def test_the_output_error_is_less_than_that_of_nearest_on_average(name):
    fmt = parse(name)
    ratios = []
    for seed in range(10):
        matrix, second, _ = problem(seed=seed)
        scale = matrix.abs().amax(dim=-1, keepdim=True) / float(fmt.max)
        nearest = error_of(matrix, quantize_scaled(matrix, fmt, scale), second)
        ratios.append(error_of(matrix, gptq(matrix, second, fmt, scale), second) / nearest)
    assert sum(ratios) / len(ratios) < 0.8


def test_columns_that_share_nothing_are_rounded_to_nearest():
    matrix, _, scale = problem()
    second = torch.diag_embed(torch.rand(1, 24, dtype=torch.float64))
    fmt = parse("E2M1")
    assert torch.equal(gptq(matrix, second, fmt, scale), quantize_scaled(matrix, fmt, scale))


def test_two_columns_come_close_to_the_best_of_all_pairs():
    fmt = parse("E2M1")
    grid = torch.from_numpy(fmt.values())
    pairs = torch.cartesian_prod(grid, grid)[None]
    ratios = []
    for seed in range(30):
        matrix, second, _ = problem(rows=1, columns=2, seed=seed)
        best = output_error(matrix - pairs, second).min().item()
        one = torch.ones((), dtype=torch.float64)
        found = error_of(matrix, gptq(matrix, second, fmt, one), second)
        assert found >= best - 1e-12
        ratios.append(found <= best * (1 + 1e-9))
    assert sum(ratios) >= 20


def test_groups_are_rounded_as_each_by_itself():
    fmt = parse("E2M1")
    matrix, second, scale = problem(groups=3, columns=70)
    together = gptq(matrix, second, fmt, scale)
    for group in range(3):
        part = slice(group, group + 1)
        alone = gptq(matrix[part], second[part], fmt, scale[part])
        assert torch.equal(together[part], alone)


def test_scales_may_differ_along_the_columns():
    fmt = parse("E2M1")
    matrix, second, scale = problem(columns=8)
    scales = (scale * torch.tensor([1.0, 0.5]).double()).repeat_interleave(4, dim=-1)
    rounded = gptq(matrix, second, fmt, scales)
    assert torch.equal(rounded, quantize_scaled(rounded, fmt, scales))


def test_columns_that_are_never_read_and_layers_that_read_only_zeros_are_rounded_to_nearest():
    fmt = parse("E2M1")
    matrix, second, scale = problem()
    second[:, 5] = second[:, :, 5] = 0
    second = damped(second, 0.01)
    nearest = quantize_scaled(matrix, fmt, scale)
    assert torch.equal(gptq(matrix, second, fmt, scale)[..., 5], nearest[..., 5])
    assert torch.equal(gptq(matrix, damped(0 * second, 0.01), fmt, scale), nearest)


def test_a_grouped_convolution_is_rounded_in_its_output():
    generator = torch.Generator().manual_seed(3)
    layer = torch.nn.Conv2d(8, 8, 3, stride=2, padding=2, dilation=2, groups=2)
    x = torch.randn(16, 8, 9, 9, generator=generator).cumsum(dim=-1)
    with torch.no_grad():
        columns, matrix = kind_of(layer).columns(layer, x), as_matrix(layer, layer.weight)
        second = damped(columns @ columns.mT / columns.shape[-1], 1e-6)
        fmt, scale = parse("E2M1"), matrix.abs().amax(dim=-1, keepdim=True) / 6
        errors = []
        for rounded in (
            quantize_scaled(matrix, fmt, scale),
            gptq(matrix, second, fmt, scale),
        ):
            changed = torch.nn.utils.skip_init(torch.nn.Conv2d, 8, 8, 3, 2, 2, 2, 2)
            changed.weight.copy_(rounded.reshape(layer.weight.shape))
            changed.bias.copy_(layer.bias)
            direct = (changed(x) - layer(x)).square().mean(dim=(0, 2, 3))
            torch.testing.assert_close(
                output_error(matrix - rounded, second).flatten(), direct, rtol=1e-4, atol=1e-6
            )
            errors.append(direct.sum())
    assert errors[1] < 0.7 * errors[0]
