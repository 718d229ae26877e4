import json

import pytest

from msfp import InputError
from msfp.pipelines.packages import check_packages, needed_packages, variant_of


def folder_with(folder, **components):
    index = {"_class_name": "StableDiffusionPipeline", **components}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def test_packages_are_those_of_the_components(tmp_path):
    folder = folder_with(
        tmp_path,
        unet=["diffusers", "UNet2DConditionModel"],
        text_encoder=["transformers", "CLIPTextModel"],
        safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"],
        feature_extractor=[None, None],
        requires_safety_checker=False,
    )
    assert needed_packages(folder) == {
        "text_encoder": "transformers",
        "safety_checker": "transformers",
    }
    check_packages(folder)


def test_a_package_that_is_missing_is_named_with_its_component(tmp_path):
    folder = folder_with(tmp_path, tokenizer=["no_such_package.tokens", "Tokenizer"])
    message = "needs the package no_such_package for its tokenizer: pip install no-such-package"
    with pytest.raises(InputError, match=message):
        check_packages(folder)


@pytest.mark.parametrize("text", ["{", "[]"])
def test_an_index_that_is_none_is_refused(tmp_path, text):
    (tmp_path / "model_index.json").write_text(text)
    with pytest.raises(InputError, match=r"model_index\.json cannot be read"):
        check_packages(tmp_path)


@pytest.mark.parametrize(
    ("files", "variant"),
    [
        (["unet/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.bin"], None),
        (["unet/a.fp16.safetensors", "vae/b.safetensors"], "fp16"),
        (["unet/a.fp16.safetensors", "unet/a.safetensors"], None),
        (["unet/a.bf16-00001-of-00002.safetensors", "unet/a.safetensors.index.bf16.json"], "bf16"),
        (["unet/a-00001-of-00002.safetensors", "unet/config.json"], None),
    ],
)
def test_the_variant_of_a_folder_is_that_of_its_only_weights(files, variant, tmp_path):
    for file in files:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).touch()
    assert variant_of(tmp_path) == variant
