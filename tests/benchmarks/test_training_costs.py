"""What a step of fine-tuning costs, against a plain float32 training step of the same denoiser.

pytest tests/benchmarks/test_training_costs.py --benchmark-enable -s
"""

import copy

import pytest
import torch
from race import race
from tiny import tiny_pipeline

from msfp import (
    FinetuneConfig,
    QuantizationConfig,
    Sampler,
    finetune,
    quantize,
    record_trajectories,
    reference_pipeline,
)

BATCH = 32
WAYS = {
    "one LoRA": {},
    "one LoRA, teacher computed": {"cache_teacher": False},
    "one LoRA beside": {"lora_position": "beside"},
    "hub of 2, segments": {"hub": 2, "routing": "segments"},
    "hub of 2, learned": {"hub": 2},
    "hub of 2, learned, teacher computed": {"hub": 2, "cache_teacher": False},
    "hub of 4, learned": {"hub": 4},
    "hub of 4, learned, teacher computed": {"hub": 4, "cache_teacher": False},
}


@pytest.mark.slow
def test_steps_of_fine_tuning_against_a_plain_one(benchmark):
    steps = 10 if benchmark.enabled else 1
    pipe = reference_pipeline() if benchmark.enabled else tiny_pipeline()
    sampler = Sampler(20 if benchmark.enabled else 2, BATCH)
    path = record_trajectories(pipe, calls=sampler.calls(BATCH, seed=0))
    quantized = copy.deepcopy(pipe)
    config = QuantizationConfig(refine=None)
    quantize(quantized, config, calibration=sampler.calls(BATCH, seed=1))
    rows = torch.arange(BATCH)
    step = rows % len(path.timesteps)

    def plain():
        denoiser = copy.deepcopy(pipe.unet).requires_grad_(True)
        optimizer = torch.optim.AdamW(denoiser.parameters(), fused=True)
        for _ in range(steps):
            error = path.predict(denoiser, step, rows) - path.predictions[step, rows]
            optimizer.zero_grad()
            error.square().mean().backward()
            optimizer.step()

    def tuned(**options):
        config = FinetuneConfig(steps=steps, batch=BATCH, **options)
        return finetune(copy.deepcopy(quantized), config, trajectories=path)

    ways = {"plain": plain}
    ways |= {name: lambda options=options: tuned(**options) for name, options in WAYS.items()}
    race(benchmark, ways, rounds=2, baseline="plain")
    benchmark.extra_info.update(table="training", title=f"{steps} steps of batch {BATCH}")
    assert all(loss > 0 for loss in tuned().losses)
