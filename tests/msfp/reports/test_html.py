import numpy as np
import torch

from fpformats import E2M1, E2M2U, Histogram
from msfp.reports import figures, html


def test_text_is_escaped_and_the_page_stands_alone():
    picture = html.png(figures.error_points(["a", "b"], [0.1, 0.2], "error"))
    page = html.page(
        "W4A4 <digits>",
        [("Section", [html.table(["a", "b"], [["<b>", "1"]]), html.image(picture, "a & b")])],
    )
    assert "<title>W4A4 &lt;digits&gt;</title>" in page
    assert "<td>&lt;b&gt;</td>" in page
    assert "a &amp; b" in page
    assert "http" not in page


def test_tiles_are_one_pixel_apart_in_reading_order():
    images = torch.stack([torch.full((1, 2, 2), value) for value in (0.1, 0.2, 0.3)])
    canvas = figures.tiled(images, columns=2)
    assert canvas.shape == (5, 5, 1)
    corners = [canvas[0, 0, 0], canvas[0, 3, 0], canvas[3, 0, 0]]
    np.testing.assert_allclose(corners, [0.1, 0.2, 0.3])
    assert canvas[2, 0, 0] == canvas[0, 2, 0] == canvas[4, 4, 0] == 1


def test_pictures_of_grey_and_colour_images_are_written(tmp_path):
    for channels in (1, 3):
        file = tmp_path / f"{channels}.png"
        figures.save_image_grid(torch.rand(5, channels, 4, 4), file)
        assert file.read_bytes().startswith(b"\x89PNG")


def test_the_distribution_names_how_many_values_of_each_grid_are_in_view():
    inputs = Histogram()
    inputs.update(np.linspace(-0.25, 2.0, 1000, dtype=np.float32))
    grids = [("signed", E2M1, 0.5, 0.0), ("unsigned", E2M2U, 2.25 / 7, -0.25)]
    picture = figures.distribution_with_grids(inputs, grids, "input")
    texts = [text.get_text() for text in picture.axes[0].texts]
    assert texts == ["signed: 8 of 15 values in view", "unsigned: 16 of 16 values in view"]
