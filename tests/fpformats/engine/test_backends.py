import shutil

import pytest

import fpformats
from fpformats.engine import backends
from fpformats.kernels import native


@pytest.mark.skipif(not (shutil.which("c++") or shutil.which("g++")), reason="no compiler is here")
def test_with_a_compiler_the_kernels_are_compiled():
    assert "baseline" in backends.available()


def test_every_kind_of_input_has_something_that_computes(capsys):
    fpformats.show_backends()
    shown = capsys.readouterr().out.splitlines()
    assert len(shown) == len(backends.backends())
    assert shown[0].startswith("NumPy arrays, torch tensors in host memory: ")


def test_a_way_is_used_for_a_while_and_then_no_more():
    before = backends.backends()[0].runs
    for name in backends.available():
        with backends.using(name), pytest.raises(ZeroDivisionError), backends.using("portable"):
            raise ZeroDivisionError
    assert backends.backends()[0].runs == before


def test_an_unknown_way_is_refused():
    with pytest.raises(ValueError, match="name is 'sse9'; allowed here: "), backends.using("sse9"):
        pass


@pytest.mark.skipif("baseline" not in backends.available(), reason="no kernels are compiled")
def test_kernels_that_count_modes_in_another_order_are_not_used(monkeypatch):
    monkeypatch.setattr(native, "MODES", native.MODES[::-1])
    with pytest.raises(ImportError, match="the compiled kernels count rounding modes as"):
        native._load()
