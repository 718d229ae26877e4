import copy
import functools
import statistics
import threading
import weakref

import families
import pytest
import torch
from torch import nn

from msfp import InputError, QuantizationConfig, quantize, record_trajectories
from msfp.config import RefinementConfig
from msfp.evaluation.prediction_errors import noise_errors
from msfp.layers.trainable import full_precision, trainable_layers
from msfp.pipelines.trajectories import WholeForwards, as_vector
from msfp.ptq.lockstep import run_in_lockstep
from msfp.ptq.refinement import refine
from msfp.ptq.side_by_side import visit_layers
from msfp.support.paging import PageFolder


def whole(paths, denoiser):
    """The same recorded rows as whole forwards of one row each."""
    steps, rows = paths.samples.shape[:2]
    arguments = tuple(
        tuple(((paths.samples[step, row, None], paths.timesteps[step]), {}) for row in range(rows))
        for step in range(steps)
    )
    outputs = [[as_vector(denoiser(*args)) for args, _ in each] for each in arguments]
    return WholeForwards(
        paths.timesteps,
        paths.samples.flatten(2),
        torch.stack([torch.stack(each) for each in outputs]),
        arguments=arguments,
    )


@torch.no_grad()
def test_layers_are_visited_with_the_same_numbers_as_in_one_batch():
    denoiser = families.make("unet")
    paths = record_trajectories(families.pipeline("unet", None), calls=families.images)
    alone = whole(paths, denoiser)
    quantize(denoiser, QuantizationConfig(refine=None), calibration=families.call)
    step, row = torch.tensor([0, 1, 1]), torch.tensor([0, 1, 0])
    visits, results = [], []
    for path in (paths, alone):
        visits.append([])

        def look(visit):
            x, y = (torch.cat(each) for each in zip(*visit.parts(), strict=True))
            visits[-1].append((visit.name, x, y))

        results.append(visit_layers(denoiser, path, step, row, look).flatten(1))
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-3)
    assert [name for name, *_ in visits[0]] == [name for name, *_ in visits[1]]
    for (_, _, one), (_, _, other) in zip(*visits, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)
    assert not any("forward" in vars(layer) for layer in trainable_layers(denoiser).values())


class Lists(nn.Module):
    """A network of tokens, of another number in each row, with an expert that gets some of them."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.expert, self.out = nn.Linear(6, 32), nn.Linear(32, 32), nn.Linear(32, 6)

    def forward(self, x):
        hidden = [self.inner(each).relu() for each in x]
        for each in hidden:
            chosen = each[:, 0] > each[:, 1]
            each[chosen] = self.expert(each[chosen])
        return [self.out(each) for each in hidden]


def call(network):
    draw = torch.Generator().manual_seed(0)
    return network([torch.randn(rows, 6, generator=draw) for rows in (40, 30, 50)])


def test_lists_of_tokens_and_experts_are_refined():
    errors, paths = [], record_trajectories(Lists(), calls=[call, call])
    assert isinstance(paths, WholeForwards)
    for refinement in (None, RefinementConfig(branch_rank=2)):
        network = Lists()
        quantize(network, QuantizationConfig(refine=None, end_bits=4), calibration=call)
        if refinement is not None:
            assert refine(network, refinement, trajectories=paths) == ["inner", "expert", "out"]
        errors.append(statistics.mean(noise_errors(network, trajectories=paths)))
    assert errors[1] < 0.8 * errors[0]


def test_an_error_in_a_visit_ends_all_forwards():
    network, paths = Lists(), record_trajectories(Lists(), calls=[call, call])
    quantize(network, QuantizationConfig(refine=None, end_bits=4), calibration=call)
    before = copy.deepcopy(network.state_dict())

    def fail(visit):
        raise KeyboardInterrupt(visit.name)

    row = torch.tensor([0, 1])
    with pytest.raises(KeyboardInterrupt, match="inner"):
        visit_layers(network, paths, torch.zeros_like(row), row, fail)
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
    call(network)


class SequenceFirst(nn.Module):
    """A network that has its samples on the second axis inside."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.out = nn.Linear(6, 32), nn.Linear(32, 6)

    def forward(self, x):
        hidden = self.inner(x.transpose(0, 1)).relu()
        return self.out(hidden - hidden.mean(dim=0)).transpose(0, 1)


@pytest.mark.parametrize("tokens", [4, 5])
def test_layers_with_samples_on_another_axis_are_refined_all_the_same(tokens):
    def call(network):
        return network(torch.randn(8, tokens, 6, generator=torch.Generator().manual_seed(1)))

    paths, errors = record_trajectories(SequenceFirst(), calls=[call, call]), []
    assert not isinstance(paths, WholeForwards)
    for refinement in (None, RefinementConfig(branch_rank=2)):
        network = SequenceFirst()
        quantize(network, QuantizationConfig(refine=None, end_bits=4), calibration=call)
        if refinement is not None:
            assert refine(network, refinement, trajectories=paths) == ["inner", "out"]
        errors.append(statistics.mean(noise_errors(network, trajectories=paths)))
    assert errors[1] < 0.8 * errors[0]


class Experts(nn.Module):
    """A network with a table of experts for rows, of which some get no token in many forwards."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.out = nn.Linear(6, 16), nn.Linear(16, 6)
        self.experts = nn.ModuleList(nn.Linear(16, 16) for _ in range(6))

    def forward(self, x):
        tokens = self.inner(x).relu()
        chosen = tokens[..., :6].argmax(-1)
        out = torch.zeros_like(tokens)
        for index, expert in enumerate(self.experts):
            out[chosen == index] = expert(tokens[chosen == index])
        return self.out(out.relu())


def test_experts_without_tokens_in_some_forwards_are_refined(monkeypatch):
    def call(network):
        return network(torch.randn(16, 3, 6, generator=torch.Generator().manual_seed(1)))

    monkeypatch.setattr("msfp.ptq.side_by_side.TOGETHER", 1)
    paths, network = record_trajectories(Experts(), calls=call), Experts()
    quantize(network, QuantizationConfig(refine=None, end_bits=4), calibration=call)
    with torch.no_grad():
        chosen = network.inner(paths.samples[0]).relu()[..., :6].argmax(-1).flatten().tolist()
    used = [f"experts.{index}" for index in sorted(set(chosen))]
    assert len(used) > 3
    refined = refine(network, RefinementConfig(branch_rank=0), trajectories=paths)
    assert [name for name in refined if "experts" in name] == used


class Keeps(nn.Module):
    """A network that keeps a value of its forward in a module."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = (nn.Linear(6, 6) for _ in range(3))

    def forward(self, x):
        self.skip = self.a(x)
        return self.c((self.b(self.skip.relu()) + self.skip).relu())


def test_a_network_that_keeps_values_in_its_modules_is_not_refined_by_wrong_ones():
    def call(network):
        return network(torch.randn(8, 4, 6, generator=torch.Generator().manual_seed(1)))

    network = Keeps()
    with pytest.warns(UserWarning, match="rounded to nearest: Keeps cannot be refined: its modul"):
        quantize(network, QuantizationConfig(end_bits=4), calibration=call)
    assert torch.equal(network.a.weight, Keeps().a.weight)
    network = Keeps()
    config = QuantizationConfig(end_bits=4, refine=RefinementConfig(branch_rank=1))
    with pytest.raises(InputError, match="keep values of a forward for later layers"):
        quantize(network, config, calibration=call)
    assert type(network.a) is nn.Linear


def test_threads_that_cannot_start_leave_the_layers_as_they_were(monkeypatch):
    network, paths = Lists(), record_trajectories(Lists(), calls=[call, call])
    quantize(network, QuantizationConfig(refine=None, end_bits=4), calibration=call)
    start, started = threading.Thread.start, []

    def fail(thread):
        started.append(thread)
        if len(started) == 3:
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", fail)
    row = torch.tensor([0, 1])
    with pytest.raises(RuntimeError, match="can't start"):
        visit_layers(network, paths, torch.zeros_like(row), row, lambda _visit: None)
    assert not any("forward" in vars(layer) for layer in trainable_layers(network).values())
    assert not any(thread.is_alive() for thread in started[:2])


class Halves(nn.Module):
    """A network that changes its input."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.out = nn.Linear(6, 6)

    def forward(self, x, shift):
        return [self.out(each.mul_(0.5) + shift.mul_(0.5)) for each in x]


def test_what_a_forward_does_to_its_arguments_changes_no_recording():
    def call(network):
        draw = torch.Generator().manual_seed(0)
        x = [torch.randn(rows, 6, generator=draw) for rows in (4, 3)]
        return network(x, torch.ones(6))

    network, paths = Halves(), record_trajectories(Halves(), calls=call)
    with torch.no_grad():
        found = [paths.predict(network, *torch.zeros(2, 1, dtype=torch.int64)) for _ in range(2)]
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0][0], paths.predictions[0, 0])


class Fused(nn.Module):
    """Queries, keys and values that are views of one output."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.fused, self.query, self.out = nn.Linear(6, 24), nn.Linear(8, 8), nn.Linear(8, 6)
        self.views = []

    def forward(self, x):
        q, k, v = self.fused(x).chunk(3, dim=-1)
        self.views += [weakref.ref(k), weakref.ref(v)]
        q = self.query(q)
        return self.out((q * k).softmax(-1) * v)


@torch.no_grad()
def test_views_of_one_memory_wait_in_a_file_together(tmp_path, monkeypatch):
    monkeypatch.setattr("msfp.support.paging.SMALL", 64)
    network, pages, seen = Fused(), PageFolder(tmp_path), []
    samples = torch.randn(3, 4, 6)
    config = QuantizationConfig(end_bits=4, refine=None)
    quantize(network, config, calibration=lambda each: each(samples[0]))
    layers = trainable_layers(network)
    forwards = [functools.partial(network, x) for x in samples]
    network.views.clear()

    def look(visit):
        if visit.name == "query":
            seen.extend(pages.holds(view()) for view in network.views)

    full, quantized = run_in_lockstep(network, layers, forwards, look, pages)
    assert seen == [True] * 2 * 2 * len(samples)
    with full_precision(network):
        assert all(torch.equal(x, forward()) for x, forward in zip(full, forwards, strict=True))
    assert all(torch.equal(x, forward()) for x, forward in zip(quantized, forwards, strict=True))
