from pathlib import Path

import pytest
from pages import script

PAGE = Path(__file__).parents[2] / "docs" / "large-models.md"


@pytest.mark.slow
def test_a_network_of_public_size_is_estimated_without_its_memory():
    module = script("estimate_large_models")
    name, parameters, file, *others = module.row("Stable Diffusion 1.5, 512x512")
    assert (name, parameters, file) == ("Stable Diffusion 1.5, 512x512", "0.86", "0.5")
    assert all(float(number) > 0 for number in others)


def test_the_page_has_the_table_of_every_network():
    module, page = script("estimate_large_models"), PAGE.read_text()
    assert all(f"| {name} |" in page for name in module.MODELS)
