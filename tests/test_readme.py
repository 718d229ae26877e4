import re
from pathlib import Path

from msfp import inspect_layers

README = Path(__file__).parent.parent / "README.md"
SMALLER = {
    "steps=20": "steps=2",
    "calls(256": "calls(16",
    "calls(64": "calls(8",
    "activation_bits=4)": "activation_bits=4, refine={'samples': 8, 'branch_rank': 0})",
    "finetune(pipe, ": "finetune(pipe, msfp.FinetuneConfig(steps=2), ",
}


def test_the_example_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = re.search(r"```python\n(import msfp\n.*?)```", README.read_text(), re.DOTALL)[1]
    for full, small in SMALLER.items():
        assert full in code
        code = code.replace(full, small)
    names = {}
    exec(code, names)  # noqa: S102
    assert (tmp_path / "model-w4a4" / "unet" / "diffusion_pytorch_model.safetensors").is_file()
    assert inspect_layers(names["pipe"]) == inspect_layers(tmp_path / "model-w4a4")
