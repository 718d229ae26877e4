import copy
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
from families import make
from tiny import tiny_pipeline

from msfp import InputError, reference_pipeline
from msfp.evaluation.fingerprint import pipeline_digest
from msfp.schedulers.samplers import use_sampler

DIGEST = """
from msfp import reference_pipeline
from msfp.evaluation.fingerprint import pipeline_digest
from msfp.schedulers.samplers import use_sampler

pipe = reference_pipeline()
use_sampler(pipe, "dpm++")
print(pipeline_digest(pipe))
"""


@pytest.mark.slow
def test_what_tells_pipelines_apart_is_equal_in_every_process():
    pipe = reference_pipeline()
    use_sampler(pipe, "dpm++")
    # Sets are in another order for another seed of hashes.
    seed = "0" if os.environ.get("PYTHONHASHSEED") != "0" else "1"
    told = subprocess.run(  # noqa: S603
        [sys.executable, "-c", DIGEST],
        env=os.environ | {"PYTHONHASHSEED": seed},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert told.strip() == pipeline_digest(pipe)


def test_samplers_and_weights_of_other_settings_are_told_apart():
    told = set()
    for change in (
        lambda _: None,
        lambda pipe: pipe.scheduler.register_to_config(clip_sample_range=2.0),
        lambda pipe: use_sampler(pipe, "plms"),
        lambda pipe: pipe.unet.conv_out.bias.data.add_(1),
    ):
        pipe = tiny_pipeline()
        change(pipe)
        told.add(pipeline_digest(pipe))
    assert len(told) == 4
    assert pipeline_digest(copy.deepcopy(tiny_pipeline())) in told
    with pytest.raises(InputError, match="state must be of pipelines in memory"):
        pipeline_digest(SimpleNamespace(components={"unet": make("unet").to("meta")}))
