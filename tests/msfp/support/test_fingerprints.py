import pytest
import torch

from msfp.support import fingerprints
from msfp.support.fingerprints import difference, digest, same


def test_numbers_may_differ_by_rounding_and_lists_of_words_may_not():
    assert same([1.0, 2.0], [1.0, 2.01])
    assert not same([1.0, 2.0], [1.0, 2.2])
    assert not same(["a"], ["b"])
    assert not same([1.0], [1.0, 1.0])


def test_the_first_difference_by_name_is_told():
    saved, run = {"b": 1, "c": 1, "a": [1.0]}, {"c": 2, "b": 2, "a": [1.001]}
    assert difference(saved, run) == "its b is 1, not 2"
    assert difference(saved, run | {"b": 1}) == "its c is 1, not 2"
    assert difference(saved, run | {"b": 1, "c": 1}) is None


CHANGES = {
    "value": [("a", torch.tensor([1.0, 3.0]))],
    "name": [("b", torch.tensor([1.0, 2.0]))],
    "dtype": [("a", torch.tensor([1.0, 2.0]).double())],
    "shape": [("a", torch.tensor([[1.0, 2.0]]))],
    "order": [("b", torch.zeros(1)), ("a", torch.tensor([1.0, 2.0]))],
    "none": [],
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_digest_tells_what_differs(change):
    one = [("a", torch.tensor([1.0, 2.0]))]
    assert digest(one) == digest([(name, value.clone()) for name, value in one])
    assert digest(one) != digest(CHANGES[change])


def test_a_digest_does_not_depend_on_how_a_tensor_is_stored_or_cut(monkeypatch):
    matrix = torch.randn(6, 5)
    whole = digest([("a", matrix)])
    assert digest([("a", matrix.T.contiguous().T)]) == whole
    monkeypatch.setattr(fingerprints, "CHUNK", 7)
    assert digest([("a", matrix)]) == whole
