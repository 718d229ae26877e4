from types import SimpleNamespace

import pytest
import torch
from families import FAMILIES, make, pipeline
from torch import nn

from msfp import InputError
from msfp.pipelines.denoiser import (
    denoiser_name,
    denoiser_of,
    timestep_name,
    timestep_of,
)


def test_a_network_is_its_own_denoiser():
    network = nn.Linear(4, 4)
    assert denoiser_of(network) is network


@pytest.mark.parametrize("family", ["unet", "dit"])
def test_the_denoiser_of_a_pipeline_is_its_unet_or_transformer(family, tmp_path):
    pipe = pipeline(family, tmp_path)
    assert denoiser_name(pipe) == {"unet": "unet", "dit": "transformer"}[family]
    assert type(denoiser_of(pipe)) is type(make(family))


def test_what_has_no_denoiser_is_refused():
    pipe = SimpleNamespace(components={"vae": nn.Linear(1, 1), "unet": None})
    with pytest.raises(InputError, match="has no denoiser, such as a unet"):
        denoiser_of(pipe)
    with pytest.raises(InputError, match="must be a pipeline of diffusers or its denoiser, not in"):
        denoiser_of(3)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_denoiser_of_any_family_takes_a_timestep(family):
    assert timestep_name(make(family)) == "timestep"


def test_a_timestep_is_found_by_place_or_by_name_and_its_absence_is_refused():
    class Denoiser(nn.Module):
        def forward(self, x, timestep=None):
            return x if timestep is None else x + timestep

    denoiser, x = Denoiser(), torch.ones(2, 1)
    assert timestep_of(denoiser, (x, 5), {}).tolist() == [5]
    assert timestep_of(denoiser, (x,), {"timestep": torch.tensor([5, 3])}).tolist() == [5, 3]
    assert timestep_name(nn.Linear(1, 1)) is None
    with pytest.raises(InputError, match="the forward of Denoiser must be given a timestep"):
        timestep_of(denoiser, (x,), {})
