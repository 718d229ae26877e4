"""Denoisers whose weights are offloaded are quantized to the same bits as others."""

import accelerate
import families
import pytest
import torch
from diffusers.hooks import apply_group_offloading
from torch import nn

from msfp import InputError, QuantizationConfig, load, pack, quantize, save
from msfp.config import RefinementConfig
from msfp.layers.base import quantized_layers
from msfp.layers.trainable import trainable_layers
from msfp.support import offloading

CPU = torch.device("cpu")
CONFIG = QuantizationConfig(refine=RefinementConfig(samples=8, branch_rank=2), end_bits=4)


class Network(nn.Module):
    """Layers that are called directly and in blocks, a buffer, and a parameter of its own."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.SiLU()) for _ in range(3))
        self.norm, self.out = nn.BatchNorm1d(8), nn.Linear(8, 8)
        self.shift = nn.Parameter(torch.randn(8))

    def forward(self, x):
        for block in self.blocks:
            x = x + block(x + self.shift)
        return self.out(self.norm(x))


def call(network):
    return network(torch.randn(16, 8, generator=torch.Generator().manual_seed(1)))


def by_a_map(network, folder):
    parts = [name for name, _ in network.named_children()] + ["shift"]
    places = {name: "disk" if name == "blocks" else "cpu" for name in parts}
    accelerate.dispatch_model(network, places, CPU, offload_dir=folder)


def groups(kind, **more):
    return lambda network, _: apply_group_offloading(network, CPU, CPU, kind, **more)


WAYS = {
    "in memory": lambda network, _: accelerate.cpu_offload(network, CPU),
    "with buffers": lambda network, _: accelerate.cpu_offload(network, CPU, offload_buffers=True),
    "on a disk": lambda network, folder: accelerate.disk_offload(network, folder, CPU),
    "by a map": by_a_map,
    "as a whole": lambda network, _: accelerate.cpu_offload_with_hook(network, CPU),
    "by leaves": groups("leaf_level"),
    "by blocks": groups("block_level", num_blocks_per_group=1),
    "by leaves on a disk": lambda network, folder: groups(
        "leaf_level", offload_to_disk_path=str(folder)
    )(network, folder),
}


def tensors(network, folder):
    """What is saved of a packed network."""
    save(network, folder)
    return load(folder, into=Network()).state_dict()


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    network = Network().eval()
    quantize(network, CONFIG, calibration=call)
    pack(network)
    return tensors(network, tmp_path_factory.mktemp("expected")), call(network)


@pytest.mark.filterwarnings("ignore:.*device_map keys do not match:UserWarning")
@pytest.mark.parametrize("way", WAYS)
def test_offloading_of_the_denoiser_changes_no_bit(way, expected, tmp_path):
    network = Network().eval()
    WAYS[way](network, tmp_path / "away")
    before = call(network)
    away = {name for name, each in network.named_parameters() if each.is_meta}
    quantize(network, CONFIG, calibration=call, state=tmp_path / "state")
    assert len(trainable_layers(network)) == 4
    assert away <= {name for name, each in network.named_parameters() if each.is_meta}
    assert not torch.equal(call(network), before)
    pack(network)
    assert torch.equal(call(network), expected[1])
    found = tensors(network, tmp_path / "packed")
    assert found.keys() == expected[0].keys()
    assert all(torch.equal(value, expected[0][name]) for name, value in found.items())


def test_layers_that_are_moved_while_they_run_get_the_same_bits(expected, tmp_path):
    network, moved = Network().eval(), []

    def tell(_stage, _done, _total, _note="", /):
        moved.append(len(mover._host))

    # Moves copy the tensors, as those to another device do.
    with offloading._moved(network, torch.device("cpu", 0)):
        mover = offloading._mover_of(network.out)
        quantize(network, CONFIG, calibration=call, progress=tell)
        pack(network)
    assert max(moved) == 2  # the network, with a parameter of its own, and one layer
    assert not any(each._forward_pre_hooks or each._forward_hooks for each in network.modules())
    assert torch.equal(call(network), expected[1])
    found = tensors(network, tmp_path / "packed")
    assert all(torch.equal(value, expected[0][name]) for name, value in found.items())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("grouped", [False, True])
def test_on_a_gpu_one_layer_at_a_time_is_there(grouped):
    plain, away, gpu = Network().eval().to("cuda"), Network().eval(), torch.device("cuda", 0)
    if grouped:
        apply_group_offloading(away, gpu, CPU, "leaf_level")
    else:
        accelerate.cpu_offload(away, gpu)
    there = []

    def call_there(network):
        return network(torch.randn(16, 8, generator=torch.Generator().manual_seed(1)).to("cuda"))

    def tell(stage, _done, _total, _note="", /):
        if stage in ("searching", "refining"):
            weights = (p for name, p in away.named_parameters() if name.endswith(".weight"))
            there.append(sum(weight.is_cuda for weight in weights))

    quantize(plain, CONFIG, calibration=call_there)
    quantize(away, CONFIG, calibration=call_there, progress=tell)
    assert max(there) == 1
    for network in (plain, away):
        pack(network)
    assert not away.out.codes.is_cuda
    assert torch.equal(call_there(away), call_there(plain))


def test_an_error_leaves_an_offloaded_denoiser_as_it_was(tmp_path):
    network = Network().eval()
    accelerate.disk_offload(network, tmp_path, CPU)
    before = call(network)

    def fail(stage, _done, _total, _note="", /):
        if stage == "refining":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(network, CONFIG, calibration=call, progress=fail)
    assert not quantized_layers(network)
    assert network.out.weight.is_meta
    assert torch.equal(call(network), before)


def test_hooks_that_were_removed_leave_nothing_behind(expected):
    network = accelerate.cpu_offload(Network().eval(), CPU)
    accelerate.hooks.remove_hook_from_submodules(network)
    quantize(network, CONFIG, calibration=call)
    pack(network)
    assert torch.equal(call(network), expected[1])


def test_a_pipeline_is_quantized_with_all_its_components_offloaded():
    plain, pipe = (families.pipeline("unet", None) for _ in range(2))
    accelerate.cpu_offload(pipe.unet, CPU)
    config = QuantizationConfig(include=["conv_in", "*.conv1"], end_bits=4)
    for each in (plain, pipe):
        quantize(each, config, calibration=families.images)
        pack(each)
    assert pipe.unet.conv_in.codes.is_meta
    assert torch.equal(families.images(pipe), families.images(plain))


def test_weights_that_nothing_has_are_named():
    with pytest.raises(InputError, match="the weight of layer '0' has no numbers: it is on the"):
        quantize(
            nn.Sequential(nn.Linear(4, 4)).to("meta"),
            QuantizationConfig(activation_bits=None, end_bits=4),
        )
