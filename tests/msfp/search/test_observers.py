import copy

import numpy as np
import pytest
import torch
import torch.distributed as dist
from calibrations import same
from scripts import forked
from torch import nn

from fpformats import Histogram
from msfp import Calibration, InputError, Sampler, calibrate, denoising_factors, save_calls
from msfp.layers.selection import quantizable_layers
from msfp.pipelines.call_files import load_calls
from msfp.pipelines.sampler import prompt_calls
from msfp.schedulers.integer_weights import integer_weights
from msfp.search.observers import SAMPLES_PER_CALL


class Denoiser(nn.Module):
    """Layers of three kinds, one of which is called by keyword, and one that never runs."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Conv1d(2, 4, 1)
        self.conv = nn.Conv2d(4, 4, 1)
        self.out = nn.Linear(4, 2)
        self.idle = nn.Linear(4, 2)

    def forward(self, sample, timestep=None):  # noqa: ARG002 - the hooks read it
        hidden = self.conv(self.inner(sample)[..., None])[..., 0]
        return self.out(input=nn.functional.gelu(hidden).mT)


def noise(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def call(seed, timestep=500, width=8):
    return lambda denoiser: denoiser(noise(seed, 1, 2, width), timestep)


def test_every_layer_is_seen_at_every_step_in_the_order_in_which_layers_run(reference, calibration):
    assert list(calibration.inputs)[:3] == [
        "time_embedding.linear_1", "time_embedding.linear_2", "conv_in",
    ]  # fmt: skip
    assert calibration.inputs.keys() == quantizable_layers(reference.unet).keys()
    assert calibration.timesteps == {999: 1, 749: 1, 499: 1, 249: 1}
    # One draw of 4096 numbers and two extremes at each step; conv_in reads but 8 x 256.
    assert calibration.inputs["conv_in"].count == 4 * 8 * 256
    assert calibration.inputs["conv_out"].count == 4 * (SAMPLES_PER_CALL + 2)


def test_all_numbers_of_small_inputs_are_seen_and_no_others():
    network = Denoiser()
    calibration = calibrate(network, calls=[call(0), call(1)])
    assert list(calibration.inputs) == ["inner", "conv", "out", "idle"]
    expected = Histogram()
    expected.update(torch.cat([noise(0, 1, 2, 8), noise(1, 1, 2, 8)]))
    found = calibration.inputs["inner"].state()
    assert all(np.array_equal(found[key], array) for key, array in expected.state().items())
    assert calibration.inputs["out"].count == 2 * 32
    assert calibration.inputs["idle"].count == 0
    assert calibration.activations == {"out": "GELU"}


def test_the_extremes_of_every_call_are_kept(reference):
    seen = []
    calibration = calibrate(reference, calls=Sampler(3, 4).calls(8, seed=0))
    handle = reference.unet.conv_out.register_forward_pre_hook(
        lambda _layer, args: seen.append(torch.stack(args[0].aminmax()))
    )
    for call in Sampler(3, 4).calls(8, seed=0):
        call(reference)
    handle.remove()
    extremes = torch.stack(seen)
    assert len(seen) == 6
    assert calibration.inputs["conv_out"].min == extremes.min().item()
    assert calibration.inputs["conv_out"].max == extremes.max().item()


def test_what_is_drawn_is_like_all_that_there_is(reference, calibration):
    whole = Histogram()
    layer = reference.unet.mid_block.resnets[0].conv2
    handle = layer.register_forward_pre_hook(lambda _layer, args: whole.update(args[0]))
    for each in Sampler(4, 8).calls(8, seed=1):
        each(reference)
    handle.remove()
    drawn = calibration.inputs["mid_block.resnets.0.conv2"]
    assert whole.count > 2 * drawn.count
    assert drawn.mean == pytest.approx(whole.mean, abs=4 * (whole.variance / drawn.count) ** 0.5)
    assert drawn.quantile(0.9) == pytest.approx(whole.quantile(0.9), rel=0.05)


def test_layers_after_silu_are_known_as_such(calibration):
    after_silu = ("conv1", "conv2", "conv_out", "time_emb_proj", "time_embedding.linear_2")
    assert calibration.activations == {
        name: "SiLU" for name in calibration.inputs if name.endswith(after_silu)
    }


def test_it_is_reproduced_and_leaves_no_hooks(reference):
    first, second = (calibrate(reference, calls=Sampler(2, 4).calls(4, seed=9)) for _ in range(2))
    assert same(first, second)
    for module in reference.unet.modules():
        assert not module._forward_pre_hooks
        assert not module._forward_hooks


def test_an_extra_forward_or_another_order_of_calls_changes_nothing_else():
    wide = [call(seed, timestep, width=4000) for seed, timestep in ((0, 900), (1, 100), (2, 900))]
    forwards = calibrate(Denoiser(), calls=wide)
    backwards = calibrate(Denoiser(), calls=wide[::-1])
    found, expected = backwards.inputs["inner"].state(), forwards.inputs["inner"].state()
    assert all(np.array_equal(found[key], array) for key, array in expected.items())
    first = calibrate(Denoiser(), calls=lambda network: (wide[0](network), wide[1](network)))
    second = calibrate(Denoiser(), calls=lambda network: [each(network) for each in wide])
    assert second.inputs["inner"].count == 1.5 * first.inputs["inner"].count


def test_memory_does_not_grow_with_the_number_of_calls():
    once, often = (
        calibrate(Denoiser(), calls=[call(0, timestep=5, width=9000)] * count) for count in (1, 60)
    )
    for name, histogram in once.inputs.items():
        size = histogram.state()["bins"].size
        assert often.inputs[name].state()["bins"].size == size
        assert often.inputs[name].count == 60 * histogram.count


def test_weights_count_each_forward_by_the_square_of_its_factor():
    factors = {900: -4.0, 500: 2.0, 100: 0.01}
    assert integer_weights(factors) == {900: 1024, 500: 256, 100: 1}
    calls = [call(0, 900), call(1, 500), call(2, 100.2)]
    weighted = calibrate(Denoiser(), calls=calls, factors=factors)
    expected = Histogram()
    for seed, repeats in enumerate((1024, 256, 1)):
        expected.update(noise(seed, 1, 2, 8), repeats)
    found = weighted.inputs["inner"].state()
    assert all(np.array_equal(found[key], array) for key, array in expected.state().items())


def test_weights_fit_the_timesteps_of_a_sampler(reference):
    factors = denoising_factors(reference.scheduler, 4)
    sampler = Sampler(4, 2)
    plain, weighted = (
        calibrate(reference, calls=sampler.calls(2, seed=0), factors=each)
        for each in (None, factors)
    )
    weights = integer_weights(factors)
    assert weighted.weights == weights
    count = plain.inputs["conv_in"].count // 4
    assert weighted.inputs["conv_in"].count == count * sum(weights.values())


def test_a_timestep_without_a_factor_is_refused():
    with pytest.raises(InputError, match=r"no entry for timestep 500; .* has 900, 100"):
        calibrate(Denoiser(), calls=call(0), factors={900: 1.0, 100: 2.0})
    with pytest.raises(InputError, match="all samples of a forward pass to have the same"):
        calibrate(Denoiser(), calls=call(0, torch.tensor([1, 2])), factors={1: 1.0, 2: 1.0})
    with pytest.raises(InputError, match="factors must be finite"):
        calibrate(Denoiser(), calls=call(0), factors={500: 0.0})


def test_an_interrupted_calibration_resumes_where_it_was(tmp_path):
    file = tmp_path / "state.safetensors"
    made = []

    def counted(seed):
        def make(network):
            made.append(seed)
            if seed == 2 and made.count(2) == 1:
                call(7)(network)  # what is seen of a call that fails is not kept
                raise KeyboardInterrupt
            call(seed)(network)

        return make

    calls = [counted(seed) for seed in range(4)]
    with pytest.raises(KeyboardInterrupt):
        calibrate(Denoiser(), calls=calls, file=file)
    assert Calibration.load(file).calls == [0, 1]
    resumed = calibrate(Denoiser(), calls=calls, file=file)
    assert made == [0, 1, 2, 2, 3]
    assert same(resumed, calibrate(Denoiser(), calls=[call(seed) for seed in range(4)]))
    assert same(Calibration.load(file), resumed)


def test_no_calibration_resumes_from_the_state_of_another(tmp_path):
    file = tmp_path / "state.safetensors"
    calibrate(Denoiser(), calls=[call(0), call(1)], file=file)
    with pytest.raises(InputError, match=r"state of another calibration: .* 1 and 2 calls"):
        calibrate(Denoiser(), calls=[call(0)], file=file)
    with pytest.raises(InputError, match=r"state of another calibration: .* different denoisers"):
        calibrate(nn.Sequential(nn.Linear(2, 2)), calls=[call(0), call(1)], file=file)


@pytest.mark.parametrize(
    ("description", "message"),
    [
        ({"prompts": ["a", "c"], "seed": 0}, r"prompts \['a', 'c'\] and \['a', 'b'\]"),
        ({"prompts": ["a", "b"], "seed": 1}, "seed 1 and 0"),
        ({"prompts": ["a", "b"], "seed": 0, "steps": 5}, "steps 5 and none"),
        ({"prompts": ["a" * 50, "b" * 50], "seed": 0}, r"prompts \['a+\.\.\.b+'\] and"),
        ({}, r"prompts none and \['a', 'b'\]"),
    ],
)
def test_the_state_of_other_calls_is_refused_by_what_differs(tmp_path, description, message):
    file, made = tmp_path / "state.safetensors", []

    def counted(network):
        made.append(call(0)(network))

    same_calls = {"prompts": ("a", "b"), "seed": 0}
    calibrate(Denoiser(), calls=counted, file=file, description=same_calls)
    calibrate(Denoiser(), calls=counted, file=file, description=same_calls)
    before = file.read_bytes()
    with pytest.raises(InputError, match=f"another calibration: .* different calls: {message}"):
        calibrate(Denoiser(), calls=counted, file=file, description=description)
    assert len(made) == 1
    assert file.read_bytes() == before


def test_progress_is_told_of_each_call():
    told = []
    calls = [call(0), call(1), call(2)]
    calibrate(Denoiser(), calls=calls, progress=lambda *facts: told.append(facts))
    assert told == [("calibrating", done, 3) for done in (1, 2, 3)]


def test_saved_calls_are_seen_as_the_pipeline_was(reference, tmp_path):
    sampler = Sampler(3, 2)
    direct = calibrate(reference, calls=sampler.calls(2, seed=4))
    files = save_calls(reference, tmp_path, calls=sampler.calls(2, seed=4)[0])
    assert len(files) == 3
    again = calibrate(copy.deepcopy(reference.unet), calls=load_calls(tmp_path))
    assert again.timesteps == direct.timesteps
    for name, histogram in direct.inputs.items():
        found = again.inputs[name].state()
        assert all(np.array_equal(found[key], array) for key, array in histogram.state().items())


def test_calls_that_do_nothing_are_refused():
    with pytest.raises(InputError, match=r"calls must be one or more functions .*, not \[\]"):
        calibrate(Denoiser(), calls=[])
    with pytest.raises(InputError, match="call 0 did not run the Denoiser"):
        calibrate(Denoiser(), calls=lambda network: network)
    with pytest.raises(InputError, match=r"list of prompts or labels, not 'a fox'"):
        prompt_calls("a fox")


def _one_process(rank, processes, folder):
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=processes
    )
    calls = [call(seed, 100 * seed, width=5000) for seed in range(3)]
    calibration = calibrate(Denoiser(), calls=calls, file=f"{folder}/part.safetensors")
    calibration.save(f"{folder}/whole-{rank}.safetensors")
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_processes_that_share_the_calls_each_get_what_one_alone_gets(tmp_path, processes):
    """Three calls for two processes, and for four, one of which has nothing to do."""
    forked(_one_process, (processes, str(tmp_path)), processes)
    alone = calibrate(Denoiser(), calls=[call(s, 100 * s, width=5000) for s in range(3)])
    for rank in range(processes):
        assert same(Calibration.load(tmp_path / f"whole-{rank}.safetensors"), alone)
    assert Calibration.load(tmp_path / f"part-0-of-{processes}.safetensors").calls[0] == 0
