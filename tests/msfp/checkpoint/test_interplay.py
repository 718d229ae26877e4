"""Features of diffusers with a packed denoiser: each works, or is refused in one sentence."""

import copy
import io
import pickle
import subprocess
import sys

import pytest
import torch
from accelerate import cpu_offload, disk_offload, load_checkpoint_and_dispatch
from diffusers import (
    AutoModel,
    AutoPipelineForImage2Image,
    AutoPipelineForText2Image,
    ControlNetModel,
    DiffusionPipeline,
    FasterCacheConfig,
    FirstBlockCacheConfig,
    FluxPipeline,
    PipelineQuantizationConfig,
    PyramidAttentionBroadcastConfig,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPAGPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UniPCMultistepScheduler,
)
from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from families import call, images, load_pipeline, make, pipeline, quantized
from packaging.version import Version
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from torch import nn
from torch.nn import functional as F

import msfp
from msfp import InputError, MSFPConfig, QuantizationConfig, cache_weights, pack, quantize
from msfp.layers.packed import packed_layers

CPU = torch.device("cpu")
FILE = "diffusion_pytorch_model.safetensors"
TARGETS = ["to_q", "to_out.0", "conv1", "conv_in"]
NO_CHECKER = {"safety_checker": None, "feature_extractor": None}
FOUR_BITS = MSFPConfig(weight_bits=4, include=["mid_block"], end_bits=4)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A folder, and the full-precision pipeline that is saved to `folder / "plain"`."""
    folder = tmp_path_factory.mktemp("pipes")
    pipe = pipeline("conditional_unet", folder / "vocabulary")
    pipe.save_pretrained(folder / "plain")
    return folder, pipe


@pytest.fixture(scope="module")
def packed(plain):
    """The folder, and a packed copy of the pipeline that is saved to `folder / "packed"`."""
    folder, pipe = plain
    pipe = copy.deepcopy(pipe)
    quantized(pipe.unet, attention_bits=4)
    pipe.save_pretrained(folder / "packed")
    return folder, pipe


@pytest.fixture(scope="module")
def before(packed):
    """The prediction of the packed U-Net, and the images of its pipeline."""
    return call(packed[1].unet), images(packed[1])


@pytest.fixture
def pipe(packed):
    """A copy of the packed pipeline."""
    return copy.deepcopy(packed[1])


@pytest.fixture
def unet(packed):
    """A copy of the denoiser of the packed pipeline."""
    return copy.deepcopy(packed[1].unet)


@pytest.fixture(scope="module")
def packed_flux():
    return quantized(make("flux"), attention_bits=4)


def trainable():
    denoiser = make("pixart")
    quantize(denoiser, QuantizationConfig(refine=None), calibration=call)
    return denoiser


def lora(denoiser, pipeline_class, folder, layers, targets):
    """The folder of a LoRA file for a full-precision denoiser, and what is in it."""
    denoiser = copy.deepcopy(denoiser)
    torch.manual_seed(0)
    config = LoraConfig(r=2, lora_alpha=2, target_modules=targets, init_lora_weights=False)
    denoiser.add_adapter(config)
    tensors = get_peft_model_state_dict(denoiser)
    pipeline_class.save_lora_weights(folder, **{layers: tensors})
    return folder, tensors


def with_lora(denoiser, tensors):
    """A copy of a denoiser that adds a LoRA to the outputs of its layers."""
    denoiser = copy.deepcopy(denoiser)
    for key, down in tensors.items():
        name, half, _ = key.partition(".lora_A.")
        if half:
            layer = denoiser.get_submodule(name)
            up = tensors[f"{name}.lora_B.weight"]
            layer.register_forward_hook(lambda m, x, y, a=down, b=up: y + product(m, x[0], a, b))
    return denoiser


def product(layer, x, down, up):
    if down.dim() == 2:
        return F.linear(F.linear(x, down), up)
    return F.conv2d(F.conv2d(x, down, stride=layer.stride, padding=layer.padding), up)


# Files


@pytest.mark.parametrize("arguments", [
    {"variant": "fp16", "max_shard_size": "40KB"},
    pytest.param({"variant": "fp16"}, marks=pytest.mark.slow),
    pytest.param({"max_shard_size": "40KB"}, marks=pytest.mark.slow),
], ids=str)  # fmt: skip
def test_shards_and_variants_are_read_as_they_were_written(
    plain, packed, before, tmp_path, arguments
):
    packed[1].save_pretrained(tmp_path / "packed", **arguments)
    plain[1].unet.save_pretrained(tmp_path / "plain", **arguments)
    variant = {k: v for k, v in arguments.items() if k == "variant"}
    assert torch.equal(images(load_pipeline(tmp_path / "packed", **variant)), before[1])
    assert torch.equal(images(msfp.load(tmp_path / "packed")), before[1])
    load = UNet2DConditionModel.from_pretrained
    narrow = load(tmp_path / "plain", quantization_config=FOUR_BITS, **variant)
    whole = load(plain[0] / "plain", subfolder="unet", quantization_config=FOUR_BITS)
    assert torch.equal(call(narrow), call(whole))


@pytest.mark.parametrize("load", [
    lambda folder: UNet2DConditionModel.from_pretrained(folder, subfolder="unet"),
    lambda folder: UNet2DConditionModel.from_pretrained(folder / "unet", use_safetensors=True),
    lambda folder: UNet2DConditionModel.from_pretrained(folder / "unet", device_map="auto"),
    lambda folder: AutoModel.from_pretrained(str(folder), subfolder="unet"),
])  # fmt: skip
def test_a_denoiser_is_loaded_in_every_way_of_diffusers(packed, before, load):
    assert torch.equal(call(load(packed[0] / "packed")), before[0])


@pytest.mark.parametrize("load", [
    lambda folder, _: load_pipeline(folder / "packed", device_map="balanced"),
    lambda folder, _: AutoPipelineForText2Image.from_pretrained(folder / "packed", **NO_CHECKER),
    lambda folder, pipe: DiffusionPipeline.from_pretrained(
        folder / "plain", unet=pipe.unet, **NO_CHECKER
    ),
    lambda _, pipe: AutoPipelineForText2Image.from_pipe(AutoPipelineForImage2Image.from_pipe(pipe)),
    lambda _, pipe: StableDiffusionPipeline.from_pipe(
        StableDiffusionImg2ImgPipeline.from_pipe(pipe)
    ),
])  # fmt: skip
def test_a_pipeline_is_made_in_every_way_of_diffusers(packed, before, load):
    assert torch.equal(images(load(*packed)), before[1])


def test_weights_are_quantized_from_pickles_and_single_files(plain, tmp_path):
    folder, pipe = plain
    pipe.unet.save_pretrained(tmp_path, safe_serialization=False)
    load = UNet2DConditionModel.from_pretrained
    expected = call(load(folder / "plain" / "unet", quantization_config=FOUR_BITS))
    pickled = load(tmp_path, use_safetensors=False, quantization_config=FOUR_BITS)
    assert torch.equal(call(pickled), expected)
    unet = folder / "plain" / "unet"
    single = UNet2DConditionModel.from_single_file(
        str(unet / FILE), config=str(unet), quantization_config=FOUR_BITS
    )
    assert torch.equal(call(single), expected)


@pytest.mark.parametrize(
    "dtype", [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.slow)]
)
def test_a_pipeline_that_was_cast_is_saved_and_loaded(pipe, packed, tmp_path, dtype):
    pipe.to(dtype).save_pretrained(tmp_path)
    again = load_pipeline(tmp_path, torch_dtype=dtype)
    assert torch.equal(call(again.unet), call(pipe.unet))
    assert torch.equal(again.unet.conv_in.codes, packed[1].unet.conv_in.codes)
    assert torch.equal(again.unet.conv_in.weight_scale, packed[1].unet.conv_in.weight_scale)
    assert not packed_layers(again.vae)


@pytest.mark.parametrize("arguments", [
    {"quant_backend": "msfp", "quant_kwargs": {"weight_bits": 4, "end_bits": 4}},
    {"quant_mapping": {"text_encoder": FOUR_BITS}},
])  # fmt: skip
def test_text_encoders_are_refused(plain, arguments):
    config = PipelineQuantizationConfig(**arguments)
    with pytest.raises(InputError, match="no text encoders of transformers: name those of diff"):
        load_pipeline(plain[0] / "plain", quantization_config=config)


@pytest.mark.parametrize("source", ["packed", "plain"])
def test_a_device_map_with_a_disk_is_refused(packed, tmp_path, source):
    names = dict.fromkeys((name for name, _ in packed[1].unet.named_children()), "cpu")
    with pytest.raises(InputError, match="device_map must not send modules to a disk"):
        UNet2DConditionModel.from_pretrained(
            packed[0] / source / "unet",
            device_map=names | {"mid_block": "disk"},
            offload_folder=tmp_path,
            quantization_config=FOUR_BITS,
        )


@pytest.mark.slow
def test_without_msfp_diffusers_says_that_it_does_not_know_the_method(packed):
    code = "import sys, diffusers; diffusers.UNet2DConditionModel.from_pretrained(sys.argv[1])"
    folder = str(packed[0] / "packed" / "unet")
    done = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True)  # noqa: S603
    assert "ValueError: Unknown quantization type, got msfp - supported types are" in done.stderr


# Features that change nothing


def by_torch_save(denoiser):
    file = io.BytesIO()
    torch.save(denoiser, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def by_state_dict(denoiser):
    file = io.BytesIO()
    torch.save(denoiser.state_dict(), file)
    file.seek(0)
    denoiser.to("meta").load_state_dict(torch.load(file, weights_only=True), assign=True)


def chunked(denoiser):
    for module in denoiser.modules():
        if hasattr(module, "set_chunk_feed_forward"):
            module.set_chunk_feed_forward(4, 1)


def checkpointed(denoiser):
    denoiser.enable_gradient_checkpointing()
    denoiser.train()


SAME = {
    "offloaded by accelerate": lambda unet: cpu_offload(unet, CPU, offload_buffers=True),
    "offloaded by leaves": lambda unet: unet.enable_group_offload(CPU, CPU, "leaf_level"),
    "offloaded by blocks": lambda unet: unet.enable_group_offload(CPU, CPU, "block_level", 1),
    "cast by layers": lambda unet: unet.enable_layerwise_casting(
        torch.float8_e4m3fn, torch.float32
    ),
    "copied": copy.deepcopy,
    "pickled": lambda unet: pickle.loads(pickle.dumps(unet)),  # noqa: S301
    "saved by torch": by_torch_save,
    "its state loaded": by_state_dict,
    "another processor": lambda unet: unet.set_attn_processor(AttnProcessor2_0()),
    "feed-forward in chunks": chunked,
    "gradient checkpointing": checkpointed,
}


@pytest.mark.parametrize("feature", SAME)
def test_the_prediction_stays(unet, before, feature):
    changed = SAME[feature](unet)
    assert torch.equal(call(unet if changed is None else changed), before[0])


@pytest.mark.slow
def test_a_denoiser_is_offloaded_to_a_disk_and_dispatched_from_a_file(packed, before, tmp_path):
    offloaded, dispatched = (copy.deepcopy(packed[1].unet) for _ in range(2))
    disk_offload(offloaded, str(tmp_path), execution_device=CPU, offload_buffers=True)
    assert torch.equal(call(offloaded), before[0])
    file = packed[0] / "packed" / "unet" / FILE
    load_checkpoint_and_dispatch(dispatched.to("meta"), str(file), device_map={"": "cpu"})
    assert torch.equal(call(dispatched), before[0])


@pytest.mark.parametrize("enable", [
    lambda pipe: pipe.enable_model_cpu_offload(device="cpu"),
    lambda pipe: pipe.enable_group_offload(CPU, CPU, "leaf_level"),
    lambda pipe: pipe.vae.enable_slicing(),
])  # fmt: skip
def test_the_images_of_a_pipeline_stay(pipe, before, enable):
    enable(pipe)
    assert torch.equal(images(pipe), before[1])


def test_steps_are_watched_and_interrupted(pipe, before):
    seen = []

    def watch(pipe, step, _, values):
        seen.append(step)
        pipe._interrupt = step == 2
        return values

    draw = torch.Generator().manual_seed(0)
    arguments = {"height": 16, "width": 16, "output_type": "np", "callback_on_step_end": watch}
    watched = pipe("a", num_inference_steps=2, generator=draw, **arguments).images
    assert torch.equal(torch.from_numpy(watched), before[1])
    pipe("a", num_inference_steps=9, **arguments)
    assert seen == [0, 1, 0, 1, 2]


def test_another_scheduler_is_saved_with_the_pipeline(pipe, tmp_path):
    pipe.scheduler = UniPCMultistepScheduler.from_config(pipe.scheduler.config)
    pipe.save_pretrained(tmp_path)
    assert torch.equal(images(load_pipeline(tmp_path)), images(pipe))


def test_cached_weights_are_those_of_the_state_that_is_loaded(unet):
    turned = {k: v.flip(0) if k.endswith(".codes") else v for k, v in unet.state_dict().items()}
    cache_weights(unet)
    unet.load_state_dict(turned)
    cached = call(unet)
    cache_weights(unet, enabled=False)
    assert torch.equal(cached, call(unet))


@pytest.mark.slow
def test_an_exported_denoiser_gives_the_same_bits():
    denoiser, x = quantized(make("pixart"), attention_bits=4), torch.randn(2, 4, 8, 8)
    arguments = {"encoder_hidden_states": torch.randn(2, 5, 8), "timestep": torch.tensor([5, 5])}
    arguments["return_dict"] = False
    with torch.no_grad():
        exported = torch.export.export(denoiser, (x,), arguments, strict=False).module()
        assert torch.equal(exported(x, **arguments)[0], denoiser(x, **arguments)[0])


# Features that change something, and come off again


def with_cache(denoiser, config):
    """How often attention ran for five timesteps with a cache, which is then taken off again."""
    now, runs, before = [0], [], call(denoiser)
    config = copy.copy(config)
    config.current_timestep_callback = lambda: now[0]
    denoiser.enable_cache(config)
    for module in denoiser.modules():
        if type(module).__name__ == "FluxAttention":
            module.to_q.register_forward_hook(lambda *_: runs.append(1))
    with denoiser.cache_context("prompt"):
        for now[0] in (999, 800, 500, 400, 300):
            assert call(denoiser, now[0]).isfinite().all()
    denoiser.disable_cache()
    assert torch.equal(call(denoiser), before)
    return len(runs)


@pytest.mark.parametrize("config", [
    FirstBlockCacheConfig(threshold=100.0),
    PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2, spatial_attention_timestep_skip_range=(0, 950)
    ),
    FasterCacheConfig(
        attention_weight_callback=lambda _: 0.3, tensor_format="BCHW", is_guidance_distilled=True
    ),
], ids=lambda config: type(config).__name__)  # fmt: skip
def test_caches_skip_what_they_skip_in_full_precision(packed_flux, config):
    runs = with_cache(copy.deepcopy(packed_flux), config)
    assert runs == with_cache(make("flux"), config) < 12


def test_freeu_is_turned_on_and_off(pipe, before):
    pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    assert not torch.equal(images(pipe), before[1])
    pipe.disable_freeu()
    assert torch.equal(images(pipe), before[1])


def test_a_textual_inversion_is_loaded_and_unloaded(pipe, before):
    pipe.load_textual_inversion({"<new>": torch.randn(1, 8)})
    pipe("a <new>", num_inference_steps=1, height=16, width=16)
    pipe.unload_textual_inversion()
    assert torch.equal(images(pipe), before[1])


def test_a_lora_is_added_to_the_outputs_of_packed_layers(plain, pipe, before, tmp_path):
    loras = [
        lora(plain[1].unet, StableDiffusionPipeline, tmp_path / name, "unet_lora_layers", targets)
        for name, targets in (("a", TARGETS), ("b", ["to_k"]))
    ]
    expected = call(with_lora(pipe.unet, loras[0][1]))
    pipe.load_lora_weights(tmp_path / "a", adapter_name="a")
    assert torch.equal(call(pipe.unet), expected)
    pipe.disable_lora()
    assert torch.equal(call(pipe.unet), before[0])
    pipe.enable_lora()
    pipe.load_lora_weights(tmp_path / "b", adapter_name="b")
    pipe.set_adapters(["a", "b"], [1.0, 0.5])
    assert not torch.equal(call(pipe.unet), expected)
    pipe.delete_adapters("b")
    assert torch.equal(call(pipe.unet), expected)
    with pytest.raises(InputError, match=r"nothing can be merged into it.*dequantize\(\)"):
        pipe.fuse_lora()
    assert torch.equal(call(pipe.unet), expected)
    pipe.unload_lora_weights()
    assert torch.equal(images(pipe), before[1])


def test_a_lora_of_flux_is_loaded_although_its_loader_compares_shapes(packed_flux, tmp_path):
    pipe = pipeline("flux", tmp_path)
    plain, pipe.transformer = pipe.transformer, copy.deepcopy(packed_flux)
    arguments = tmp_path / "lora", "transformer_lora_layers", ["to_q", "x_embedder"]
    folder, tensors = lora(plain, FluxPipeline, *arguments)
    for name in ("first", "second"):
        pipe.load_lora_weights(folder, adapter_name=name)
    pipe.set_adapters(["first"])
    assert torch.equal(call(pipe.transformer), call(with_lora(packed_flux, tensors)))
    pipe.unload_lora_weights()
    assert torch.equal(call(pipe.transformer), call(packed_flux))
    wide = {
        "transformer.x_embedder.lora_A.weight": torch.randn(2, 32),
        "transformer.x_embedder.lora_B.weight": torch.randn(32, 2),
    }
    with pytest.raises(InputError, match="the weight of a quantized layer is packed"):
        pipe.load_lora_weights(wide)


def test_a_dora_starts_from_the_packed_weights(unet, before):
    unet.add_adapter(LoraConfig(r=2, target_modules=TARGETS, use_dora=True))
    torch.testing.assert_close(call(unet), before[0])


def test_names_of_weights_are_looked_up_but_not_stored(packed_flux):
    state = packed_flux.state_dict()
    assert state["x_embedder.weight"].shape == (32, 16)
    assert "x_embedder.weight" not in state
    assert type(copy.deepcopy(state)) is not type(state)
    for absent in (state, state.copy()):
        with pytest.raises(KeyError, match="nowhere"):
            absent["nowhere.weight"]


def ip_adapter(unet):
    """An IP-Adapter of random weights for a U-Net: four tokens of an embedding of six numbers."""
    torch.manual_seed(0)
    modules = [name for name in unet.attn_processors if "attn2" in name]
    layers = {}
    for index, name in enumerate(modules):
        width = unet.get_submodule(name.removesuffix(".processor")).to_k.out_features
        for key in ("to_k_ip", "to_v_ip"):
            layers[f"{2 * index + 1}.{key}.weight"] = torch.randn(width, 8)
    image = {"proj.weight": torch.randn(32, 6), "proj.bias": torch.randn(32)}
    image |= {"norm.weight": torch.ones(8), "norm.bias": torch.zeros(8)}
    return {"image_proj": image, "ip_adapter": layers}


def test_an_ip_adapter_is_loaded_and_unloaded(pipe, before, tmp_path):
    arguments = {"subfolder": "", "weight_name": [""], "image_encoder_folder": None}
    pipe.load_ip_adapter([ip_adapter(pipe.unet)], **arguments)
    shown = []
    for scale in (0.0, 1.0):
        pipe.set_ip_adapter_scale(scale)
        shown.append(
            torch.from_numpy(
                pipe(
                    "a", ip_adapter_image_embeds=[torch.ones(2, 1, 6)], num_inference_steps=2,
                    generator=torch.Generator().manual_seed(0), output_type="np",
                    height=16, width=16,
                ).images
            )
        )  # fmt: skip
    assert torch.equal(shown[0], before[1])
    assert not torch.equal(shown[1], before[1])
    with pytest.raises(InputError, match=r"'down_blocks.*to_k_ip.0' was added to the denoiser"):
        pipe.save_pretrained(tmp_path)
    pipe.unload_ip_adapter()
    assert torch.equal(images(pipe), before[1])


def test_a_controlnet_runs_beside_a_packed_unet(plain, packed, before, tmp_path):
    torch.manual_seed(0)
    network = ControlNetModel.from_unet(plain[1].unet, conditioning_embedding_out_channels=(4, 4))
    for parameter in network.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    pipe = StableDiffusionControlNetPipeline.from_pipe(packed[1], controlnet=network.eval())
    pipe.save_pretrained(tmp_path)
    again = load_pipeline(tmp_path)
    made = [
        torch.from_numpy(
            each(
                "a", image=torch.ones(1, 3, 16, 16), controlnet_conditioning_scale=scale,
                generator=torch.Generator().manual_seed(0), num_inference_steps=2,
                height=16, width=16, output_type="np",
            ).images
        )
        for each, scale in ((pipe, 0.0), (pipe, 1.0), (again, 1.0))
    ]  # fmt: skip
    assert torch.equal(made[0], before[1])
    assert not torch.equal(made[1], before[1])
    assert torch.equal(made[2], made[1])


def test_perturbed_attention_runs_on_a_packed_unet(pipe, before):
    pipe = StableDiffusionPAGPipeline.from_pipe(pipe, pag_applied_layers=["mid"])
    made = [
        torch.from_numpy(
            pipe(
                "a", pag_scale=scale, generator=torch.Generator().manual_seed(0),
                num_inference_steps=2, height=16, width=16, output_type="np",
            ).images
        )
        for scale in (0.0, 3.0)
    ]  # fmt: skip
    assert torch.equal(made[0], before[1])
    assert not torch.equal(made[1], before[1])


# Refusals


PACKED_REFUSES = {
    "fused projections": (
        lambda unet, _: unet.fuse_qkv_projections(),
        r"nothing can be merged into it or fused with it.*dequantize\(\)",
    ),
    "another computation of attention": (
        lambda unet, _: (unet.set_attn_processor(AttnProcessor()), call(unet)),
        "AttnProcessor does not call scaled dot-product attention, which quantized products need",
    ),
    "attention in slices": (
        lambda unet, _: (unet.set_attention_slice("auto"), call(unet)),
        "SlicedAttnProcessor does not call scaled dot-product attention",
    ),
    "torch.jit.trace": (
        lambda unet, _: torch.jit.trace(
            unet, (torch.randn(2, 4, 8, 8), torch.tensor(5), torch.randn(2, 5, 8))
        ),
        "cannot be traced by torch.jit: use torch.export",
    ),
    "saving while it is offloaded": (
        lambda unet, folder: (cpu_offload(unet, CPU), unet.save_pretrained(folder)),
        r"is offloaded: call remove_all_hooks\(\) on the pipeline before it is saved",
    ),
    "saving with a LoRA on a plain layer": (
        lambda unet, folder: (
            setattr(unet, "extra", nn.Linear(4, 4)),
            unet.add_adapter(LoraConfig(r=2, target_modules=["extra"])),
            unet.save_pretrained(folder),
        ),
        r"'extra.base_layer' was added to the denoiser: unload LoRAs",
    ),
}


@pytest.mark.parametrize("feature", PACKED_REFUSES)
def test_a_packed_denoiser_refuses(unet, tmp_path, feature):
    use, message = PACKED_REFUSES[feature]
    with pytest.raises(InputError, match=message):
        use(unet, tmp_path)


@pytest.fixture
def own_backend():
    """Puts back the attention backend, which diffusers also sets for all other models."""
    backend, _ = _AttentionBackendRegistry.get_active_backend()
    yield
    _AttentionBackendRegistry.set_active_backend(backend)


@pytest.mark.skipif(
    Version(torch.__version__) < Version("2.13"),
    reason="torch 2.8 compiles flex attention, and its compiler fails before msfp can refuse",
)
@pytest.mark.usefixtures("own_backend")
def test_a_backend_without_scaled_dot_product_attention_is_refused_with_products(packed_flux):
    denoiser = copy.deepcopy(packed_flux)
    denoiser.set_attention_backend("native")
    assert torch.equal(call(denoiser), call(packed_flux))
    denoiser.set_attention_backend("flex")
    with pytest.raises(InputError, match="which quantized products need: set another processor"):
        call(denoiser)


@pytest.mark.parametrize("add", [
    lambda unet: unet.fuse_qkv_projections(),
    lambda unet: unet.add_adapter(
        LoraConfig(r=2, target_modules=TARGETS, modules_to_save=["conv_out"])
    ),
    lambda unet: unet._load_ip_adapter_weights([ip_adapter(unet)]),
], ids=["fused projections", "a LoRA with whole layers", "IP-Adapter"])  # fmt: skip
def test_what_was_added_to_a_denoiser_is_not_quantized(add):
    denoiser = make("conditional_unet")
    add(denoiser)
    with pytest.raises(InputError, match=r"was added to the denoiser: unload LoRAs and IP-Adapt"):
        quantize(denoiser, QuantizationConfig(refine=None), calibration=call)


def test_projections_that_are_fused_before_packing_are_not_saved(tmp_path):
    denoiser = trainable()
    denoiser.fuse_qkv_projections()
    pack(denoiser)
    with pytest.raises(
        InputError, match=r"call unfuse_qkv_projections\(\), before it is quantized"
    ):
        denoiser.save_pretrained(tmp_path)


def test_a_trainable_denoiser_is_packed_before_it_is_dequantized_or_adapted():
    denoiser = trainable()
    with pytest.raises(
        InputError, match=r"'pos_embed.proj' is trainable: call msfp.pack before dequant"
    ):
        denoiser.dequantize()
    with pytest.raises(InputError, match=r"TrainableConv2d is made by .* call msfp.pack before a"):
        inject_adapter_in_model(LoraConfig(r=2, target_modules=["pos_embed.proj"]), denoiser)
