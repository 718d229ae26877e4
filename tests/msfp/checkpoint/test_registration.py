"""`quant_method: "msfp"` is known to diffusers, whichever of the two is imported first."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers.quantizers import auto
from safetensors.torch import load_file
from tiny import SAMPLER, tiny_pipeline, tiny_quantized

import msfp
from msfp.checkpoint.diffusers_config import MSFPConfig
from msfp.checkpoint.diffusers_quantizer import MSFPQuantizer
from msfp.checkpoint.registration import CONFIG, METHOD, QUANTIZER, LateTable

HEAVY = ("torch", "diffusers", "transformers", "accelerate", "matplotlib", "scipy")
"""Packages that take long to import."""
ALONE = """
import msfp
heavy = set(sys.argv[4:]) & sys.modules.keys()
assert not heavy, heavy
assert "QuantizationConfig" in dir(msfp)
import diffusers.quantizers.auto
own = {name for name in sys.modules if name.startswith("msfp.checkpoint.diffusers")}
assert not own, own
"""
AFTER = """
import diffusers.quantizers.auto
import msfp
"""
LOAD = """
import torch
from diffusers import DDIMPipeline, PipelineQuantizationConfig, UNet2DModel
from safetensors.torch import save_file

folder, threads = sys.argv[1], int(sys.argv[2])
torch.set_num_threads(threads)
x = torch.linspace(-1, 1, 128).view(2, 1, 8, 8)
packed = UNet2DModel.from_pretrained(folder + "/packed/unet")
config = msfp.MSFPConfig(weight_bits=4)
narrow = UNet2DModel.from_pretrained(folder + "/plain/unet", quantization_config=config)
models = {"packed": packed, "narrow": narrow}
if int(sys.argv[3]):
    config = PipelineQuantizationConfig(
        quant_backend="msfp", quant_kwargs={"weight_bits": 4}, components_to_quantize=["unet"]
    )
    models["pipeline"] = DDIMPipeline.from_pretrained(
        folder + "/plain", quantization_config=config
    ).unet
with torch.no_grad():
    outputs = {name: model(x, 500).sample for name, model in models.items()}
save_file(outputs, sys.argv[1] + "/outputs.safetensors")
"""
ORDERS = {"msfp first": ALONE, "diffusers first": AFTER}


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """A folder with a pipeline in full precision and packed, and outputs of its networks."""
    folder, x = tmp_path_factory.mktemp("pipes"), torch.linspace(-1, 1, 128).view(2, 1, 8, 8)
    plain, narrow = tiny_pipeline(), tiny_pipeline()
    packed = tiny_quantized(plain)
    msfp.pack(packed)
    msfp.quantize(narrow, msfp.QuantizationConfig(activation_bits=None, refine=None))
    msfp.pack(narrow)
    for name, pipe in (("plain", plain), ("packed", packed)):
        pipe.save_pretrained(folder / name)
    with torch.no_grad():
        outputs = {"packed": packed.unet(x, 500).sample, "narrow": narrow.unet(x, 500).sample}
    return folder, outputs


@pytest.mark.slow
@pytest.mark.parametrize(
    "order", [pytest.param("msfp first", marks=pytest.mark.slow), "diffusers first"]
)
def test_a_new_process_loads_and_quantizes_through_diffusers(expected, order):
    folder, outputs = expected
    code = "import sys" + ORDERS[order] + LOAD
    with_transformers = importlib.util.find_spec("transformers") is not None
    words = [str(folder), str(torch.get_num_threads()), str(int(with_transformers)), *HEAVY]
    process = subprocess.run(  # noqa: S603
        [sys.executable, "-c", code, *words], capture_output=True, text=True, check=False
    )
    assert process.returncode == 0, process.stderr
    found = load_file(folder / "outputs.safetensors")
    if with_transformers:
        assert torch.equal(found.pop("pipeline"), outputs["narrow"])
    assert found.keys() == outputs.keys()
    assert all(torch.equal(found[name], output) for name, output in outputs.items())


def callbacks(action):
    """Names of callbacks in the order in which they are called first while an action runs."""
    found = {}

    def note(frame, event, _argument):
        owner, _, name = frame.f_code.co_qualname.rpartition(".")
        if event == "call" and owner in ("MSFPConfig", "MSFPQuantizer") and name in DOCUMENTED:
            found[name] = None

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        action()
    finally:
        sys.setprofile(before)
    return list(found)


def documented():
    """Callbacks that the page names, in its order."""
    page = (Path(__file__).parents[3] / "docs" / "architecture.md").read_text()
    _, _, section = page.partition("## One `pipe` through `save` and `load`")
    names = [name.rpartition(".")[2] for name in re.findall("`(.*?)`", section.split("\n## ")[0])]
    return [name for name in names if name in vars(MSFPConfig) | vars(MSFPQuantizer)]


DOCUMENTED = documented()


def test_diffusers_calls_back_in_the_order_of_the_documentation(tmp_path):
    full = tiny_pipeline()
    routed = tiny_quantized(full)
    paths = msfp.record_trajectories(full, calls=SAMPLER.calls(4, seed=0))
    config = msfp.FinetuneConfig(hub=2, rank=2, steps=1, batch=4)
    msfp.finetune(routed, config, trajectories=paths)
    saving = callbacks(lambda: routed.save_pretrained(tmp_path))
    loading = callbacks(lambda: type(full).from_pretrained(tmp_path))
    loading.remove("to_dict")  # the config is described to the server of a download
    assert saving + loading == DOCUMENTED
    assert saving == ["to_dict", "get_state_dict_and_metadata"]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("AUTO_QUANTIZER_MAPPING", MSFPQuantizer),
        ("AUTO_QUANTIZATION_CONFIG_MAPPING", MSFPConfig),
    ],
)
def test_the_tables_of_diffusers_have_the_classes_beside_their_own(name, kind):
    table = getattr(auto, name)
    assert table[METHOD] is kind
    assert {"gguf", "quanto"} < table.keys()


READINGS = {
    "key": lambda table: table[METHOD],
    "get": lambda table: table.get(METHOD),
    "items": lambda table: dict(table.items())[METHOD],
    "values": lambda table: list(table.values())[-1],
    "dict": lambda table: dict(table)[METHOD],
    "unpacked": lambda table: {**table}[METHOD],
    "updated": lambda table: updated({}, table)[METHOD],
    "copy": lambda table: table.copy()[METHOD],
    "union": lambda table: (table | {"other": 2})[METHOD],
    "union from the left": lambda table: ({"other": 2} | table)[METHOD],
}


def updated(table, other):
    table.update(other)
    return table


@pytest.mark.parametrize("way", READINGS)
@pytest.mark.parametrize(("place", "kind"), [(CONFIG, MSFPConfig), (QUANTIZER, MSFPQuantizer)])
def test_the_class_is_there_in_whatever_way_a_table_is_read_first(way, place, kind):
    assert READINGS[way](LateTable({"gguf": 1}, place)) is kind


def test_a_table_is_a_table_beside_the_late_entry():
    table = LateTable({"gguf": 1}, ("no.such.module", "Name"))
    # None of these imports anything.
    assert list(table) == list(table.keys()) == ["gguf", METHOD]
    assert METHOD in table
    assert "other" not in table
    assert len(table) == 2
    assert table["gguf"] == table.get("gguf", 3) == 1
    assert table.get("other") is None
    assert table.get("other", 3) == 3
    with pytest.raises(KeyError):
        table["other"]
    table["other"] = 2
    assert table["other"] == 2
    with pytest.raises(ModuleNotFoundError):
        table[METHOD]
    table[METHOD] = 4
    assert table[METHOD] == 4
