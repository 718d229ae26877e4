import re

import pytest

from msfp.checkpoint.inspection import inspect_layers
from msfp.evaluation.comparison import compare
from msfp.evaluation.features import pixels
from msfp.layers.selection import quantizable_layers
from msfp.reports.model_page import ModelReport, findings, input_distribution


@pytest.fixture(scope="module")
def pair(reference, packed):
    """A packed pipeline and the weights of the full-precision one."""
    layers = quantizable_layers(reference.unet)
    return packed[0], {name: layer.weight.detach() for name, layer in layers.items()}


def test_the_page_carries_all_that_it_shows(pair, reference, sampler):
    pipe, weights = pair
    found = compare(pipe, original=reference, sampler=sampler, count=4, seed=0, features=pixels)
    page = ModelReport("W4A4 <b>", pipe.unet, found.inputs, weights, found).html()
    # Pairs of images, errors by timestep and layer, inputs and weights of the four worst layers.
    assert page.count("data:image/png;base64,") == 3 + 2 * 4
    assert not re.search(r'(src|href)="(?!data:)|https?:|<b>|@import', page)
    assert page.count("<script>") == 1
    worst = sorted(found.layers, key=found.layers.get)[:4]
    for name in worst:
        assert f"The weights of {name}" in page
    assert "Frechet distance (pixels)" in page
    assert page.index("Images from equal noise") < page.index("Error by timestep")


def test_a_page_without_a_comparison_or_calibration_shows_the_rest(pair):
    pipe, weights = pair
    page = ModelReport("W4A4", pipe.unet, {}, weights).html()
    assert page.count("data:image/png;base64,") == 1 + 4
    assert "Error by timestep" not in page
    for layer in weights:
        assert f"<td>{layer}</td>" in page


def test_the_input_of_an_unsigned_layer_is_drawn_over_both_signs(pair, calibration):
    facts = inspect_layers(pair[0])
    for sign, grids in (("unsigned", 2), ("signed", 1)):
        each = next(each for each in facts if each.sign == sign)
        picture = input_distribution(each, calibration.inputs[each.layer])
        assert len(picture.axes[0].texts) == grids
        assert picture.axes[0].texts[-1].get_text().startswith(str(each.input))


def test_findings_count_layers_and_what_unsigned_inputs_gained(pair):
    first, executed, *floats, second = findings(inspect_layers(pair[0]), None)
    assert first.startswith("65 layers, ")
    assert "63 at 4 bits, 2 at 8 bits; inputs: 35 unsigned." in first
    assert executed.endswith(" of 65 layers run on integer units, where there are any.")
    assert all("which is more than a byte" in each for each in floats)
    assert re.search(r"would have cost [2-6]\.\d dB at the median", second)
