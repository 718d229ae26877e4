import errno

import pytest
import torch

from msfp import InputError
from msfp.support.paging import SMALL, PageFolder

NUMBERS = SMALL // 4


def tensors():
    torch.manual_seed(0)
    image = torch.randn(4, 32, 32, 16).to(memory_format=torch.channels_last)
    return {
        "vector": torch.randn(NUMBERS),
        "half": torch.randn(300, 300).bfloat16(),
        "codes": torch.randint(0, 255, (SMALL,), dtype=torch.uint8),
        "channels last": image,
        "parameter": torch.nn.Parameter(torch.randn(200, 200), requires_grad=False),
    }


@pytest.mark.parametrize("name", tensors())
def test_a_tensor_in_a_file_is_the_same(name, tmp_path):
    pages, x = PageFolder(tmp_path), tensors()[name]
    before, kind = x.clone(), type(x)
    assert pages.put(x)
    assert pages.holds(x)
    for _ in range(2):
        assert torch.equal(x, before)
        assert (x.stride(), type(x), x.dtype) == (before.stride(), kind, before.dtype)
        pages.drop(x)
    x.zero_()
    pages.drop(x)
    assert not x.any()
    assert pages.written == before.nbytes
    assert not list(tmp_path.iterdir())  # a file without a name


def test_what_is_small_or_has_other_users_stays_in_memory(tmp_path):
    pages, small, shared = PageFolder(tmp_path), torch.ones(NUMBERS - 1), torch.ones(NUMBERS)
    view = shared[1:]
    assert not pages.put(small)
    assert not pages.put(shared)
    assert not pages.put(view)
    view.zero_()
    assert shared.sum() == 1
    pages.drop(shared)  # does nothing to what is not in a file
    assert shared.sum() == 1
    assert pages.put(shared, view)  # all users of the memory
    view.add_(2)
    pages.drop(view)
    assert shared.sum() == 2 * NUMBERS - 1
    later = shared[2:]
    assert pages.put(shared, later)
    assert pages.holds(later)
    assert pages.written == shared.nbytes
    del view, later
    assert pages.put(shared)


def test_another_tensor_at_the_same_address_is_not_taken_for_one_in_a_file(tmp_path):
    pages, x = PageFolder(tmp_path), torch.ones(NUMBERS)
    pages.put(x)
    x.data = torch.ones(NUMBERS)
    assert not pages.holds(x)
    pages.drop(x)
    assert x.sum() == NUMBERS


def test_casts_inside_a_block_are_in_files(tmp_path):
    pages, x = PageFolder(tmp_path), torch.arange(2.0 * NUMBERS)
    with pages.taking_casts():
        layer = torch.nn.Linear(200, 400).bfloat16()
        y = x.half()
    assert torch.equal(y, x.half())
    assert pages.written == 2 * (len(x) + layer.weight.numel())
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_one_sentence_and_leaves_the_tensor_as_it_was(tmp_path, monkeypatch):
    def full(*_args, **_words):
        raise OSError(errno.ENOSPC, "No space left on device")

    pages, x = PageFolder(tmp_path), torch.ones(NUMBERS)
    monkeypatch.setattr("msfp.support.paging.torch.from_file", full)
    with pytest.raises(InputError, match=r"cannot hold 65,536 bytes more .* No space left"):
        pages.put(x)
    assert x.sum() == NUMBERS
    assert not pages.holds(x)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_tensors_of_other_devices_stay_there(tmp_path):
    assert not PageFolder(tmp_path).put(torch.ones(NUMBERS, device="cuda"))
