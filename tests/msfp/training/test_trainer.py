import copy
import os
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from accelerate.state import AcceleratorState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker
from accelerate.utils import LoggerType
from tiny import SHORT, tuned

from msfp import FinetuneConfig, InputError, finetune
from msfp.layers.trainable import trainable_layers
from msfp.support import container
from msfp.training.objective import OWN_ERRORS, Objective
from msfp.training.parameters import add_hubs
from msfp.training.state import STATE, History
from msfp.training.teacher import Teacher
from msfp.training.trainer import Trainer, TrainingInputs


def trained(pipe, path, config, **more):
    """The trained parameters of a copy of a pipeline's denoiser, not rounded."""
    unet = copy.deepcopy(pipe).unet
    objective = Objective(torch.ones(len(path.timesteps)), config.guidance_branches)
    inputs = TrainingInputs(path, objective, Teacher(unet), **more)
    add_hubs(unet, config, path.timesteps)
    trainer = Trainer(unet, inputs, config)
    history = trainer.run()
    return {name: value.detach() for name, value in trainer.parameters.items()}, history


def difference(one, other):
    return max((one[name] - other[name]).abs().max().item() for name in one)


@pytest.mark.parametrize("point", ["save_file", "fsync", "replace", "fsync after"])
def test_a_run_that_dies_while_it_saves_resumes_from_a_whole_state(
    student, path, tmp_path, monkeypatch, point
):
    """Each call that writes a state is the last that a process makes; the second save is hit."""
    file, config = tmp_path / "state.safetensors", FinetuneConfig(**SHORT, save_every=2)
    expected, _ = tuned(student, path, config)
    calls = []

    class Died(BaseException):
        pass

    def dying(name, call):
        def made(*args, **more):
            calls.append(name)
            if calls.count(name) == (4 if point == "fsync after" else 2):
                if name == "save_file":
                    args[1].write_bytes(b"half")
                raise Died
            return call(*args, **more)

        return made

    name = point.removesuffix(" after")
    owner = {"save_file": container, "fsync": os, "replace": Path}[name]
    monkeypatch.setattr(owner, name, dying(name, getattr(owner, name)))
    with pytest.raises(Died):
        tuned(student, path, config, state=file)
    monkeypatch.undo()
    steps = len(container.header_of(file, STATE).facts["losses"])
    assert steps == (4 if point == "fsync after" else 2)
    resumed, _ = tuned(student, path, config, state=file, resume=True)
    assert all(torch.equal(resumed[name], value) for name, value in expected.items())


def test_a_batch_in_parts_is_that_batch(student, path):
    config = FinetuneConfig(**SHORT | {"steps": 2})
    whole, _ = trained(student, path, config)
    parts, _ = trained(student, path, replace(config, accumulation=4))
    assert difference(whole, parts) < 1e-4


def test_activations_computed_again_give_the_same_gradients(student, path):
    config = FinetuneConfig(**SHORT | {"steps": 2}, hub=2)
    kept, _ = trained(student, path, config)
    runs = []
    block = student.unet.mid_block.resnets[1]
    block.register_forward_pre_hook(lambda *_: runs.append(1))
    tuned(student, path, replace(config, checkpointing=True))
    assert len(runs) == 1 + 2 * 2  # the check, and each step forward and again
    again, _ = trained(student, path, replace(config, checkpointing=True))
    assert difference(kept, again) < 1e-4


def test_computing_the_targets_again_is_training_towards_what_was_recorded(student, path):
    config = FinetuneConfig(**SHORT | {"steps": 2})
    recorded, _ = trained(student, path, config)
    computed, _ = trained(student, path, replace(config, cache_teacher=False))
    assert difference(recorded, computed) < 1e-4


@pytest.mark.slow
def test_a_hub_that_always_takes_its_first_lora_trains_like_a_single_one(student, path):
    single, _ = trained(student, path, FinetuneConfig(**SHORT))
    config = FinetuneConfig(**SHORT, hub=2, routing="segments")
    unet = copy.deepcopy(student).unet
    inputs = TrainingInputs(path, Objective(torch.ones(4), (1.0,)), Teacher(unet))
    add_hubs(unet, config, path.timesteps)
    unet.router.boundaries.fill_(torch.inf)
    for name, layer in trainable_layers(unet).items():
        layer.hub.down.data[0] = first_down(student, path)[name]
    trainer = Trainer(unet, inputs, config)
    trainer.run()
    for name, value in single.items():
        other = trainer.parameters[name].detach()
        other = other[:1] if ".hub." in name else other
        assert torch.equal(other, value), name


def first_down(student, path):
    unet = copy.deepcopy(student).unet
    add_hubs(unet, FinetuneConfig(**SHORT), path.timesteps)
    return {name: layer.hub.down.data[0] for name, layer in trainable_layers(unet).items()}


@pytest.mark.slow
def test_the_parameters_of_the_lowest_held_out_error_are_the_result(student, path, held_out):
    config = FinetuneConfig(**SHORT, evaluate_every=1, rates={"adapters": 0.9, "norms": 0.5})
    _, history = tuned(student, path, config, held_out=held_out)
    assert set(history.errors) == set(range(7))
    unet = copy.deepcopy(student).unet
    config = replace(config, rates=FinetuneConfig().rates)
    finetune(unet, config, trajectories=path, held_out=held_out)
    objective = Objective(torch.ones(4), (1.0,))
    _, history = tuned(student, path, config, held_out=held_out)
    error = objective.held_out_error(unet, held_out, 8, range(4)) / 4
    assert error == pytest.approx(min(history.errors.values()), rel=1e-4)


def test_training_stops_when_the_held_out_error_does_not_fall(student, path, held_out):
    rates = {"adapters": 1.0, "biases": 1.0, "norms": 1.0}
    config = FinetuneConfig(rank=2, steps=50, batch=8, evaluate_every=1, patience=3, rates=rates)
    _, history = tuned(student, path, config, held_out=held_out)
    assert len(history.losses) < 50
    assert history.evaluations_since_best() == 3


def test_the_average_lags_behind_what_is_trained(student, path):
    config = FinetuneConfig(**SHORT)
    start, _ = trained(student, path, replace(config, steps=1, rates={"norms": 1e-12}))
    last, _ = trained(student, path, config)
    average, _ = trained(student, path, replace(config, ema=0.9))
    name = "conv_in.hub.up"
    moved, lagged = last[name].abs().sum(), average[name].abs().sum()
    assert 0 < lagged < moved
    assert name in start


def test_every_group_can_be_frozen_and_trained_by_itself(student, path):
    groups = {
        "adapters": ".hub.", "router": "router.", "weight_scales": ".weight_quantizer.",
        "input_scales": ".input_quantizer.", "biases": "conv_in.bias", "norms": "norm1.weight",
    }  # fmt: skip
    for group, part in groups.items():
        rates = dict.fromkeys(groups, 0.0) | {group: 1e-3}
        config = FinetuneConfig(rank=2, steps=1, batch=4, hub=2, rates=rates)
        names = trained(student, path, config)[0]
        assert any(part in name for name in names)
        assert not any(other in name for o, other in groups.items() if o != group for name in names)


@pytest.mark.parametrize(("second", "of_the_sum"), [(0.5, 0.0), (2.0, 9.0)])
def test_branches_of_guidance_are_trained_by_their_sum_and_their_own_errors(
    student, path, second, of_the_sum
):
    """Errors that cancel in the sum are not free, or no other guidance could be sampled with."""
    rows = torch.arange(8)
    objective = Objective(torch.ones(4), (-1.0, 2.0))
    off = torch.ones_like(path.predictions)
    off[:, 1::2] = second
    step = torch.zeros(4, dtype=torch.int64)
    with torch.no_grad():
        own = path.predict(student.unet, torch.zeros_like(rows), rows)
    wanted = replace(path, predictions=path.predictions.clone())
    wanted.predictions[0] = own + off[0]
    errors = objective.errors(
        student.unet, wanted, lambda s, r: wanted.predictions[s, r], step, torch.arange(4)
    )
    own = (1 + second**2) / 2
    torch.testing.assert_close(errors, torch.full((4,), of_the_sum + OWN_ERRORS * 5 * own))
    assert objective.count(path) == 4
    message = r"multiple of 3 rows \(guidance_rows = 1 in each of 3 guidance branches\), not 8"
    with pytest.raises(InputError, match=message):
        Objective(torch.ones(4), (1.0, 1.0, 1.0)).count(path)
    calls_of_two = Objective(torch.ones(4), (-1.0, 2.0), guidance_rows=2)
    _, rows = calls_of_two.rows(step, torch.arange(4))
    assert rows.tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_mixed_precision_computes_layers_in_the_narrow_type(student, path):
    AcceleratorState._reset_state()
    seen = []
    layer = student.unet.mid_block.resnets[0].conv1
    layer.register_forward_hook(lambda _layer, _args, y: seen.append(y.dtype))
    try:
        config = FinetuneConfig(**SHORT | {"steps": 2}, precision="bf16", hub=2)
        _, history = tuned(student, path, config)
        assert set(seen[1:]) == {torch.bfloat16}  # after the check before training
        assert all(0 < loss < 1 for loss in history.losses)
        with pytest.raises(InputError, match="precision must be 'bf16'"):
            finetune(student.unet, FinetuneConfig(**SHORT), trajectories=path)
    finally:
        AcceleratorState._reset_state()


def test_a_layer_that_gives_nan_stops_training_with_its_name_and_the_last_good_state(
    student, path, tmp_path
):
    file = tmp_path / "state.safetensors"
    config = FinetuneConfig(**SHORT, save_every=1)

    def break_at(_stage, step, *_told):
        if step == 3:
            student.unet.mid_block.resnets[0].conv1.weight.data[0] = torch.nan

    with pytest.raises(InputError) as caught:
        finetune(student.unet, config, trajectories=path, state=file, progress=break_at)
    message = str(caught.value)
    assert "loss is nan at step 3" in message
    assert "that of layer mid_block.resnets.0.conv1;" in message
    assert f"last good state is {file}, of step 3" in message


def test_targets_that_are_not_finite_are_not_blamed_on_a_layer(student, path):
    breaking = copy.deepcopy(path)
    with pytest.raises(InputError, match="what they are trained towards is not; no state was sav"):
        finetune(
            student.unet,
            FinetuneConfig(**SHORT),
            trajectories=breaking,
            progress=lambda *_: breaking.predictions.fill_(torch.nan),
        )


def test_a_held_out_error_that_is_not_finite_stops_training_with_the_last_good_state(
    student, path, held_out, tmp_path
):
    """Or its step would be the best one, and what was trained would be lost."""
    file = tmp_path / "state.safetensors"
    config = FinetuneConfig(**SHORT, save_every=1, evaluate_every=3)
    breaking = copy.deepcopy(held_out)

    def break_at(_stage, step, *_told):
        if step == 2:
            breaking.predictions.fill_(torch.nan)

    with pytest.raises(InputError) as caught:
        finetune(
            student.unet,
            config,
            trajectories=path,
            held_out=breaking,
            state=file,
            progress=break_at,
        )
    message = str(caught.value)
    assert "held-out error is nan at step 3; the outputs of all layers are finite" in message
    assert f"last good state is {file}, of step 2" in message


def test_a_layer_that_gives_nan_on_held_out_trajectories_is_named(student, path, held_out):
    config = FinetuneConfig(**SHORT, evaluate_every=1)
    layer = student.unet.mid_block.resnets[0].conv1

    def poisoned(_layer, args, y):
        return y * torch.nan if not torch.is_grad_enabled() and len(args[0]) == 4 else y

    layer.register_forward_hook(poisoned)
    path_of_5 = replace(held_out, timesteps=held_out.timesteps)
    with pytest.raises(
        InputError, match=r"error is nan at step 0; .* mid_block\.resnets\.0\.conv1;"
    ):
        trained(student, path, config, held_out=path_of_5)


def test_progress_tells_step_loss_and_the_last_held_out_error(student, path, held_out):
    seen = []
    config = FinetuneConfig(**SHORT, evaluate_every=3)
    _, history = tuned(
        student, path, config, held_out=held_out, progress=lambda *told: seen.append(told)
    )
    assert [told[:3] for told in seen] == [("fine-tuning", step, 6) for step in range(1, 7)]
    last = [history.errors[step] for step in (0, 0, 3, 3, 3, 6)]
    for (*_, note), loss, error in zip(seen, history.losses, last, strict=True):
        assert note == f"loss {loss:.3g}, held-out error {error:.3g}"


def test_progress_tells_the_loss_alone_where_no_error_is_measured(student, path):
    seen = []
    config = FinetuneConfig(**SHORT | {"steps": 2})
    _, history = tuned(student, path, config, progress=lambda *told: seen.append(told))
    assert [note for *_, note in seen] == [f"loss {loss:.3g}" for loss in history.losses]


def test_the_best_of_a_history_is_its_lowest_error():
    history = History([], {0: 3.0, 5: 1.0, 10: 2.0, 15: 2.5})
    assert history.best == 5
    assert history.evaluations_since_best() == 2


class KeptLogs(GeneralTracker):
    """A tracker as Accelerate knows it, in the place of TensorBoard's."""

    name = "tensorboard"
    requires_logging_directory = True
    main_process_only = False
    logged: ClassVar = []

    def __init__(self, run_name, logging_dir=None, **_more):
        super().__init__()
        self.logged.append((run_name, logging_dir))

    tracker = None

    def store_init_configuration(self, values):
        self.logged.append(values)

    def log(self, values, step, **_more):
        self.logged.append((step, dict(values)))


def test_losses_and_errors_are_logged(student, path, held_out, tmp_path, monkeypatch):
    """By Accelerate to the folder that is given, as far as a tracker."""
    monkeypatch.setattr("msfp.training.processes.is_tensorboard_available", lambda: True)
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "tensorboard", KeptLogs)
    monkeypatch.setattr("accelerate.tracking._available_trackers", [LoggerType.TENSORBOARD])
    monkeypatch.setattr(KeptLogs, "logged", [])
    config = FinetuneConfig(**SHORT, evaluate_every=6)
    _, history = tuned(student, path, config, held_out=held_out, tensorboard=tmp_path)
    started, facts, *logged = KeptLogs.logged
    assert started == ("msfp", tmp_path)
    assert facts["rank"] == "2"
    assert [values["loss"] for _, values in logged] == history.losses
    assert [step for step, _ in logged] == [1, 2, 3, 4, 5, 6]
    assert logged[-1][1]["held_out_error"] == history.errors[6]
