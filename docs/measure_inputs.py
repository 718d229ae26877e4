"""Print what rounding of inputs to 4 bits costs the prediction, with other scales and rotations.

python docs/measure_inputs.py [digits-ddpm | digits-dit | colour-ddpm] [--samples N]

A random vector is sent back from the prediction through the full-precision network, as in
msfp.ptq.sensitivity. It gives the squared change of the prediction for the error of each input. The
ways to round an input are one scale; a scale for each token of linear layers and 1x1 convolutions,
and for each sample of other convolutions, in units of the largest magnitude or of the root of the
mean square; and Hadamard rotations of groups of channels before rounding. Inputs are not split, and
weights are not matched.
"""

import argparse
import math
from collections import defaultdict
from collections.abc import Callable

import torch
from torch import nn

from fpformats import Histogram
from msfp.config import QuantizationConfig
from msfp.experiments.study.ablation import MODELS, Row
from msfp.experiments.study.bench import Bench
from msfp.layers.kinds import PlainLayer, groups_of, kind_of
from msfp.layers.selection import quantizable_layers, settings_by_layer
from msfp.pipelines.denoiser import denoiser_of
from msfp.pipelines.trajectories import Trajectories, spread_batch
from msfp.ptq.sensitivity import _frozen, _Tap
from msfp.search.layer_search import quantizer_of_input, search_input
from msfp.support.hooks import hooked

BITS, SEEN = 4, 128
GROUPS = (16, 64, 256)


def hadamard(size: int) -> torch.Tensor:
    """Return the orthogonal Hadamard matrix of Sylvester, of a power of two."""
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix / math.sqrt(size)


def group_of(channels: int, most: int) -> int:
    """Return the largest power of two that divides the channels, up to some size."""
    return math.gcd(channels, most)


class Way:
    """One way to round the input of a layer.

    Args:
        layer: The layer.
        rotated: Size of the groups of channels that are rotated; 1 for no rotation.
        size: What is 1 in the search, of the axes of a token or sample; None for one scale.
    """

    def __init__(
        self,
        layer: PlainLayer,
        rotated: int = 1,
        size: Callable[[torch.Tensor, tuple[int, ...]], torch.Tensor] | None = None,
    ) -> None:
        self.layer, self.matrix, self.size = layer, hadamard(rotated), size
        self.histogram, self.error = Histogram(), 0.0

    def _rotate(self, x: torch.Tensor) -> torch.Tensor:
        axis = kind_of(self.layer).channel_axis(x)
        x = x.movedim(axis, -1)
        groups = x.unflatten(-1, (-1, len(self.matrix)))
        rotated: torch.Tensor = (groups @ self.matrix).flatten(-2).movedim(-1, axis)
        return rotated

    def _sizes(self, x: torch.Tensor) -> torch.Tensor | float:
        if self.size is None:
            return 1.0
        axes = tuple(range(1, x.dim()))
        if math.prod(getattr(self.layer, "kernel_size", ())) == 1:
            axes = (kind_of(self.layer).channel_axis(x),)
        return self.size(x, axes).clamp(min=1e-12)

    def see(self, x: torch.Tensor) -> None:
        """Add an input to the histogram."""
        x = self._rotate(x)
        self.histogram.update(x / self._sizes(x))

    def fit(self) -> None:
        """Search the grid."""
        self.grid = quantizer_of_input(search_input(self.histogram, BITS, "mixup")[0])

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Return an input rounded."""
        x = self._rotate(x)
        sizes = self._sizes(x)
        return self._rotate(self.grid(x / sizes) * sizes)


def ways_of(layer: PlainLayer) -> dict[str, Way]:
    """Return all ways to round the input of a layer."""
    channels = layer.weight.shape[1] * groups_of(layer)
    sizes = {
        "largest": lambda x, axes: x.abs().amax(axes, keepdim=True),
        "root mean square": lambda x, axes: x.square().mean(axes, keepdim=True).sqrt(),
    }
    scaled = {f"token or sample, {name}": Way(layer, 1, size) for name, size in sizes.items()}
    rotated = {f"rotation, {most}": Way(layer, group_of(channels, most)) for most in GROUPS}
    return {"one scale": Way(layer)} | scaled | rotated


@torch.no_grad()
def search(network: nn.Module, ways: dict[str, dict[str, Way]], path: Trajectories) -> None:
    """Search the grids of all ways."""
    layers = quantizable_layers(network)

    def see(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            for way in ways[name].values():
                way.see(args[0])

        return hook

    steps, rows = path.samples.shape[:2]
    step, row = spread_batch(steps, rows, SEEN, torch.Generator().manual_seed(5))
    with hooked([layers[name].register_forward_pre_hook(see(name)) for name in ways]):
        for start in range(0, len(step), 16):
            path.predict(network, step[start : start + 16], row[start : start + 16])
    for each in ways.values():
        for way in each.values():
            way.fit()


def costs(
    network: nn.Module, ways: dict[str, dict[str, Way]], path: Trajectories, samples: int
) -> dict[str, dict[str, float]]:
    """Return the squared change of the prediction by layer and way; sets the error of each way."""
    layers = quantizable_layers(network)
    found: dict[str, dict[str, float]] = {name: defaultdict(float) for name in ways}
    sums: dict[tuple[str, str], float] = defaultdict(float)

    def tap(name: str) -> Callable[..., torch.Tensor]:
        layer = layers[name]
        kind, weight = kind_of(layer), layer.weight.detach()

        def note(x: torch.Tensor, grad: torch.Tensor) -> None:
            for key, way in ways[name].items():
                wrong = x - way(x)
                way.error += float(wrong.square().sum())
                sums[name, key] += float((grad * kind.compute(layer, wrong, weight, None)).sum())

        trigger = torch.zeros((), requires_grad=True)
        return lambda _, args, y: tapped(y, args[0].detach(), trigger, note)

    tapped: Callable[..., torch.Tensor] = _Tap.apply
    steps, rows = path.samples.shape[:2]
    step, row = spread_batch(steps, rows, samples, torch.Generator().manual_seed(9))
    generator = torch.Generator().manual_seed(5)
    with (
        _frozen(network),
        hooked([layers[name].register_forward_hook(tap(name)) for name in ways]),
        torch.enable_grad(),
    ):
        for index in range(len(step)):
            sums.clear()
            chosen = step[index : index + 1], row[index : index + 1]
            y = path.of_sample(path.predict(network, *chosen))
            y.backward(torch.randn(y.shape, generator=generator))
            for (name, key), value in sums.items():
                found[name][key] += value**2 / len(step)
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", choices=MODELS, default="digits-dit")
    parser.add_argument("--samples", type=int, default=64)
    arguments = parser.parse_args()
    bench = Bench(Row(arguments.model, 0, "ddim", 20, 0, "W4A4", "mixup"), None)
    network, seen, path = denoiser_of(bench.open()), bench.calibration, bench.training
    settings = settings_by_layer(
        network, QuantizationConfig(), seen.ran, seen.readers, seen.writers
    )
    plain = quantizable_layers(network)
    ways = {
        name: ways_of(plain[name])
        for name, each in settings.items()
        if each.activation_bits == BITS
    }
    search(network, ways, path)
    found = costs(network, ways, path, arguments.samples)
    power = float(path.predictions.double().square().sum()) / path.samples.shape[:2].numel()
    print(f"{arguments.model}: thousandths of the prediction; layers choose by their input's error")
    print(f"{'way':34}{'everywhere':>12}{'or one scale':>14}")
    for key in next(iter(ways.values())):
        total, better = 0.0, 0.0
        for name, each in ways.items():
            best = key if each[key].error < each["one scale"].error else "one scale"
            total, better = total + found[name][key], better + found[name][best]
        print(f"{key:34}{1000 * total / power:12.2f}{1000 * better / power:14.2f}")


if __name__ == "__main__":
    main()
