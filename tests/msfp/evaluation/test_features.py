import pytest
import torch

from msfp import InputError
from msfp.evaluation.features import checked_features, feature_network, pixels
from msfp.experiments.reference.features import digit_classifier, photograph_classifier


def test_pixels_are_the_means_of_patches():
    images = torch.arange(16.0).view(1, 1, 4, 4).repeat_interleave(4, 2).repeat_interleave(4, 3)
    features = feature_network("pixels")(images)
    assert features.shape == (1, 64)
    assert features[0, ::2].tolist() == features[0, 1::2].tolist()
    assert set(features[0].tolist()) == set(range(16))


def test_digits_are_the_features_of_the_classifier():
    images = torch.rand(3, 1, 16, 16)
    expected = digit_classifier().features(images * 2 - 1)
    assert torch.equal(feature_network("digits")(images), expected)


def test_photographs_are_the_features_of_their_classifier():
    images = torch.rand(2, 3, 32, 32)
    expected = photograph_classifier().features(images * 2 - 1)
    assert torch.equal(feature_network("photographs")(images), expected)


def test_digits_in_colour_are_those_of_the_mean_of_the_channels():
    images = torch.rand(3, 3, 16, 16)
    features = feature_network("digits")
    assert torch.equal(features(images), features(images.mean(1, keepdim=True)))


def test_a_torchscript_file_and_a_function_of_a_module_are_loaded(tmp_path, monkeypatch):
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 5))
    torch.jit.script(network).save(tmp_path / "network.pt")
    (tmp_path / "my_features.py").write_text("def mean(images):\n    return images.mean((2, 3))\n")
    monkeypatch.chdir(tmp_path)
    images = torch.rand(2, 3, 2, 2)
    assert torch.equal(feature_network("network.pt")(images), network(images))
    assert torch.equal(feature_network("my_features:mean")(images), images.mean((2, 3)))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("inception", "must be pixels, digits, photographs, a TorchScript file or module:function"),
        ("nowhere_at_all:f", "cannot be imported"),
        ("math:nothing", "cannot be imported"),
        ("math:pi", "must be a function, not a float"),
        (__file__, "is not a TorchScript file"),
    ],
)
def test_what_gives_no_features_is_refused(name, message):
    with pytest.raises(InputError, match=message):
        feature_network(name)


def test_networks_that_do_not_fit_are_refused():
    images = torch.rand(3, 3, 16, 16)
    assert checked_features(pixels, images).shape == (3, 192)
    with pytest.raises(InputError, match=r"cannot be computed of images of shape \(3, 3, 16, 16\)"):
        checked_features(torch.nn.Conv2d(1, 4, 3), images)
    with pytest.raises(InputError, match=r"must have shape \(images, any\), not \(3, 1, 16\)"):
        checked_features(lambda x: x.mean((1, 2))[:, None], images)
