import copy
import json

import families
import pytest
import torch
from families import pipeline
from safetensors.torch import load_file

from msfp import (
    FinetuneConfig,
    InputError,
    QuantizationConfig,
    export_adapters,
    export_lora,
    finetune,
    load,
    precompute_routing,
    quantize,
    record_trajectories,
    save,
    unpack,
)
from msfp.checkpoint.diffusers_quantizer import attach_again
from msfp.layers.lora.routers import EmbeddingRouter
from msfp.layers.lora.talora import router_of
from msfp.layers.lora.time_embedding import time_conditioning
from msfp.layers.packed import packed_layers

SHORT = {"rank": 2, "steps": 3, "batch": 4}


def call(pipe):
    """One fixed call of the tiny text-to-image pipeline."""
    options = {"height": 16, "width": 16, "num_inference_steps": 2, "output_type": "np"}
    output = pipe("a", generator=torch.Generator().manual_seed(0), **options)
    return torch.from_numpy(output.images)


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """A function of a fine-tuning's options that gives a packed conditional pipeline."""
    quantized = pipeline("conditional_unet", tmp_path_factory.mktemp("vocabulary"))
    path = record_trajectories(quantized, calls=call)
    quantize(quantized, QuantizationConfig(refine=None), calibration=call)

    def make(**options):
        pipe = copy.deepcopy(quantized)
        config = FinetuneConfig(**SHORT, guidance_branches=(-6.5, 7.5), **options)
        finetune(pipe, config, trajectories=path)
        return pipe

    return make


@pytest.fixture(scope="module")
def with_hub(tuned):
    return tuned(hub=2)


@pytest.fixture(scope="module")
def with_branch(tuned):
    return tuned(lora_position="beside")


@pytest.fixture(scope="module")
def with_branches(tuned):
    return tuned(hub=2, lora_position="beside")


def test_hub_and_router_travel_with_the_pipeline(with_hub, tmp_path):
    save(with_hub, tmp_path / "saved")
    loaded = load(tmp_path / "saved")
    loaded.set_progress_bar_config(disable=True)
    assert {layer.adapters for layer in packed_layers(loaded.unet).values()} == {2}
    assert torch.equal(call(loaded), call(with_hub))


def test_hub_and_router_travel_into_a_network_that_is_there(with_hub, tmp_path):
    save(with_hub.unet, tmp_path / "saved")
    loaded = load(tmp_path / "saved", into=families.make("conditional_unet"))
    with torch.no_grad():
        assert torch.equal(families.call(loaded, 3), families.call(with_hub.unet, 3))
        assert torch.equal(families.call(loaded, 900), families.call(with_hub.unet, 900))


def test_a_fixed_allocation_travels_as_such(tuned, tmp_path):
    pipe = tuned(hub=2, routing="segments")
    save(pipe, tmp_path / "saved")
    loaded = load(tmp_path / "saved")
    loaded.set_progress_bar_config(disable=True)
    assert loaded.unet.router.kind == "segments"
    assert torch.equal(loaded.unet.router.boundaries, pipe.unet.router.boundaries)
    assert torch.equal(call(loaded), call(pipe))


def test_a_router_that_reads_the_denoiser_travels_with_what_it_reads(with_hub, tmp_path):
    """None is made any more, but those of msfp 0.2.0 are loaded, and saved again."""
    pipe = copy.deepcopy(with_hub)
    conditioning = time_conditioning(families.make("conditional_unet"))
    pipe.unet.router = EmbeddingRouter(pipe.unet.router.layers, 2, conditioning)
    attach_again(pipe.unet)
    assert not torch.equal(call(pipe), call(with_hub))
    save(pipe, tmp_path / "saved")
    loaded = load(tmp_path / "saved")
    loaded.set_progress_bar_config(disable=True)
    assert loaded.unet.router.kind == "denoiser"
    state = loaded.unet.router.state_dict()
    assert all(torch.equal(state[n], v) for n, v in pipe.unet.router.state_dict().items())
    assert torch.equal(call(loaded), call(pipe))


def loaded_counting_queries(pipe, folder):
    """A saved pipeline as loaded, and a list that grows by one at each query of its router."""
    save(pipe, folder)
    loaded = load(folder)
    loaded.set_progress_bar_config(disable=True)
    queries = []
    loaded.unet.router.register_forward_hook(lambda *_: queries.append(1))
    return loaded, queries


def test_what_was_loaded_queries_the_router_once_for_each_timestep_of_a_sampler(with_hub, tmp_path):
    loaded, queries = loaded_counting_queries(with_hub, tmp_path / "saved")
    first = call(loaded)
    assert len(queries) == len(loaded.scheduler.timesteps)
    assert torch.equal(call(loaded), first)
    assert len(queries) == len(loaded.scheduler.timesteps)


def test_a_precomputed_routing_gives_the_same_images_without_another_query(with_hub, tmp_path):
    loaded, queries = loaded_counting_queries(with_hub, tmp_path / "saved")
    precompute_routing(loaded.unet, timesteps=loaded.scheduler.timesteps)
    assert queries
    queries.clear()
    assert torch.equal(call(loaded), call(with_hub))
    assert not queries


def test_each_adapter_is_exported_as_a_plain_packed_checkpoint(with_hub, tmp_path):
    before = call(with_hub)
    folders = export_adapters(with_hub, tmp_path / "adapters")
    assert [folder.name for folder in folders] == ["adapter-0", "adapter-1"]
    router = with_hub.unet.router
    for adapter, folder in enumerate(folders):
        config = json.loads((folder / "unet" / "config.json").read_text())["quantization_config"]
        assert config["adapters"] == 1
        loaded = load(folder)
        loaded.set_progress_bar_config(disable=True)
        assert not hasattr(loaded.unet, "router")
        with_hub.unet.router = Always(adapter, router.layers)
        assert torch.equal(call(loaded), call(with_hub))
        with_hub.unet.router = router
    assert torch.equal(call(with_hub), before)


class Always(torch.nn.Module):
    """A router that always takes one adapter."""

    def __init__(self, adapter, layers):
        super().__init__()
        self.adapter, self.layers = adapter, layers

    def forward(self, timesteps):
        adapters = torch.full((len(timesteps), self.layers), self.adapter)
        return torch.nn.functional.one_hot(adapters, 2).float()


def test_a_branch_travels_with_the_pipeline(with_branch, tmp_path):
    save(with_branch, tmp_path / "saved")
    loaded = load(tmp_path / "saved")
    loaded.set_progress_bar_config(disable=True)
    assert all(layer.branch_up is not None for layer in packed_layers(loaded.unet).values())
    assert torch.equal(call(loaded), call(with_branch))


def test_a_branch_is_exported_as_a_lora_that_diffusers_loads(with_branch, tmp_path):
    file = export_lora(with_branch, tmp_path / "lora")
    keys = set(load_file(file))
    assert "unet.conv_in.lora_A.weight" in keys
    assert "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q.lora_B.weight" in keys
    loaded = load(tmp_path / "lora")
    loaded.set_progress_bar_config(disable=True)
    bare = call(loaded)
    loaded.load_lora_weights(tmp_path / "lora")
    torch.testing.assert_close(call(loaded), call(with_branch), atol=1e-4, rtol=1e-4)
    assert (call(loaded) - bare).abs().max() > 1e-3


def test_a_hub_of_branches_travels_with_the_pipeline(with_branches, tmp_path):
    save(with_branches, tmp_path / "saved")
    config = json.loads((tmp_path / "saved/unet/config.json").read_text())["quantization_config"]
    assert config["adapters"] == 2
    assert {layer["branch_adapters"] for layer in config["layers"].values()} == {2}
    loaded = load(tmp_path / "saved")
    loaded.set_progress_bar_config(disable=True)
    assert {layer.adapters for layer in packed_layers(loaded.unet).values()} == {1}
    assert len(router_of(loaded.unet)(torch.arange(1000)).argmax(-1).unique()) == 2
    assert torch.equal(call(loaded), call(with_branches))
    with pytest.raises(InputError, match="has 2 weights or low-rank branches"):
        unpack(loaded, original=with_branches)


def test_each_branch_of_a_hub_is_exported_as_a_checkpoint_and_from_there_as_a_lora(
    with_branches, tmp_path
):
    with pytest.raises(InputError, match="export_adapters writes a checkpoint for each"):
        export_lora(with_branches, tmp_path / "lora")
    router = with_branches.unet.router
    for adapter, folder in enumerate(export_adapters(with_branches, tmp_path / "adapters")):
        single = load(folder)
        single.set_progress_bar_config(disable=True)
        assert not hasattr(single.unet, "router")
        with_branches.unet.router = Always(adapter, router.layers)
        torch.testing.assert_close(call(single), call(with_branches), atol=1e-5, rtol=1e-5)
        with_branches.unet.router = router
        assert export_lora(single, tmp_path / f"lora-{adapter}").is_file()


def test_what_has_nothing_to_export_is_refused(with_hub, with_branch, tmp_path):
    with pytest.raises(InputError, match="LoRAs beside weights"):
        export_lora(with_hub, tmp_path / "lora")
    with pytest.raises(InputError, match="a hub of several LoRAs"):
        export_adapters(with_branch, tmp_path / "adapters")
    for export in (export_lora, export_adapters):
        with pytest.raises(InputError, match="model must be of the type DiffusionPipeline, not UN"):
            export(with_hub.unet, tmp_path / "unet")
    assert not list(tmp_path.iterdir())
