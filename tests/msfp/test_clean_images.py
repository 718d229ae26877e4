import numpy as np
import pytest
import torch
from external import ldm_class
from families import pipeline
from PIL import Image

from msfp import InputError, data_trajectories
from msfp.clean_images import clean_images
from msfp.image_folder import read_image

GREY = (10, 60, 110, 160, 210)


@pytest.fixture
def folder(tmp_path):
    """Images of one grey each, brighter and brighter by their names, and one in colour."""
    for index, grey in enumerate(GREY):
        Image.new("L", (40, 32), grey).save(tmp_path / f"{index}.png")
    return tmp_path


@pytest.fixture
def colour(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), np.uint8)
    for index, image in enumerate(pixels):
        Image.fromarray(image).save(tmp_path / f"colour{index}.png")
    return tmp_path


def grey_pipeline(folder):
    pipe = pipeline("unet", folder)
    pipe.unet.register_to_config(in_channels=1)
    return pipe


def test_pixels_have_the_size_and_range_that_the_denoiser_reads(folder, tmp_path):
    images = clean_images(grey_pipeline(tmp_path), folder, 5)
    assert images.shape == (5, 1, 8, 8)
    expected = torch.tensor(GREY) / 127.5 - 1
    assert torch.allclose(images, expected.view(5, 1, 1, 1).expand(5, 1, 8, 8), atol=1e-6)


def test_few_of_many_are_spread_over_them_or_the_first(folder, tmp_path):
    pipe, done = grey_pipeline(tmp_path), []
    spread = clean_images(pipe, folder, 2, progress=done.append)
    first = clean_images(pipe, folder, 2, in_order=True)
    shades = [((images[:, 0, 0, 0] + 1) * 127.5).round().tolist() for images in (spread, first)]
    assert shades == [[10, 110], [10, 60]]
    assert done == [1, 1]


def test_colours_are_kept_or_made_their_luminance(colour, tmp_path):
    pipe = pipeline("unet", tmp_path)
    channels = pipe.unet.config.in_channels
    kept = clean_images(pipe, colour, 2)
    assert torch.equal(kept[1], 2 * read_image(colour / "colour1.png", 8) - 1)
    assert channels == 3
    grey = clean_images(grey_pipeline(tmp_path), colour, 2)
    luminance = np.asarray(Image.open(colour / "colour1.png").convert("L"), np.float32)
    assert (grey[1, 0] - (torch.tensor(luminance) / 127.5 - 1)).abs().max() < 1.01 / 127.5


def test_latents_are_the_autoencoder_s_shifted_and_scaled(colour, tmp_path):
    pipe = pipeline("conditional_unet", tmp_path)
    pipe.vae.register_to_config(shift_factor=0.25, scaling_factor=0.5)
    latents = clean_images(pipe, colour, 2)
    size = 2 * pipe.unet.config.sample_size
    image = 2 * read_image(colour / "colour0.png", size)[None] - 1
    with torch.no_grad():
        expected = (pipe.vae.encode(image).latent_dist.mean - 0.25) * 0.5
    assert torch.equal(latents[:1], expected)


def test_latents_of_a_text_pipeline_can_be_trained_on(colour, tmp_path):
    pipe = pipeline("conditional_unet", tmp_path)
    latents = clean_images(pipe, colour, 2)

    def call(pipe):
        pipe("a", num_images_per_prompt=2, num_inference_steps=2, output_type="latent")

    path = data_trajectories(pipe, call, latents)
    assert path.samples.shape[2:] == latents.shape[1:]


def test_latents_of_a_codebook_are_those_before_they_are_looked_up(colour):
    pipe = ldm_class()
    pipe.vqvae.register_to_config(scaling_factor=0.5)
    latents = clean_images(pipe, colour, 1)
    size = 2 * pipe.unet.config.sample_size
    image = 2 * read_image(colour / "colour0.png", size)[None] - 1
    with torch.no_grad():
        expected = pipe.vqvae.config.scaling_factor * pipe.vqvae.encode(image).latents
    assert torch.equal(latents, expected)


def test_what_does_not_say_its_size_is_refused(folder, tmp_path):
    with pytest.raises(InputError, match="square sample_size, and that of FluxTransformer2DModel"):
        clean_images(pipeline("flux", tmp_path), folder, 2)
    with pytest.raises(InputError, match="is not a folder"):
        clean_images(grey_pipeline(tmp_path), folder / "absent", 2)
