"""Quantize a large denoiser with random weights, and print time and memory of each stage.

python docs/measure_large_models.py MODEL [--device cuda] [--dtype bfloat16] [--side 32]
    [--refine-samples N] [--only GLOB]

MODEL is the beginning of a name in docs/estimate_large_models.py, such as SDXL. --side makes images
smaller, where the network reads images: the side of the latents. --only quantizes some layers, as
`include` does. --nearest leaves out the refinement.
"""

from __future__ import annotations

import argparse
import re
import tempfile
import time
from pathlib import Path
from typing import Any, cast

import torch
from estimate_large_models import MODELS

import msfp
from msfp.checkpoint.io import packed_size
from msfp.config import QuantizationConfig, RefinementConfig
from msfp.support.memory import STATUS, forget_peak

STEPS = (900, 300)
"""Timesteps of the one call."""
OWN = "RssAnon"
"""Memory of the process without pages of files."""


class Stages:
    """Seconds and memory of each stage, printed as it ends; `progress` of msfp's functions."""

    def __init__(self, device: str) -> None:
        self.device, self.now, self.most = device, "", 0.0
        self.began, self.used = time.time(), time.process_time()

    def start(self, stage: str) -> None:
        """End a stage, and start the next."""
        if self.now:
            seconds, cpu = time.time() - self.began, time.process_time() - self.used
            gpu = ""
            if self.device != "cpu":
                gpu = f"{torch.cuda.max_memory_allocated() / 1e9:8.1f}"
                torch.cuda.reset_peak_memory_stats()
            whole = memory("VmHWM")
            print(
                f"{self.now:22}{seconds:8.0f}{cpu:10.0f}{whole:8.1f}{self.most:8.1f}{gpu}",
                flush=True,
            )
        forget_peak()
        self.now, self.most = stage, memory(OWN)
        self.began, self.used = time.time(), time.process_time()

    def __call__(self, stage: str, _done: int, _total: int, _note: str = "", /) -> None:
        """Note the progress of a stage."""
        if stage != self.now:
            self.start(stage)
        self.most = max(self.most, memory(OWN))


def memory(key: str) -> float:
    """Return a number of this process's memory in GB; 0 where it is unknown."""
    found = re.search(rf"{key}:\s*(\d+) kB", STATUS.read_text() if STATUS.exists() else "")
    return int(found[1]) / 1e6 if found else 0.0


def arguments_of(name: str, side: int | None, device: str, dtype: torch.dtype) -> dict[str, Any]:
    """Return random arguments of a forward."""
    generator = torch.Generator().manual_seed(0)
    given = MODELS[name][1]()
    first = next(iter(given))
    if side is not None:
        given[first] = given[first].new_empty(*given[first].shape[:-2], side, side)

    def drawn(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: drawn(each) for key, each in value.items()}
        if not isinstance(value, torch.Tensor):
            return value
        return torch.randn(value.shape, generator=generator).to(device, dtype)

    return {key: drawn(value) for key, value in given.items()}


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--side", type=int)
    parser.add_argument("--refine-samples", type=int)
    parser.add_argument("--only", default="*", metavar="GLOB")
    parser.add_argument("--nearest", action="store_true")
    words = parser.parse_args()
    name = next(each for each in MODELS if each.startswith(words.model))
    dtype = getattr(torch, words.dtype)
    stages = Stages(words.device)
    print(f"{name}: {words}\n{'stage':22}{'seconds':>8}{'CPU':>10}{'peak GB':>8}{'own GB':>8}")
    stages.start("making")
    torch.set_default_dtype(dtype)
    with torch.device(words.device):
        network = MODELS[name][0]().eval()
    torch.set_default_dtype(torch.float32)
    given = arguments_of(name, words.side, words.device, dtype)

    @torch.no_grad()
    def call(model: torch.nn.Module) -> None:
        for step in STEPS:
            model(timestep=torch.tensor([step], device=words.device), return_dict=False, **given)

    refine = None if words.nearest else RefinementConfig(samples=words.refine_samples)
    config = QuantizationConfig(include=(words.only,), refine=refine)
    msfp.quantize(network, config, calibration=call, offload=True, progress=stages)
    stages.start("packing")
    msfp.pack(network)
    with tempfile.TemporaryDirectory() as folder:
        stages.start("saving")
        msfp.save(network, Path(folder) / "packed")
        stages.start("a packed forward pair")
        call(network)
        size, kind = packed_size(network), cast("type[Any]", type(network))
        del network
        stages.start("loading")
        kind.from_pretrained(Path(folder) / "packed")
        stages.start("")
    print(f"{size / 1e9:.2f} GB in the file")


if __name__ == "__main__":
    main()
