import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from msfp import InputError
from msfp.support.image_files import PngFolder, image_files, read_batches, read_image


def saved(file, pixels):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(pixels, np.uint8)).save(file)
    return file


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def test_an_image_of_the_size_is_read_to_the_bit(tmp_path):
    pixels = noise(16, 16, 3)
    image = read_image(saved(tmp_path / "a.png", pixels), 16)
    assert image.dtype == torch.float32
    assert np.array_equal((image * 255).permute(1, 2, 0).double(), pixels.astype(float))


def test_the_central_square_is_taken_first(tmp_path):
    pixels = noise(10, 17, 3)
    image = read_image(saved(tmp_path / "a.png", pixels), 10)
    assert torch.equal(image, read_image(saved(tmp_path / "b.png", pixels[:, 3:13]), 10))


@pytest.mark.parametrize("resize", ["bicubic", "lanczos"])
def test_a_constant_image_stays_constant_and_nothing_leaves_the_range(tmp_path, resize):
    grey = read_image(saved(tmp_path / "a.png", np.full((40, 40, 3), 77)), 9, resize)
    assert (grey * 255 - 77).abs().max() < 1e-4
    checks = np.kron(np.indices((8, 8)).sum(0) % 2, np.ones((3, 3)))[..., None].repeat(3, 2) * 255
    image = read_image(saved(tmp_path / "b.png", checks), 13, resize)
    assert image.min() == 0
    assert image.max() == 1


def test_bicubic_is_the_antialiased_filter_of_torch_without_rounding(tmp_path):
    pixels = noise(64, 64, 3)
    image = read_image(saved(tmp_path / "a.png", pixels), 20) * 255
    plain = torch.from_numpy(pixels).permute(2, 0, 1)[None].double()
    expected = F.interpolate(plain, (20, 20), mode="bicubic", antialias=True)[0].clamp(0, 255)
    assert (image - expected).abs().max() < 1e-3
    assert (image - image.round()).abs().max() > 0.4


def test_grey_and_transparent_images_become_rgb(tmp_path):
    grey = read_image(saved(tmp_path / "a.png", noise(8, 8)), 8)
    assert torch.equal(grey[0], grey[2])
    assert read_image(saved(tmp_path / "b.png", noise(8, 8, 4)), 8).shape == (3, 8, 8)


def test_files_are_found_in_the_order_of_their_paths(tmp_path):
    for name in ("b/1.PNG", "a/2.jpg", "a/10.png", "z.webp"):
        saved(tmp_path / name, noise(4, 4, 3))
    (tmp_path / "a" / "notes.txt").write_text("none")
    names = [file.relative_to(tmp_path).as_posix() for file in image_files(tmp_path)]
    assert names == ["a/10.png", "a/2.jpg", "b/1.PNG", "z.webp"]


def test_batches_hold_the_images_in_the_order_of_their_files(tmp_path):
    for number in range(70):
        saved(tmp_path / f"{number:03}.png", np.full((4, 4, 3), number))
    batches = list(read_batches(image_files(tmp_path), 4, "bicubic"))
    assert [len(batch) for batch in batches] == [64, 6]
    assert (torch.cat(batches)[:, 0, 0, 0] * 255).round().tolist() == list(range(70))


def test_what_is_no_image_is_named(tmp_path):
    (tmp_path / "a.png").write_text("no image")
    with pytest.raises(InputError, match=r"image .*a\.png cannot be read"):
        read_image(tmp_path / "a.png", 8)
    with pytest.raises(InputError, match=r"must hold at least 2 files of .*, not 1"):
        image_files(tmp_path)
    with pytest.raises(InputError, match="is not a folder"):
        image_files(tmp_path / "a.png")


def test_png_files_hold_the_nearest_of_256_levels(tmp_path):
    images = torch.rand(3, 3, 5, 5)
    PngFolder(tmp_path / "out", {}).write(images, 7)
    again = torch.stack([read_image(tmp_path / "out" / f"00000{n}.png", 5) for n in (7, 8, 9)])
    assert ((again - images) * 255).abs().max() <= 0.5 + 1e-4
    PngFolder(tmp_path / "grey", {}).write(images[:, :1], 0)
    assert Image.open(tmp_path / "grey" / "000000.png").mode == "L"


def test_a_folder_of_png_files_resumes_with_its_own_settings_alone(tmp_path):
    folder = PngFolder(tmp_path / "out", {"seed": 1})
    folder.write(torch.rand(2, 1, 4, 4), 0)
    again = PngFolder(tmp_path / "out", {"seed": 1})
    assert again.has(range(2))
    assert not again.has(range(3))
    with pytest.raises(InputError, match=r"images of other settings; see out\.json"):
        PngFolder(tmp_path / "out", {"seed": 2})
    saved(tmp_path / "mine" / "a.png", noise(4, 4, 3))
    with pytest.raises(InputError, match="must be a new folder, or a folder to resume"):
        PngFolder(tmp_path / "mine", {})


def test_images_of_more_than_8_bits_are_refused(tmp_path):
    Image.fromarray(np.full((8, 8), 60000, np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(InputError, match="must have 8 bits for each colour; its mode is I;16"):
        read_image(tmp_path / "deep.png", 8)
