import pytest
import torch

from msfp.gptq import damped, output_error
from msfp.low_rank import low_rank


def problem(rows=12, columns=20, seed=0):
    generator = torch.Generator().manual_seed(seed)
    error = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    x = torch.randn(columns, 6, generator=generator, dtype=torch.float64)
    return error, damped((x @ x.T)[None], 0.01)[0]


def left(error, factors, second):
    down, up = factors
    return output_error((error - up @ down)[None], second[None]).sum().item()


@pytest.mark.parametrize("rank", [1, 4, 12, 50])
def test_the_factors_have_the_rank_asked_for_and_no_more_than_there_is(rank):
    down, up = low_rank(*problem(), rank=rank)
    assert down.shape == (min(rank, 12), 20)
    assert up.shape == (12, min(rank, 12))


def test_full_rank_takes_all_of_the_error_away():
    error, second = problem()
    down, up = low_rank(error, second, rank=12)
    torch.testing.assert_close(up @ down, error)


def test_what_is_left_is_the_sum_of_the_squares_of_the_smaller_singular_values():
    error, second = problem()
    values = torch.linalg.svdvals(error @ torch.linalg.cholesky(second))
    for rank in (1, 5, 11):
        found = left(error, low_rank(error, second, rank=rank), second)
        assert found == pytest.approx(values[rank:].square().sum().item(), rel=1e-8)


def test_no_other_matrix_of_that_rank_leaves_less():
    error, second = problem()
    down, up = low_rank(error, second, rank=3)
    best = left(error, (down, up), second)
    identity = torch.eye(20, dtype=torch.float64)
    assert best < left(error, low_rank(error, identity, rank=3), second)
    generator = torch.Generator().manual_seed(7)
    for _ in range(20):
        moved = [
            part + 1e-3 * torch.randn(part.shape, generator=generator, dtype=torch.float64)
            for part in (down, up)
        ]
        assert left(error, moved, second) > best


def test_with_the_identity_it_is_the_svd_of_the_error():
    error, _ = problem()
    down, up = low_rank(error, torch.eye(20, dtype=torch.float64), rank=2)
    u, s, v = torch.linalg.svd(error, full_matrices=False)
    torch.testing.assert_close(up @ down, u[:, :2] * s[:2] @ v[:2])
