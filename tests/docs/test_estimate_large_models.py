from pathlib import Path

import pytest
from pages import script

PAGE = Path(__file__).parents[2] / "docs" / "large-models.md"


@pytest.mark.slow
def test_the_row_of_a_network_is_made_without_its_memory_and_is_that_of_the_page():
    cells = script("estimate_large_models").row("Stable Diffusion 1.5, 512x512")
    assert cells[1:3] == ["0.86", "0.5"]
    assert f"| {' | '.join(cells)} |" in PAGE.read_text()


def test_the_page_has_the_table_of_every_network():
    module, page = script("estimate_large_models"), PAGE.read_text()
    assert all(f"| {name} |" in page for name in module.MODELS)
