import re
from pathlib import Path

from msfp.experiments.reference import ddim_pipeline

README = Path(__file__).parent.parent / "README.md"
SMALLER = {
    "steps=20": "steps=2",
    "calls(256": "calls(64",
    "FinetuneConfig()": "FinetuneConfig(steps=2)",
}


def test_the_example_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = re.search(r"```python\n(import msfp\n.*?)```", README.read_text(), re.DOTALL)[1]
    before, after = re.fullmatch(r"(.*)pipe = \.\.\.[^\n]*\n(.*)", code, re.DOTALL).groups()
    for full, small in SMALLER.items():
        assert full in after
        after = after.replace(full, small)
    names = {}
    exec(before, names)  # noqa: S102
    names["pipe"] = ddim_pipeline()
    exec(after, names)  # noqa: S102
    assert (tmp_path / "model-w4a4" / "unet" / "diffusion_pytorch_model.safetensors").is_file()
    assert names["pipe"] is not None
