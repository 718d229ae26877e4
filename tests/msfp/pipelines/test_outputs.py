"""Images, videos and sounds as images."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from msfp import InputError
from msfp.pipelines.outputs import as_images, spectrograms

GENERATOR = np.random.default_rng(0)


def output(**fields):
    """An output of a pipeline with the fields given."""
    return SimpleNamespace(items=fields.items)


def picture(height=4, width=6):
    return Image.fromarray(GENERATOR.integers(0, 256, (height, width, 3), np.uint8))


def test_images_of_every_form_are_the_same_images():
    pictures = [picture(), picture()]
    array = np.stack([np.asarray(each, np.float32) / 255 for each in pictures])
    found = as_images(output(images=array))
    assert found.shape == (2, 3, 4, 6)
    assert torch.equal(found[1, 2], torch.from_numpy(array[1, :, :, 2]))
    for form in (pictures, list(array), torch.from_numpy(array).permute(0, 3, 1, 2)):
        assert torch.equal(as_images(output(images=form)), found)


def test_images_without_colours_have_one_channel():
    assert as_images(output(images=np.zeros((2, 4, 6)))).shape == (2, 1, 4, 6)
    assert as_images(output(prediction=np.zeros((2, 4, 6, 1)))).shape == (2, 1, 4, 6)


def test_frames_of_a_video_stand_side_by_side():
    frames = GENERATOR.random((2, 3, 4, 6, 3), np.float32)
    found = as_images(output(frames=frames))
    assert found.shape == (2, 3, 4, 18)
    assert torch.equal(found[1, 0, :, 6:12], torch.from_numpy(frames[1, 1, :, :, 0]))
    films = [[picture(), picture()], [picture(), picture()]]
    assert as_images(output(frames=films)).shape == (2, 3, 4, 12)
    assert as_images(output(frames=torch.from_numpy(frames).permute(0, 1, 4, 2, 3))).equal(found)


def test_a_sound_is_its_spectrogram():
    time = torch.arange(8192) / 1024
    tone = 0.1 * torch.sin(2 * torch.pi * 100 * time)
    found = as_images(output(audios=torch.stack([tone, torch.zeros_like(tone)]).numpy()))
    assert found.shape == (2, 1, 513, 33)
    assert found[0, 0, :, 16].argmax() == 100
    assert found[0].max() == pytest.approx(1 - 20 / 80, abs=0.01)  # 20 dB below full scale
    assert not found[1].any()


def test_channels_of_a_sound_stand_one_below_the_other_and_short_sounds_have_short_windows():
    assert spectrograms(torch.zeros(2, 2, 64)).shape == (2, 1, 2 * 17, 9)


def test_results_that_are_no_pictures_are_refused():
    for fields in ({"image_embeds": np.zeros((2, 8))}, {"other": 3}, {}):
        with pytest.raises(InputError, match="must make images, videos or sounds"):
            as_images(output(**fields))
