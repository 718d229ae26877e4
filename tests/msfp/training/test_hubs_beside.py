import pytest

from msfp import FinetuneConfig, finetune
from msfp.layers.packed import packed_layers


@pytest.mark.slow
def test_a_hub_of_branches_lowers_the_error_and_moves_its_router(student, path, held_out):
    config = FinetuneConfig(
        hub=2, lora_position="beside", steps=20, batch=8, rank=4, evaluate_every=20,
        rates={"weight_scales": 0, "input_scales": 0, "biases": 0, "norms": 0},
    )  # fmt: skip
    history = finetune(student.unet, config, trajectories=path, held_out=held_out)
    assert history.errors[20] < 0.9 * history.errors[0]
    assert {layer.choices for layer in packed_layers(student.unet).values()} == {2}
