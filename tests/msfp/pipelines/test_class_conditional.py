import pytest
import torch
from external import CLASSES, ldm_class, ldm_vq
from families import conditional_unet

from msfp import (
    InputError,
    QuantizationConfig,
    Sampler,
    load,
    pack,
    quantize,
    record_trajectories,
    save,
)
from msfp.pipelines.class_conditional import ClassConditionalLDMPipeline, pipeline_class


def images(pipe, labels=(1, 2), **options):
    generator = torch.Generator().manual_seed(0)
    pipe.set_progress_bar_config(disable=True)
    return pipe(labels, generator=generator, num_inference_steps=2, output_type="np",
                **options).images  # fmt: skip


def test_labels_are_looked_up_and_none_is_the_last_class():
    pipe = ldm_class()
    sampler = Sampler(steps=2, batch=2, conditions=(1, 3), guidance_scale=2.0)
    path = record_trajectories(pipe, calls=sampler.calls(2, seed=0))
    rows = path.conditions["encoder_hidden_states"].values
    assert rows.shape == (1, 4, 1, CLASSES + 1)
    assert rows[0, :, 0].argmax(1).tolist() == [1, 3, CLASSES, CLASSES]
    layer = pipe.unet.encoder_hid_proj
    table = layer.weight.T + layer.bias
    assert torch.allclose(layer(rows[0, :, 0]), table[[1, 3, CLASSES, CLASSES]])


def test_guidance_moves_away_from_the_unconditional_branch():
    pipe = ldm_class()
    sampler = Sampler(steps=1, batch=1, conditions=(1,), guidance_scale=4.0)
    conditional, none = record_trajectories(pipe, calls=sampler.calls(1, 0)).predictions[0]
    guided = []
    step = pipe.scheduler.step
    pipe.scheduler.step = lambda noise, *rest: guided.append(noise) or step(noise, *rest)
    sampler(pipe, 1, 0)
    assert torch.allclose(guided[0][0], none + 4 * (conditional - none), atol=1e-5)


def test_without_guidance_the_network_is_called_once():
    pipe = ldm_class()
    sampler = Sampler(steps=2, batch=2, conditions=(1, 3), guidance_scale=1.0)
    assert record_trajectories(pipe, calls=sampler.calls(2, 0)).samples.shape[1] == 2


def test_folders_in_both_precisions_are_loaded_by_their_names(tmp_path):
    pipe = ldm_class()
    pipe.save_pretrained(tmp_path / "plain")
    kind = pipeline_class(tmp_path / "plain")
    assert kind is ClassConditionalLDMPipeline
    again = kind.from_pretrained(tmp_path / "plain")
    assert (images(again) == images(pipe)).all()
    config = QuantizationConfig(activation_bits=None, refine=None, exclude=("encoder_hid_proj",))
    quantize(pipe, config)
    pack(pipe.unet)
    save(pipe, tmp_path / "packed")
    assert (images(load(tmp_path / "packed")) == images(pipe)).all()
    ldm_vq().save_pretrained(tmp_path / "other")
    assert pipeline_class(tmp_path / "other") is not ClassConditionalLDMPipeline


def test_what_has_no_such_class_is_refused():
    with pytest.raises(InputError, match="must lie in 0 to 3, not"):
        images(ldm_class(), labels=[CLASSES])
    part = ldm_class()
    with pytest.raises(InputError, match="encoder_hid_dim_type must be 'text_proj', not None"):
        ClassConditionalLDMPipeline(part.vqvae, conditional_unet(), part.scheduler)
