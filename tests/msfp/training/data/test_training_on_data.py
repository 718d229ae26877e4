import pytest
from tiny import SAMPLER

from msfp import FinetuneConfig, data_trajectories, finetune
from msfp.experiments.reference.digits import digits


@pytest.mark.slow
def test_training_on_noised_images_lowers_the_error_on_other_images(full, student):
    images = digits()[0][:, :, ::2, ::2]
    path = data_trajectories(full, calls=SAMPLER.calls(8, seed=5), images=images[:8])
    held_out = data_trajectories(full, calls=SAMPLER.calls(8, seed=5), images=images[8:16], seed=1)
    config = FinetuneConfig(steps=40, batch=8, rank=4, evaluate_every=40)
    history = finetune(student.unet, config, trajectories=path, held_out=held_out)
    assert history.errors[40] < 0.9 * history.errors[0]


def test_noised_images_can_measure_what_was_trained_on_a_sampler_s_path(full, path, student):
    images = digits()[0][:, :, ::2, ::2]
    held_out = data_trajectories(full, calls=SAMPLER.calls(8, seed=5), images=images[:8])
    config = FinetuneConfig(steps=4, batch=8, rank=4, evaluate_every=4)
    history = finetune(student.unet, config, trajectories=path, held_out=held_out)
    assert list(history.errors) == [0, 4]
