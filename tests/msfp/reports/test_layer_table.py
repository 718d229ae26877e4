import math

from fpformats import parse
from msfp.checkpoint.facts import LayerFacts, ProductFacts
from msfp.layers.formats import BlockFormats, LayerFormats
from msfp.reports.layer_table import COLUMNS, PRODUCT_COLUMNS, cells, product_cells
from msfp.search.summary import LayerSummary


def row_of(*facts):
    return dict(zip(COLUMNS, cells(LayerFacts(*facts)), strict=True))


def test_a_row_has_a_text_for_each_column():
    summary = LayerSummary(
        "a", "E2M1", 20.04, input_format="E2M2U", input_zero_point=-0.3, asymmetric=True,
        activation="SiLU", input_sqnr=22.5, input_choices={"E2M1": 18.0, "E2M2U": 22.5},
    )  # fmt: skip
    formats = LayerFormats(parse("E2M1"), parse("E2M2U"))
    assert row_of("a", formats, 1.5, 0.25, (-0.3, 1.45), -0.3, 128, summary) == {
        "layer": "a",
        "weights": "E2M1",
        "weights dB": "20.0",
        "inputs": "E2M2U",
        "sign": "unsigned",
        "zero point": "-0.300",
        "clip": "-0.3 to 1.45",
        "inputs dB": "22.5",
        "other sign dB": "18.0",
        "cost dB": "4.5",
        "reason": "SiLU",
        "product": "integers",
        "bytes": "128",
    }


def test_what_is_not_known_is_empty():
    unknown = math.nan, (math.nan, math.nan), None, 64, None
    row = row_of("a", LayerFormats(parse("E2M1")), 1.5, *unknown)
    assert {name for name, text in row.items() if text} == {
        "layer", "weights", "product", "bytes",
    }  # fmt: skip
    row = row_of("a", BlockFormats("NVFP4", "NVFP4"), 1.5, *unknown)
    assert (row["weights"], row["inputs"], row["sign"]) == ("NVFP4", "NVFP4", "signed")
    assert row["clip"] == row["zero point"] == ""


def test_a_row_of_products_has_a_text_for_each_column():
    facts = ProductFacts("attn.products.key", parse("E2M1"), 0.5, None, (-3.0, 3.0), 4)
    row = dict(zip(PRODUCT_COLUMNS, product_cells(facts), strict=True))
    assert row == {
        "operand": "attn.products.key",
        "format": "E2M1",
        "sign": "signed",
        "zero point": "",
        "clip": "-3 to 3",
        "bytes": "4",
    }
