import copy

import pytest
import torch

from msfp import InputError, QuantizationConfig, pack, quantize, record_trajectories
from msfp.layers.base import quantized_layers
from msfp.pipelines.trajectories import Trajectories
from msfp.ptq.side_by_side import forwards_of, probed_layers, visit_layers
from msfp.support.paging import PageFolder

STEP, ROW = torch.tensor([0, 1, 3]).repeat_interleave(3), torch.arange(3).repeat(3)


@pytest.fixture
def batch(trajectories):
    return trajectories.samples[STEP, ROW], trajectories.timesteps[STEP]


def look(_visit):
    """A visit that changes nothing."""


def doubled(denoiser, trajectories, visitor):
    return visit_layers(denoiser, trajectories, STEP, ROW, visitor).chunk(2)


def test_the_halves_are_the_two_models(quantized, reference, trajectories, batch):
    denoiser = quantized()[0].unet
    with torch.no_grad():
        alone = [model(*batch).sample for model in (reference.unet, denoiser)]
    together = doubled(denoiser, trajectories, look)
    # Sums in another order may send a value to the next one of its grid, now and then.
    apart = (alone[0] - alone[1]).square().mean()
    for expected, half in zip(alone, together, strict=True):
        assert (half - expected).square().mean() < 0.01 * apart


def test_every_layer_is_visited_once_in_running_order_with_its_own_inputs_and_outputs(
    quantized, reference, trajectories, batch
):
    denoiser = quantized()[0].unet
    seen, outputs, visits = {}, {}, {}

    def read(name):
        return lambda _module, args: seen.setdefault(name, args[0])

    def give(name):
        return lambda _module, _args, output: outputs.setdefault(name, output)

    plain = copy.deepcopy(reference.unet)
    for name, layer in quantized_layers(denoiser).items():
        layer.register_forward_pre_hook(read(name))
        plain.get_submodule(name).register_forward_hook(give(name))
    with torch.no_grad():
        denoiser(*batch)
        plain(*batch)
    for layer in quantized_layers(denoiser).values():
        layer._forward_pre_hooks.clear()
    doubled(denoiser, trajectories, lambda visit: visits.setdefault(visit.name, [*visit.parts()]))
    assert sorted(visits) == sorted(quantized_layers(denoiser))
    assert next(iter(visits)) == "time_embedding.linear_1"
    assert next(reversed(visits)) == "conv_out"
    for name, ((x, y),) in visits.items():
        inputs = seen[name]
        assert (x - inputs).square().mean() < 0.01 * inputs.square().mean()
        torch.testing.assert_close(y, outputs[name], rtol=1e-3, atol=1e-3)


def test_samples_run_together_as_far_as_they_are_small():
    for shape, size in (
        ((1, 16, 16), 256),
        ((3, 32, 32), 21),
        ((4, 64, 64), 4),
        ((16, 128, 128), 1),
    ):
        samples = torch.zeros(1).expand(2, 200, *shape)
        parts = forwards_of(Trajectories(torch.zeros(2), samples, samples), torch.zeros(300))
        assert [part.stop - part.start for part in parts] == [size] * len(parts)
        batches = forwards_of(Trajectories(torch.zeros(2), samples, samples), torch.zeros(300), 7)
        assert [part.stop - part.start for part in batches] == [7] * 43
        assert parts[0].start == 0
        assert parts[-1].start < 300 <= parts[-1].stop


def test_a_batch_is_the_size_of_forwards(quantized, trajectories):
    sizes = []
    visit_layers(
        quantized()[0].unet, trajectories, STEP, ROW,
        lambda visit: sizes.append([len(x) for x, _ in visit.parts()]), batch=4,
    )  # fmt: skip
    assert set(map(tuple, sizes)) == {(4, 4, 1)}


@pytest.fixture
def few_together(monkeypatch):
    monkeypatch.setattr("msfp.ptq.side_by_side.TOGETHER", 2 * 256)


@pytest.mark.usefixtures("few_together")
def test_parts_are_those_of_one_forward(quantized, trajectories):
    denoiser, read = quantized()[0].unet, {}
    found = doubled(
        denoiser, trajectories, lambda visit: read.setdefault(visit.name, [*visit.parts()])
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("msfp.ptq.side_by_side.TOGETHER", 2**16)
        whole = doubled(
            denoiser, trajectories, lambda visit: read[visit.name].append(*visit.parts())
        )
    for one, other in zip(found, whole, strict=True):
        assert (one - other).square().mean() < 1e-3 * other.square().mean()
    for *parts, (x, y) in read.values():
        assert len(parts) == 5
        inputs, outputs = (torch.cat(each) for each in zip(*parts, strict=True))
        assert (inputs - x).square().mean() < 0.01 * x.square().mean()
        torch.testing.assert_close(outputs, y, rtol=1e-3, atol=1e-3)


@pytest.mark.usefixtures("few_together")
def test_files_change_no_bit(quantized, trajectories, tmp_path, monkeypatch):
    monkeypatch.setattr("msfp.support.paging.SMALL", 1)
    results = []
    for pages in (None, PageFolder(tmp_path)):
        denoiser = quantized()[0].unet
        plain = {name: layer.weight for name, layer in quantized_layers(denoiser).items()}
        values = {name: weight.clone() for name, weight in plain.items()}
        read = {}

        def double(visit, read=read):
            read[visit.name] = [x.clone() for part in visit.parts() for x in part]
            visit.layer.weight = torch.nn.Parameter(2 * visit.layer.weight, requires_grad=False)

        found = visit_layers(denoiser, trajectories, STEP, ROW, double, pages=pages)
        results.append([found, *(x for parts in read.values() for x in parts)])
        assert all(torch.equal(plain[name], value) for name, value in values.items())
    assert all(map(torch.equal, *results))
    assert pages.written > sum(weight.nbytes for weight in plain.values())
    assert all(map(pages.holds, plain.values()))
    assert not list(tmp_path.iterdir())


class Queries(torch.nn.Module):
    """A network that reads learned queries besides its samples."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.queries, self.inner = torch.nn.Linear(6, 6), torch.nn.Linear(6, 6)
        self.read, self.unused = torch.nn.Linear(6, 6), torch.nn.Linear(6, 6)
        self.register_buffer("learned", torch.randn(1, 4, 6))

    def forward(self, x):
        return self.read(self.inner(x).relu() + self.queries(self.learned).sum(1, keepdim=True))


def test_layers_that_read_the_same_in_all_samples_are_not_visited():
    def call(network):
        return network(torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(1)))

    network, paths, visits = Queries(), record_trajectories(Queries(), calls=call), []
    with pytest.warns(UserWarning, match="unused"):
        quantize(network, QuantizationConfig(refine=None, end_bits=4), calibration=call)
    assert probed_layers(network, paths) == (["inner", "queries", "read"], {"queries"})
    step, row = torch.zeros(2, dtype=torch.int64), torch.arange(2)
    visit_layers(network, paths, step, row, lambda visit: visits.append(visit.name))
    assert visits == ["inner", "read"]


def test_what_a_visit_changes_holds_for_the_quantized_half_alone(quantized, trajectories):
    denoiser = quantized()[0].unet

    def silence(visit):
        if visit.name == "conv_out":
            visit.layer.weight = torch.nn.Parameter(torch.zeros_like(visit.layer.weight))

    full, _ = doubled(denoiser, trajectories, look)
    same, silent = doubled(denoiser, trajectories, silence)
    assert torch.equal(same, full)
    assert torch.equal(silent, denoiser.conv_out.bias.view(1, -1, 1, 1).expand_as(silent))


def test_layers_are_as_before_after_the_block_and_after_an_error(quantized, trajectories, batch):
    denoiser = quantized()[0].unet
    with torch.no_grad():
        before = denoiser(*batch).sample

    def fail(_visit):
        raise KeyError

    with pytest.raises(KeyError):
        doubled(denoiser, trajectories, fail)
    with torch.no_grad():
        assert torch.equal(denoiser(*batch).sample, before)


def test_a_plain_or_a_packed_denoiser_is_refused(quantized, reference, trajectories):
    packed = quantized()[0].unet
    pack(packed)
    for denoiser in (reference.unet, packed):
        with pytest.raises(InputError, match="must have been quantized and not yet packed"):
            doubled(denoiser, trajectories, look)
