import copy

import pytest
import torch

from msfp import InputError
from msfp.training.config import FinetuneConfig
from msfp.training.parameters import add_hubs, trained_parameters
from msfp.training.teacher import Teacher

ALL = torch.arange(8)


def change_what_is_trained(unet, names):
    for name, parameter in unet.named_parameters():
        if name in names:
            parameter.data.add_(0.01)


def test_it_gives_the_bits_of_the_full_precision_denoiser_however_long_the_other_trained(
    full, student, path
):
    unet = student.unet
    teacher = Teacher(unet)
    add_hubs(unet, FinetuneConfig(hub=2, rank=2), path.timesteps)
    names = trained_parameters(unet, FinetuneConfig().rates)
    teacher.keep(names)
    change_what_is_trained(unet, names)
    step = torch.full_like(ALL, 2)
    with torch.no_grad():
        quantized = path.predict(unet, step, ALL)
        expected = path.predict(full.unet, step, ALL)
        with teacher.active() as denoiser:
            assert torch.equal(path.predict(denoiser, step, ALL), expected)
        assert torch.equal(path.predict(unet, step, ALL), quantized)
    assert not torch.equal(quantized, expected)


def test_what_is_not_trained_is_shared(student):
    teacher = Teacher(student.unet)
    teacher.keep(trained_parameters(student.unet, FinetuneConfig().rates))
    kept = sum(value.numel() for value in teacher._kept.values())
    assert kept < 0.05 * sum(parameter.numel() for parameter in student.unet.parameters())


def test_an_original_gives_back_weights_that_were_changed_since(full, student, path):
    student.unet.conv_in.weight = torch.nn.Parameter(torch.zeros(8, 1, 3, 3))
    teacher = Teacher(student.unet, full.unet)
    step = torch.full_like(ALL, 1)
    with teacher.active() as denoiser:
        assert torch.equal(path.predict(denoiser, step, ALL), path.predict(full.unet, step, ALL))


def test_an_error_inside_leaves_the_denoiser_quantizing(student):
    with pytest.raises(RuntimeError), Teacher(student.unet).active():
        raise RuntimeError
    assert student.unet.conv_in.quantizing


def test_a_teacher_of_another_architecture_is_refused_by_the_parameter_that_differs(full, student):
    wider = copy.deepcopy(full.unet)
    wider.conv_in = torch.nn.Conv2d(1, 9, 3)
    with pytest.raises(InputError, match=r"^original .*: conv_in.weight .* shape \(9, 1, 3, 3\)"):
        Teacher(student.unet, wider)
    more = copy.deepcopy(full.unet)
    more.extra = torch.nn.Linear(1, 1)
    with pytest.raises(InputError, match=r"^original .* only its UNet2DModel has extra\.weight"):
        Teacher(student.unet, more)
