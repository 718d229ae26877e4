import families
import pytest
import torch

from msfp import record_trajectories
from msfp.pipelines.denoiser import denoiser_of


@pytest.mark.parametrize("family", families.FAMILIES)
def test_a_denoiser_of_any_family_repeats_its_outputs_in_any_order(family, tmp_path):
    pipe = families.pipeline(family, tmp_path)
    denoiser = denoiser_of(pipe)
    paths = record_trajectories(pipe, calls=[families.images, families.images])
    steps, rows = paths.samples.shape[:2]
    generator = torch.Generator().manual_seed(0)
    step = torch.randint(steps, (2 * rows,), generator=generator)
    row = torch.randint(rows, (2 * rows,), generator=generator)
    with torch.no_grad():
        again = paths.predict(denoiser, step, row)
    torch.testing.assert_close(again, paths.predictions[step, row], rtol=1e-3, atol=1e-4)
