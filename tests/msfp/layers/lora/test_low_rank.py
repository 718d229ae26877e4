import pytest
import torch

from msfp.layers.lora.low_rank import low_rank


def problem(rows=12, columns=20, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize(("rows", "columns"), [(12, 20), (20, 12)])
@pytest.mark.parametrize("rank", [1, 4, 12, 50])
def test_the_factors_have_the_rank_asked_for_and_no_more_than_there_is(rows, columns, rank):
    down, up = low_rank(problem(rows, columns), rank)
    assert down.shape == (min(rank, 12), columns)
    assert up.shape == (rows, min(rank, 12))


@pytest.mark.parametrize(("rows", "columns"), [(12, 20), (20, 12), (9, 9)])
def test_it_is_the_truncated_singular_value_decomposition(rows, columns):
    matrix = problem(rows, columns)
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    for rank in (1, 5, 9):
        down, up = low_rank(matrix, rank)
        torch.testing.assert_close(up @ down, left[:, :rank] * values[:rank] @ right[:rank])
        torch.testing.assert_close(down.norm(dim=1), values[:rank].sqrt())
        torch.testing.assert_close(up.norm(dim=0), values[:rank].sqrt())


def test_no_other_matrix_of_that_rank_is_nearer():
    matrix = problem()
    down, up = low_rank(matrix, 3)
    nearest = (matrix - up @ down).norm()
    generator = torch.Generator().manual_seed(7)
    for _ in range(20):
        moved = [
            part + 1e-3 * torch.randn(part.shape, generator=generator, dtype=torch.float64)
            for part in (down, up)
        ]
        assert (matrix - moved[1] @ moved[0]).norm() > nearest


def test_a_matrix_of_less_than_the_rank_is_given_back():
    matrix = torch.zeros(4, 6)
    matrix[1, 2] = 3.0
    down, up = low_rank(matrix, 3)
    assert down.isfinite().all()
    torch.testing.assert_close(up @ down, matrix)
