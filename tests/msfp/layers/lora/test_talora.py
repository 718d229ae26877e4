import copy

import pytest
import torch
from torch import nn

from fpformats import E2M1, E2M2U
from msfp import pack
from msfp.layers.fake_quantizer import Quantizer
from msfp.layers.families import family_of
from msfp.layers.lora import talora
from msfp.layers.lora.routers import LearnedRouter, SegmentRouter
from msfp.layers.lora.talora import TURNS, LoRAHub, Routing, attach_router


def wrapped(layer, adapters, seed=0):
    scale = torch.full((layer.weight.shape[0],) + (1,) * (layer.weight.dim() - 1), 0.1)
    inputs = Quantizer(E2M2U, torch.tensor(0.2), torch.tensor(-0.25))
    quantized = family_of(layer).trainable.wrap(layer, Quantizer(E2M1, scale), inputs)
    rows, columns = layer.weight.flatten(1).shape
    draw = torch.Generator().manual_seed(seed)
    quantized.hub = LoRAHub(rows, columns, adapters, 2, torch.tensor(0.1), draw)
    with torch.no_grad():
        quantized.hub.up.copy_(torch.randn(quantized.hub.up.shape, generator=draw))
    return quantized


class Denoiser(nn.Module):
    """Two layers and a timestep argument."""

    def __init__(self, adapters):
        super().__init__()
        torch.manual_seed(0)
        self.conv = wrapped(nn.Conv2d(1, 4, 3, padding=1), adapters)
        self.linear = wrapped(nn.Linear(16, 16), adapters, seed=1)
        routing = attach_router(self, LearnedRouter(2, adapters))
        self.conv.routing = self.linear.routing = routing
        self.conv.index, self.linear.index = 0, 1

    def forward(self, sample, timestep):  # noqa: ARG002 - the router reads it
        return self.linear(self.conv(sample).flatten(2)).sum(1)


@pytest.fixture
def sample():
    return torch.randn(6, 1, 4, 4, generator=torch.Generator().manual_seed(3))


def test_a_hub_of_one_is_a_lora():
    layer = wrapped(nn.Linear(8, 4), adapters=1)
    hub = layer.hub
    merged = layer.weight + hub.step * hub.up[0] @ hub.down[0]
    assert torch.equal(layer.quantized_weight(), layer.weight_quantizer(merged))


def test_a_new_hub_changes_nothing():
    hub = LoRAHub(4, 8, 2, 3, torch.tensor(0.1), torch.Generator().manual_seed(0))
    assert not hub.correction(1).any()


def test_a_mixed_batch_gives_each_sample_what_it_gets_at_its_own_timestep(sample):
    denoiser = Denoiser(adapters=4)
    timesteps = torch.tensor([900, 20, 500, 20, 900, 250])
    mixed = denoiser(sample, timesteps)
    alone = torch.cat([denoiser(x[None], t) for x, t in zip(sample, timesteps, strict=True)])
    torch.testing.assert_close(mixed, alone, rtol=1e-5, atol=1e-6)
    assert denoiser.router(timesteps).argmax(-1).unique(dim=0).shape[0] > 1


def test_routing_does_not_depend_on_the_order_of_calls(sample):
    denoiser = Denoiser(adapters=4)
    first = denoiser(sample, 100)
    denoiser(sample, 900)
    assert torch.equal(denoiser(sample, 100), first)


def test_the_gradient_of_a_choice_is_that_of_mixing_the_corrections(sample):
    """Against autograd through Q(W + sum of choices times corrections), one sample at a time."""
    denoiser = Denoiser(adapters=2)
    timesteps = torch.tensor([900, 20, 500, 20, 900, 250])
    denoiser.conv.weight_quantizer.scale.data.fill_(10.0)  # nothing is clipped
    denoiser.conv.routing.update(denoiser.router, timesteps)
    choices = denoiser.conv.routing.choices
    choices.retain_grad()
    target = torch.randn(6, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    (denoiser.conv(sample) * target).sum().backward()

    conv, hub = denoiser.conv, denoiser.conv.hub
    for i in range(6):
        choice = choices[i, 0].detach().clone().requires_grad_(True)
        mixed = sum(choice[k] * hub.correction(k).detach() for k in range(2)).view_as(conv.weight)
        weight = conv.weight_quantizer(conv.weight.detach() + mixed)
        x = conv.input_quantizer(sample[i : i + 1])
        (conv.compute(x, weight, conv.bias) * target[i]).sum().backward()
        torch.testing.assert_close(choices.grad[i, 0], choice.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(4, 6), (5, 4)),
        (nn.Linear(4, 6), (5, 3, 4)),
        (nn.Conv1d(4, 6, 3, padding=1), (5, 4, 7)),
        (nn.Conv2d(4, 6, 3, stride=2), (5, 4, 7, 7)),
        (nn.Conv2d(4, 6, 3, groups=2), (5, 4, 7, 7)),
    ],
)
def test_the_gain_of_an_adapter_is_what_its_correction_adds_along_the_gradient(layer, shape):
    layer = wrapped(layer, adapters=3)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    grad = torch.randn(layer(x).shape, generator=torch.Generator().manual_seed(2))
    corrections = [layer.hub.correction(k).view_as(layer.weight) for k in range(3)]
    added = [layer.compute(x, correction, None) for correction in corrections]
    expected = torch.stack([(grad * y).flatten(1).sum(1) for y in added], dim=1)
    torch.testing.assert_close(layer.gains(x, grad), expected, rtol=1e-4, atol=1e-4)


def test_in_turns_each_layer_gives_the_router_its_gradient_once_and_as_much(sample):
    denoiser = Denoiser(adapters=2)
    denoiser.conv.weight_quantizer.scale.data.fill_(10.0)  # nothing is clipped

    def gradient(turn):
        denoiser.conv.routing.turn = turn
        denoiser.zero_grad(set_to_none=False)
        denoiser(sample, 100).sum().backward()
        return denoiser.router.mlp[2].weight.grad.clone()

    denoiser(sample, 100).sum().backward()
    turns = [gradient(turn) for turn in range(TURNS)]
    assert [bool(each.any()) for each in turns] == [True, False, False, True]
    torch.testing.assert_close(sum(turns) / TURNS, gradient(None))


def test_the_router_and_the_chosen_adapters_learn(sample):
    denoiser = Denoiser(adapters=2)
    denoiser(sample, 100).square().sum().backward()
    assert denoiser.router.mlp[2].weight.grad.abs().sum() > 0
    assert denoiser.conv.hub.up.grad.abs().sum() > 0


def test_the_gradient_of_a_choice_does_not_overflow_in_half_precision(sample):
    layer, draw = Denoiser(adapters=2).conv, torch.Generator().manual_seed(1)
    grad = 1000 * torch.randn(6, 4, 4, 4, generator=draw)
    wide, narrow = layer.gains(50 * sample, grad), layer.gains(50 * sample.half(), grad.half())
    assert wide.abs().max() > torch.finfo(torch.float16).max
    torch.testing.assert_close(narrow, wide, rtol=1e-2, atol=1e3)


def test_the_output_of_a_routed_layer_can_be_changed_in_place(sample):
    denoiser = Denoiser(adapters=2)
    denoiser.conv.routing.update(denoiser.router, torch.tensor([100]))
    denoiser.conv(sample).add_(1).sum().backward()
    assert denoiser.router.mlp[2].weight.grad.any()


def test_the_gradient_path_of_the_router_adds_nothing_to_the_output(sample):
    denoiser = Denoiser(adapters=2)
    with_gradients = denoiser(sample, 100)
    with torch.no_grad():
        assert torch.equal(denoiser(sample, 100), with_gradients)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("dimensions", [1, 2])
def test_low_rank_application_is_that_of_the_product(groups, dimensions):
    make = nn.Conv1d if dimensions == 1 else nn.Conv2d
    conv = make(4, 6, 3, stride=2, padding=1, groups=groups)
    layer = wrapped(conv, adapters=1)
    down, up = layer.hub.factors(0)
    x = torch.randn(2, 4, *(8,) * dimensions)
    expected = layer.compute(x, (up @ down).view_as(conv.weight), None)
    torch.testing.assert_close(layer.low_rank(x, down, up), expected, rtol=1e-4, atol=1e-5)


def test_packing_keeps_the_outputs_bit_for_bit(sample):
    denoiser = Denoiser(adapters=2)
    with torch.no_grad():
        before = denoiser(sample, torch.tensor([900, 20, 500, 20, 900, 250]))
        pack(denoiser)
        after = denoiser(sample, torch.tensor([900, 20, 500, 20, 900, 250]))
    assert torch.equal(before, after)
    assert denoiser.conv.adapters == 2
    assert denoiser.conv.codes.shape == (2 * 4 * 1 * 3 * 3 // 2,)


def test_a_copy_routes_by_itself(sample):
    denoiser = Denoiser(adapters=2)
    twin = copy.deepcopy(denoiser)
    assert twin.conv.routing is twin.linear.routing
    assert twin.conv.routing is not denoiser.conv.routing
    assert torch.equal(twin(sample, 100), denoiser(sample, 100))


def test_a_batch_at_one_timestep_is_routed_once():
    routing = Routing()
    routing.update(LearnedRouter(2, 2), torch.tensor([7, 7, 7]))
    assert routing.choices.shape == (1, 2, 2)


@pytest.fixture
def counted():
    """A frozen denoiser, without gradients, and a list that grows when its router runs."""
    denoiser, calls = Denoiser(adapters=4).requires_grad_(False), []
    denoiser.router.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        yield denoiser, calls


def test_the_router_runs_once_for_each_timestep(counted, sample):
    denoiser, calls = counted
    times = (900, torch.tensor(500), torch.full((6,), 20))
    first = [denoiser(sample, t) for t in times]
    assert len(calls) == 3
    again = [denoiser(sample, t) for t in times]
    assert len(calls) == 3
    assert all(map(torch.equal, first, again))
    assert len({winners.numpy().tobytes() for winners in denoiser.conv.routing.table.values()}) > 1


def test_the_router_runs_each_time_where_a_gradient_is_wanted(counted, sample):
    denoiser, calls = counted
    denoiser(sample, 100)
    denoiser.router.requires_grad_(True)
    with torch.enable_grad():
        denoiser(sample, 100).sum().backward()
    assert len(calls) == 2
    assert denoiser.router.mlp[2].weight.grad.any()
    denoiser(sample, 100)
    assert len(calls) == 3


def train(denoiser, sample):
    """Take a step that changes most choices, with the optimizer of fine-tuning."""
    router = denoiser.router.requires_grad_(True)
    optimizer = torch.optim.AdamW(router.parameters(), lr=1.0, fused=True)
    with torch.enable_grad():
        denoiser(sample, 100).sum().backward()
    optimizer.step()


def train_and_freeze(denoiser, sample):
    train(denoiser, sample)
    denoiser.requires_grad_(False)


def load_another(denoiser, _):
    other = LearnedRouter(2, 4, torch.Generator().manual_seed(5))
    denoiser.router.load_state_dict(other.state_dict())


def replace_router(denoiser, _):
    router = LearnedRouter(2, 4, torch.Generator().manual_seed(5))
    denoiser.router = router.requires_grad_(False)


@pytest.mark.parametrize("change", [train, train_and_freeze, load_another, replace_router])
def test_a_router_that_was_changed_runs_again(counted, sample, change):
    denoiser, _ = counted
    times = torch.arange(0, 1000, 100)
    before = torch.cat([denoiser.router(t[None]).argmax(-1) for t in times])
    for t in times:
        denoiser(sample, t)
    change(denoiser, sample)
    after = torch.cat([denoiser.router(t[None]).argmax(-1) for t in times])
    assert not torch.equal(before, after)
    for t, winners in zip(times, after, strict=True):
        denoiser(sample, t)
        assert torch.equal(denoiser.conv.routing.winners[0], winners)


def test_segments_that_were_moved_are_looked_up_again():
    routing, router = Routing(), SegmentRouter(1, 2, torch.tensor([500.0]))
    with torch.no_grad():
        routing.update(router, torch.tensor([300]))
        router.boundaries.fill_(200)
        routing.update(router, torch.tensor([300]))
    assert routing.winners.item() == 1


def test_a_table_of_choices_does_not_grow_without_end(monkeypatch):
    monkeypatch.setattr(talora, "KNOWN_TIMESTEPS", 3)
    routing, router = Routing(), LearnedRouter(2, 2).requires_grad_(False)
    with torch.no_grad():
        for timestep in range(10):
            routing.update(router, torch.tensor([timestep]))
            assert len(routing.table) <= 3


def test_a_lora_beside_the_weight_is_added_to_the_output_of_the_unrounded_input():
    layer = wrapped(nn.Linear(8, 4), adapters=1)
    layer.hub.beside = True
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    down, up = layer.hub.factors(0)
    sums = nn.functional.linear(layer.input_steps(x), layer.weight_steps(0))
    plain = sums * layer.input_step(0) * layer.weight_step + layer.bias
    assert torch.equal(layer(x), plain + nn.functional.linear(nn.functional.linear(x, down), up))
    with torch.no_grad():
        assert torch.equal(layer.pack()(x), layer(x))


@pytest.fixture
def branched():
    """A denoiser whose layers have a hub of branches beside their weights, one a branch besides."""
    denoiser = Denoiser(adapters=3)
    for layer in (denoiser.conv, denoiser.linear):
        layer.hub.beside = True
    draw = torch.Generator().manual_seed(2)
    down, up = (torch.randn(shape, generator=draw) for shape in ((5, 16), (16, 5)))
    denoiser.linear.branch_down, denoiser.linear.branch_up = nn.Parameter(down), nn.Parameter(up)
    return denoiser


MIXED = torch.tensor([900, 20, 500, 20, 900, 250])


def test_each_sample_gets_the_branch_of_its_adapter_beside_one_weight(branched, sample):
    conv, linear = branched.conv, branched.linear
    branched(sample, MIXED)
    winners = branched.router(MIXED).argmax(-1)
    assert len(winners.unique()) > 1
    x = conv(sample).flatten(2)
    for layer, given, found in ((conv, sample, conv(sample)), (linear, x, linear(x))):
        plain = layer.compute(
            layer.input_quantizer(given), layer.weight_quantizer(layer.weight), layer.bias
        )
        for i, adapter in enumerate(winners[:, layer.index].tolist()):
            correction = layer.hub.correction(adapter)
            if layer.branch_up is not None:
                correction = correction + layer.branch_up @ layer.branch_down
            added = layer.compute(given[i : i + 1], correction.view_as(layer.weight), None)
            expected = plain[i : i + 1] + added
            torch.testing.assert_close(found[i : i + 1], expected, rtol=1e-4, atol=1e-4)


def test_the_gradient_of_a_choice_among_branches_is_that_of_mixing_them(branched, sample):
    conv = branched.conv
    conv.routing.update(branched.router, MIXED)
    choices = conv.routing.choices
    choices.retain_grad()
    target = torch.randn(6, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    (conv(sample) * target).sum().backward()
    for i in range(6):
        choice = choices[i, 0].detach().clone().requires_grad_(True)
        mixed = sum(choice[k] * conv.hub.correction(k).detach() for k in range(3))
        added = conv.compute(sample[i : i + 1], mixed.view_as(conv.weight), None)
        (added * target[i]).sum().backward()
        torch.testing.assert_close(choices.grad[i, 0], choice.grad, rtol=1e-4, atol=1e-4)
    assert conv.hub.up.grad.flatten(1).any(1).sum() == len(conv.routing.winners[:, 0].unique())


def test_packing_a_hub_of_branches_keeps_the_outputs_and_one_weight(branched, sample):
    with torch.no_grad():
        before = branched(sample, MIXED), branched(sample, 900)
        pack(branched)
        assert torch.equal(branched(sample, MIXED), before[0])
        assert torch.equal(branched(sample, 900), before[1])
    for layer, rank in ((branched.conv, 2), (branched.linear, 2 + 5)):
        assert (layer.adapters, layer.choices) == (1, 3)
        assert (layer.formats.branch_rank, layer.formats.branch_adapters) == (rank, 3)
        assert len(layer.codes) == layer.weight_shape.numel() // 2
