"""What rounding a layer costs, against what it does to the prediction."""

import families
import pytest
import torch
from torch import nn

from msfp import InputError, QuantizationConfig, calibrate, record_trajectories
from msfp.layers.lora.low_rank import low_rank
from msfp.layers.selection import quantizable_layers
from msfp.pipelines.denoiser import denoiser_of
from msfp.ptq import sensitivity
from msfp.ptq.request import settings_of
from msfp.ptq.sensitivity import Sensitivity, measure_sensitivities
from msfp.search.layer_search import quantizer_of_input, search_input

CONFIG = QuantizationConfig(end_bits=4, budget=5.0)


class Linear(nn.Module):
    """A denoiser that is linear, with a kind of layer in its middle."""

    def __init__(self, middle):
        super().__init__()
        self.config = {}
        self.first, self.middle = nn.Conv2d(3, 8, 1), middle
        self.last = nn.Conv2d(middle.weight.shape[0], 3, 1)

    def forward(self, sample, timestep):
        del timestep
        return self.last(self.middle(self.first(sample)))


def measured(network, samples, monkeypatch, **options):
    """The costs of the layers, and the grids of their inputs."""

    def call(model):
        for each in samples.split(1):
            model(each, torch.zeros(1))

    monkeypatch.setattr(sensitivity, "SAMPLES", len(samples))
    calibration = calibrate(network, calls=[call])
    paths = record_trajectories(network, calls=[call])
    settings = settings_of(network, CONFIG, calibration)
    options = {"seed": 0, "state": None, "progress": lambda *_: None} | options
    layers = quantizable_layers(network)
    found = measure_sensitivities(network, layers, settings, calibration, paths, **options)
    inputs = {
        name: quantizer_of_input(search_input(calibration.inputs[name], 4, "mixup")[0])
        for name in layers
    }
    return found, inputs


@pytest.fixture
def known_vectors(monkeypatch):
    """All random vectors that are sent back are these numbers."""
    monkeypatch.setattr(torch, "randn", lambda shape, **_: vector(shape))


def vector(shape):
    return torch.arange(torch.Size(shape).numel()).remainder(7).view(shape) / 3 - 1


@pytest.mark.usefixtures("known_vectors")
@pytest.mark.parametrize(
    ("middle", "ranks"),
    [
        pytest.param(lambda: nn.Conv2d(8, 6, 3, padding=1), [0, 2, 4], id="convolution"),
        pytest.param(lambda: nn.Conv2d(8, 8, 3, stride=2, groups=2), [0], id="grouped"),
        pytest.param(lambda: nn.Conv2d(8, 12, 1), [0, 2, 4, 8], id="of one pixel"),
    ],
)
def test_the_cost_of_inputs_is_what_their_rounding_does_to_the_prediction(
    middle, ranks, monkeypatch
):
    torch.manual_seed(0)
    network, samples = Linear(middle()).eval(), torch.rand(6, 3, 8, 8) * 4 - 1
    found, inputs = measured(network, samples, monkeypatch)
    weight = network.middle.weight.detach()
    assert list(found["middle"].by_input) == ranks
    with torch.no_grad():
        x = network.first(samples)
        wrong = x - inputs["middle"](x)
        for rank, cost in found["middle"].by_input.items():
            down, up = low_rank(weight.flatten(1), max(rank, 1))
            rest = weight - (up @ down).view_as(weight) * bool(rank)
            change = network.middle._conv_forward(wrong, rest, None)
            change = network.last._conv_forward(change, network.last.weight, None)
            exact = (vector(change[:1].shape) * change).sum(dim=(1, 2, 3)).square().mean().item()
            assert cost == pytest.approx(exact, rel=0.02, abs=1e-4 * found["middle"].by_input[0])


@pytest.mark.usefixtures("known_vectors")
def test_the_cost_of_weights_is_that_of_independent_errors(monkeypatch):
    torch.manual_seed(0)
    network, samples = Linear(nn.Conv2d(8, 6, 3, padding=1)).eval(), torch.rand(64, 3, 5, 5)
    found, inputs = measured(network, samples, monkeypatch)
    with torch.no_grad():
        x = inputs["middle"](network.first(samples))
    wanted = 0.0
    for each in x.split(1):
        weight = network.middle.weight.detach().clone().requires_grad_()
        y = network.last(network.middle._conv_forward(each, weight, None))
        (slope,) = torch.autograd.grad((y * vector(y.shape)).sum(), weight)
        power = weight.detach().flatten(1).square().mean(1)
        wanted += (slope.flatten(1).square().sum(1) * power).sum().item() / len(x)
    # Each sample has random signs, so that the mean of 64 is known to about a quarter.
    assert found["middle"].by_weight[0] == pytest.approx(wanted, rel=0.4)


def test_ranks_take_from_both_costs_until_nothing_is_left():
    pipe = families.pipeline("unet", None)
    calls = [families.images]
    calibration, paths = calibrate(pipe, calls=calls), record_trajectories(pipe, calls=calls)
    denoiser = denoiser_of(pipe)
    layers, settings = quantizable_layers(denoiser), settings_of(denoiser, CONFIG, calibration)
    before = [each.requires_grad for each in denoiser.parameters()]
    found = measure_sensitivities(
        denoiser, layers, settings, calibration, paths, seed=0, state=None,
        progress=lambda *_: None,
    )  # fmt: skip
    assert found.keys() == layers.keys()
    assert [each.requires_grad for each in denoiser.parameters()] == before
    assert not denoiser.is_gradient_checkpointing
    assert all(each.grad is None for each in denoiser.parameters())
    for each in found.values():
        costs = list(each.by_weight.values())
        assert costs == sorted(costs, reverse=True)
        assert all(cost >= 0 for cost in each.by_input.values())
        noises = list(each.weight_noise.values())
        assert noises == sorted(noises, reverse=True)


def test_a_network_without_gradients_is_refused_by_name(monkeypatch):
    class Detached(Linear):
        def forward(self, sample, timestep):
            return super().forward(sample, timestep).detach()

    network = Detached(nn.Conv2d(8, 6, 1)).eval()
    with pytest.raises(InputError, match="Detached computes no gradient"):
        measured(network, torch.randn(2, 3, 4, 4), monkeypatch)
    assert all(each.requires_grad for each in network.parameters())


def test_gradient_checkpointing_that_fails_is_left_out(monkeypatch):
    class Failing(Linear):
        _supports_gradient_checkpointing, is_gradient_checkpointing = True, False

        def enable_gradient_checkpointing(self):
            self.is_gradient_checkpointing = True

        def disable_gradient_checkpointing(self):
            self.is_gradient_checkpointing = False

        def forward(self, sample, timestep):
            if self.is_gradient_checkpointing:
                raise TypeError("an unexpected keyword")
            return super().forward(sample, timestep)

    torch.manual_seed(0)
    plain, samples = Linear(nn.Conv2d(8, 6, 1)).eval(), torch.randn(2, 3, 4, 4)
    network = Failing(plain.middle).eval()
    network.load_state_dict(plain.state_dict())
    assert measured(network, samples, monkeypatch)[0] == measured(plain, samples, monkeypatch)[0]
    assert not network.is_gradient_checkpointing


def test_a_weight_that_is_not_finite_is_named():
    network = Linear(nn.Conv2d(8, 6, 1)).eval()
    network.middle.weight.data[0] = torch.nan
    layers = quantizable_layers(network)
    settings = dict.fromkeys(layers, CONFIG.settings("inner")._replace(activation_bits=None))
    with pytest.raises(InputError, match="the weight of layer 'middle' is not finite"):
        measure_sensitivities(
            network, layers, settings, None, None, seed=0, state=None, progress=lambda *_: None
        )


def test_costs_survive_json():
    each = Sensitivity({4: 0.01}, {0: 2.0}, {0: 0.5})
    facts = {"weight_noise": {"4": 0.01}, "by_weight": {"0": 2.0}, "by_input": {"0": 0.5}}
    assert Sensitivity.of_facts(facts) == each
