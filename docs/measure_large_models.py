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
from dataclasses import dataclass
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


@dataclass
class Cost:
    """Seconds of a stage, and peaks in GB: of the process, without pages of files, of the GPU."""

    seconds: float = 0
    cpu: float = 0
    whole: float = 0
    own: float = 0
    gpu: float = 0


class Stages:
    """What each stage takes, printed when the next has begun; `progress` of msfp's functions."""

    def __init__(self, *, gpu: bool) -> None:
        self.gpu, self.now, self.cost = gpu, "", Cost()
        self.seen, self.used = time.time(), time.process_time()
        print(f"{'stage':20}{'seconds':>9}{'CPU':>9}{'peak GB':>9}{'own GB':>9}{'GPU GB':>9}")

    def __call__(self, stage: str, _done: int, _total: int, _note: str = "", /) -> None:
        """Note that a unit of a stage has ended."""
        if stage != self.now:
            self.end()
            self.now, self.cost = stage, Cost()
        cost, now, used = self.cost, time.time(), time.process_time()
        cost.seconds, self.seen = cost.seconds + now - self.seen, now
        cost.cpu, self.used = cost.cpu + used - self.used, used
        cost.whole, cost.own = max(cost.whole, memory("VmHWM")), max(cost.own, memory(OWN))
        forget_peak()
        if self.gpu:
            cost.gpu = max(cost.gpu, torch.cuda.max_memory_allocated() / 1e9)
            torch.cuda.reset_peak_memory_stats()

    def end(self) -> None:
        """Print the last stage."""
        if self.now:
            each = self.cost
            peaks = f"{each.whole:9.2f}{each.own:9.2f}{each.gpu:9.2f}"
            print(f"{self.now:20}{each.seconds:9.0f}{each.cpu:9.0f}{peaks}", flush=True)


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
    print(f"{name}, {words.dtype}, {words.device}")
    stages = Stages(gpu=words.device != "cpu")
    torch.set_default_dtype(dtype)
    with torch.device(words.device):
        network = MODELS[name][0]().eval()
    torch.set_default_dtype(torch.float32)
    stages("making", 1, 1)
    given = arguments_of(name, words.side, words.device, dtype)

    @torch.no_grad()
    def call(model: torch.nn.Module) -> None:
        for step in STEPS:
            model(timestep=torch.tensor([step], device=words.device), return_dict=False, **given)

    refine = None if words.nearest else RefinementConfig(samples=words.refine_samples)
    config = QuantizationConfig(include=(words.only,), refine=refine)
    msfp.quantize(network, config, calibration=call, offload=True, progress=stages)
    msfp.pack(network)
    stages("packing", 1, 1)
    with tempfile.TemporaryDirectory() as folder:
        msfp.save(network, Path(folder) / "packed")
        stages("saving", 1, 1)
        call(network)
        stages("two packed forwards", 1, 1)
        size, kind = packed_size(network), cast("type[Any]", type(network))
        del network
        kind.from_pretrained(Path(folder) / "packed")
        stages("loading", 1, 1)
    stages.end()
    print(f"{size / 1e9:.2f} GB in the file")


if __name__ == "__main__":
    main()
