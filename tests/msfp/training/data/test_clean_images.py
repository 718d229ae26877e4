import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny
from external import ldm_class
from families import pipeline
from PIL import Image

from msfp import InputError, data_trajectories
from msfp.support.image_files import image_files, read_image
from msfp.training.data.clean_images import chosen_files, clean_images

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
    done = []
    images = clean_images(
        grey_pipeline(tmp_path), image_files(folder), lambda *told: done.append(told)
    )
    assert images.shape == (5, 1, 8, 8)
    expected = torch.tensor(GREY) / 127.5 - 1
    assert torch.allclose(images, expected.view(5, 1, 1, 1).expand(5, 1, 8, 8), atol=1e-6)
    assert done == [("reading images", count, 5) for count in range(1, 6)]


def stems(folder, *arguments):
    return "".join(file.stem for file in chosen_files(folder, *arguments))


def test_few_of_many_files_are_spread_over_them(folder):
    assert stems(folder, 2) == "02"
    assert stems(folder, 9) == "01234"


def test_files_take_conditions_in_turn_and_each_always_has_the_same(folder):
    assert stems(folder, 2, 3) == "01"
    assert stems(folder, 4, 3) == "012"
    assert stems(folder, 9, 2) == "0123"  # so that the fifth of nine is the first again
    with pytest.raises(InputError, match="an image for each of the 6 prompts or labels, not 5"):
        chosen_files(folder, 9, 6)


def test_colours_are_kept_or_made_their_luminance(colour, tmp_path):
    files = image_files(colour)
    kept = clean_images(pipeline("unet", tmp_path), files)
    assert torch.equal(kept[1], 2 * read_image(colour / "colour1.png", 8) - 1)
    grey = clean_images(grey_pipeline(tmp_path), files)
    luminance = np.asarray(Image.open(colour / "colour1.png").convert("L"), np.float32)
    assert (grey[1, 0] - (torch.tensor(luminance) / 127.5 - 1)).abs().max() < 1.01 / 127.5


def latent_mean(pipe, file):
    size = 2 * pipe.unet.config.sample_size
    with torch.no_grad():
        image = 2 * read_image(file, size)[None] - 1
        return pipe.vae.float().encode(image).latent_dist.mean


def test_latents_are_the_autoencoder_s_shifted_and_scaled(colour, tmp_path):
    pipe = pipeline("conditional_unet", tmp_path)
    pipe.vae.register_to_config(shift_factor=0.25, scaling_factor=0.5)
    latents = clean_images(pipe, image_files(colour))
    expected = (latent_mean(pipe, colour / "colour0.png") - 0.25) * 0.5
    assert torch.equal(latents[:1], expected)


def test_latents_are_normalised_by_channel_where_the_autoencoder_says_how(colour, tmp_path):
    pipe = pipeline("conditional_unet", tmp_path)
    numbers = {"latents_mean": [0.5, 0, 0, -1], "latents_std": [1, 2, 4, 8]}
    pipe.vae.register_to_config(scaling_factor=0.5, **numbers)
    latents = clean_images(pipe, image_files(colour))
    mean, deviation = (torch.tensor(each).view(4, 1, 1) for each in numbers.values())
    expected = (latent_mean(pipe, colour / "colour0.png") - mean) * 0.5 / deviation
    assert torch.allclose(latents[:1], expected)


def test_a_narrow_autoencoder_encodes_in_float32(colour, tmp_path):
    pipe = pipeline("conditional_unet", tmp_path)
    pipe.vae.half()
    latents = clean_images(pipe, image_files(colour))
    assert pipe.vae.dtype == torch.float16
    expected = latent_mean(pipe, colour / "colour0.png") * pipe.vae.config.scaling_factor
    assert torch.equal(latents[:1], expected)


def test_latents_of_a_text_pipeline_can_be_trained_on(colour, tmp_path):
    pipe = pipeline("conditional_unet", tmp_path)
    latents = clean_images(pipe, image_files(colour))

    def call(pipe):
        pipe("a", num_images_per_prompt=2, num_inference_steps=2, output_type="latent")

    path = data_trajectories(pipe, calls=call, images=latents)
    assert path.samples.shape[2:] == latents.shape[1:]


def test_latents_of_a_codebook_are_those_before_they_are_looked_up(colour):
    pipe = ldm_class()
    pipe.vqvae.register_to_config(scaling_factor=0.5)
    latents = clean_images(pipe, image_files(colour)[:1])
    size = 2 * pipe.unet.config.sample_size
    image = 2 * read_image(colour / "colour0.png", size)[None] - 1
    with torch.no_grad():
        expected = pipe.vqvae.config.scaling_factor * pipe.vqvae.encode(image).latents
    assert torch.equal(latents, expected)


def test_what_is_not_known_how_to_read_is_refused(colour, tmp_path):
    files = image_files(colour)
    with pytest.raises(InputError, match="square sample_size, and that of FluxTransformer2DModel"):
        clean_images(pipeline("flux", tmp_path), files)
    pipe = pipeline("conditional_unet", tmp_path)
    pipe.vae = AutoencoderTiny()
    with pytest.raises(InputError, match="by AutoencoderKL or VQModel, not by AutoencoderTiny"):
        clean_images(pipe, files)
