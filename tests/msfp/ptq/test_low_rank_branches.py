import copy

import pytest
import torch

from msfp import InputError
from msfp.checkpoint.integrity import BRANCH
from msfp.config import RefinementConfig
from msfp.layers.base import quantized_layers
from msfp.ptq.low_rank_branches import add_branches
from msfp.ptq.refinement import refine
from msfp.ptq.side_by_side import visit_layers


def prediction(denoiser, trajectories):
    with torch.no_grad():
        return denoiser(trajectories.samples[1, :4], trajectories.timesteps[1]).sample


def test_branches_leave_the_model_as_it_is_in_full_precision(quantized, reference, trajectories):
    denoiser = quantized()[0].unet
    names = add_branches(denoiser, 4)
    assert "conv_in" not in names
    assert "conv_out" not in names
    assert len(names) == 63
    for name in names:
        layer = denoiser.get_submodule(name)
        whole = layer.weight.flatten(1) + layer.branch_up @ layer.branch_down
        torch.testing.assert_close(
            whole.view_as(layer.weight), reference.unet.get_submodule(name).weight
        )
        assert torch.linalg.matrix_norm(layer.weight.flatten(1), 2) < torch.linalg.matrix_norm(
            whole, 2
        )
    row = torch.arange(4)
    predictions = visit_layers(denoiser, trajectories, row * 0 + 1, row, lambda _visit: None)
    torch.testing.assert_close(
        predictions[:4], prediction(reference.unet, trajectories), rtol=1e-3, atol=1e-3
    )


def test_branches_lower_the_error_before_and_after_refinement(quantized, trajectories):
    errors = []
    some = {"include": ["down_blocks"], "first_layers": [], "last_layers": []}
    for rank, refined in ((0, False), (4, False), (0, True), (4, True)):
        denoiser = quantized(**some)[0].unet
        if refined:
            config = RefinementConfig(samples=12, positions=1024, branch_rank=rank)
            refine(denoiser, config, trajectories=trajectories)
        elif rank:
            add_branches(denoiser, rank)
        moved = prediction(denoiser, trajectories) - trajectories.predictions[1, :4]
        errors.append(moved.square().mean().item())
    assert errors[1] < 0.8 * errors[0]
    assert errors[3] < 0.8 * errors[2]


def test_branches_are_in_the_state_of_the_denoiser_and_survive_a_copy(quantized, trajectories):
    denoiser = quantized()[0].unet
    add_branches(denoiser, 2)
    assert sum(key.endswith(BRANCH) for key in denoiser.state_dict()) == 2 * 63
    twin = copy.deepcopy(denoiser)
    with torch.no_grad():
        for layer in quantized_layers(twin).values():
            if layer.branch_up is not None:
                layer.branch_up.zero_()
    assert not torch.equal(prediction(twin, trajectories), prediction(denoiser, trajectories))


def test_layers_too_small_for_the_rank_get_no_branch(quantized):
    denoiser = quantized()[0].unet
    names = add_branches(denoiser, 60)
    assert "down_blocks.0.resnets.0.conv1" not in names
    assert "up_blocks.0.resnets.0.conv1" in names


def test_a_second_set_of_branches_a_bad_rank_and_a_plain_denoiser_are_refused(quantized, reference):
    denoiser = quantized()[0].unet
    with pytest.raises(InputError, match="rank must be between 1 and 256, not 0"):
        add_branches(denoiser, 0)
    add_branches(denoiser, 1)
    with pytest.raises(InputError, match="has low-rank branches already"):
        add_branches(denoiser, 1)
    with pytest.raises(InputError, match="must have been quantized"):
        add_branches(reference.unet, 1)
