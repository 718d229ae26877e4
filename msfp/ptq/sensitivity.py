"""What rounding a layer costs in the error of the prediction, measured through the network.

An error d of a layer's output changes the prediction by J d, to first order. For a random v with
E[v v^T] = 1, the gradient g of <v, prediction> with respect to the output has E[(g . d)^2] =
|J d|^2 (Hutchinson, 1990). One backward pass gives g of every layer.

Rounding errors of inputs are taken as they are. Those of weights are independent of each other, and
have the same variance in a row. They cost this variance times |sum of g x^T|^2 over the positions.
Random signs s give an estimate of it: (sum of g (s . x))^2. A layer thus needs few numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any, Self

import torch
from torch import nn

from msfp.config import LayerSettings
from msfp.errors import InputError
from msfp.layers.fake_quantizer import Quantizer
from msfp.layers.kinds import PlainLayer, groups_of, kernel_shape, kind_of
from msfp.layers.lora.low_rank import low_rank
from msfp.pipelines.trajectories import Trajectories, spread_batch
from msfp.ptq.state import QuantizationState
from msfp.search.calibration import Calibration
from msfp.search.layer_search import finite_weight, quantizer_of_input, search_input, search_weight
from msfp.support.checks import MAX_SEED
from msfp.support.hooks import hooked
from msfp.support.malloc import release_memory
from msfp.support.progress import Progress, counted

RANKS = (0, 2, 4, 8, 16, 32, 64)
"""Ranks of low-rank branches whose effect is measured."""
WIDTHS = (3, 4, 6, 8)
"""Bits of weights whose rounding error is measured."""
SAMPLES = 32
"""Samples through which layers are measured: errors are known to about a quarter."""
ROWS = 64
"""Most rows of a weight in which its rounding error is measured."""
STAGE, RESULT = "sensitivity", "result"
"""Stage of the state, and what is kept when all samples are measured."""


@dataclass(frozen=True)
class Sensitivity:
    """What rounding one layer costs: the sum of squared errors of a sample's prediction.

    Attributes:
        weight_noise: Squared rounding error of the weights over their energy, by their bits.
        by_weight: Cost of weights whose rounding error is as large as they are, by rank of the
            branch beside them.
        by_input: Cost of the rounding of the inputs, by rank.
    """

    weight_noise: Mapping[int, float]
    by_weight: Mapping[int, float]
    by_input: Mapping[int, float]

    @classmethod
    def of_facts(cls, facts: Mapping[str, Mapping[str, float]]) -> Self:
        """Return the costs from plain JSON types, whose keys are strings."""
        tables = {name: {int(key): value for key, value in facts[name].items()} for name in facts}
        return cls(**tables)

    @property
    def matters(self) -> bool:
        """Whether a change of the layer changes the prediction."""
        return bool(self.by_weight[0] or self.by_input[0])

    def error(self, bits: int, rank: int, *, share: float = 1.0) -> float:
        """Return the error with weights of some bits, and a low-rank branch of some rank.

        Args:
            bits: One of `WIDTHS`.
            rank: One of `RANKS`.
            share: Of the error of the weights, the part that the method of rounding leaves.

        Example:
            >>> layer = Sensitivity({4: 0.01}, {0: 2.0, 8: 1.0}, {0: 0.5, 8: 0.25})
            >>> layer.error(4, 0), layer.error(4, 8)
            (0.52, 0.26)
        """
        return share * self.weight_noise[bits] * self.by_weight[rank] + self.by_input[rank]


class _Tap(torch.autograd.Function):
    """Passes on an output, and gives its gradient to a function, with the input it came from."""

    @staticmethod
    def forward(
        ctx: Any, output: torch.Tensor, x: torch.Tensor, _trigger: torch.Tensor, note: Any
    ) -> torch.Tensor:
        ctx.save_for_backward(x)
        ctx.note = note
        return output.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        with torch.no_grad():
            ctx.note(*ctx.saved_tensors, grad)
        return grad, None, None, None


class _Probe:
    """Sums of one layer over the positions of a sample, and the costs that they give.

    Args:
        layer: The plain layer.
        quantizer: Of its input; or None.

    Attributes:
        signs: Random signs of the current sample, shape (groups, columns).
        sums: For the current sample: of weights by row, of the input in all, and of the input by
            singular value, shape (rows + 1 + ranks,). None if the layer has not run.
    """

    def __init__(self, layer: PlainLayer, quantizer: Quantizer | None) -> None:
        self.layer, self.quantizer, self.kind = layer, quantizer, kind_of(layer)
        matrix, self.groups = layer.weight.detach().float().flatten(1), groups_of(layer)
        rank = RANKS[-1] if self.groups == 1 else 0
        down, up = (each.half() for each in low_rank(matrix, rank)) if rank else (None, None)
        self.down, self.up = down, up  # as branches are stored, and half as large
        self.signs = matrix.new_ones(self.groups, matrix.shape[1])
        self.energy = self._row_energy(matrix)
        self.sums: torch.Tensor | None = None
        self.found: list[torch.Tensor] = []

    def _row_energy(self, matrix: torch.Tensor) -> dict[int, torch.Tensor]:
        """Return the mean square of each row of the weight beside a branch, by rank."""
        whole = matrix.square().sum(1)
        if self.down is None or self.up is None:
            return {0: whole / matrix.shape[1]}
        parts = self.up.float().square() * self.down.float().square().sum(1)
        taken = _running(parts)
        most = parts.shape[1]
        return {
            rank: (whole - taken[:, rank]).clamp(min=0) / matrix.shape[1]
            for rank in RANKS
            if rank <= most
        }

    def start_sample(self, generator: torch.Generator) -> None:
        """Draw the signs of a new sample."""
        drawn = torch.randint(2, self.signs.shape, generator=generator)
        self.signs = (2 * drawn - 1).to(self.signs)
        self.sums = None

    def add(self, x: torch.Tensor, grad: torch.Tensor) -> None:
        """Add a run of the layer: its input, and the gradient of its output."""
        x, layer = x.float(), self.layer
        rounded = x if self.quantizer is None else self.quantizer(x)
        given = self.kind.rows(layer, grad.float())
        by_row = (given * self._applied(rounded, self.signs)).sum(-1).flatten()
        wrong = x - rounded
        whole = (given * self._applied(wrong, layer.weight.detach().float())).sum().view(1)
        parts = [by_row, whole]
        if self.down is not None and self.up is not None:
            left = self.up.float().mT @ given[0]
            parts.append((left * self._applied(wrong, self.down.float())[0]).sum(-1))
        sums = torch.cat(parts)
        self.sums = sums if self.sums is None else self.sums + sums

    def _applied(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Apply the layer with other rows, without bias, shape (groups, rows, positions)."""
        weight = weight.view(len(weight), *kernel_shape(self.layer, weight.flatten(1)))
        return self.kind.rows(self.layer, self.kind.compute(self.layer, x, weight, None))

    def end_sample(self, name: str) -> None:
        """Keep the sums of the sample that has ended."""
        if self.sums is None:
            return
        if not self.sums.isfinite().all():
            raise InputError(
                f"the gradient of layer {name!r} is not finite, so a budget cannot be divided: "
                "check that the pipeline generates correct images in this dtype, or use float32"
            )
        self.found.append(self.sums)

    def sensitivity(self, settings: LayerSettings) -> Sensitivity | None:
        """Return what rounding the layer costs, or None if no sample ran it."""
        if not self.found:
            return None
        sums = torch.stack(self.found).double()
        rows = len(self.layer.weight)
        by_row, whole, parts = sums[:, :rows], sums[:, rows], sums[:, rows + 1 :]
        gains, taken = by_row.square().mean(0), _running(parts)
        return Sensitivity(
            self._noise(settings),
            {rank: float((each * gains).sum()) for rank, each in self.energy.items()},
            {rank: float((whole - taken[:, rank]).square().mean()) for rank in self.energy},
        )

    def _noise(self, settings: LayerSettings) -> dict[int, float]:
        """Return the squared rounding error of some rows over their energy, by bits."""
        weight = self.layer.weight.detach()
        chosen = torch.linspace(0, len(weight) - 1, min(ROWS, len(weight))).round().long()
        some, found = weight[chosen.to(weight.device)].float(), {}
        for bits in WIDTHS:
            quantizer, table = search_weight(some, settings._replace(weight_bits=bits))
            found[bits] = 10 ** (-table[str(quantizer.format)] / 10)
        return found


def _running(parts: torch.Tensor) -> torch.Tensor:
    """Return the sums of the first 0, 1, 2, ... columns, shape (rows, columns + 1)."""
    return torch.cat([parts.new_zeros(len(parts), 1), parts.cumsum(1)], dim=1)


def measure_sensitivities(
    denoiser: nn.Module,
    layers: Mapping[str, PlainLayer],
    settings: Mapping[str, LayerSettings],
    calibration: Calibration | None,
    trajectories: Trajectories,
    *,
    seed: int,
    state: QuantizationState | None,
    progress: Progress,
) -> dict[str, Sensitivity]:
    """Return what rounding each layer costs, without layers that no gradient reaches.

    Args:
        denoiser: In full precision.
        layers: Its plain layers that are measured.
        settings: Their settings.
        calibration: Histograms of their inputs; not needed if inputs are not quantized.
        trajectories: Of the full-precision denoiser.
        seed: Of the choice of samples, and of the random signs and vectors.
        state: Keeps the sums of each sample; or None.
        progress: Called after each layer that is decomposed, and after each sample.
    """
    if not layers:
        return {}
    kept = None if state is None else state.load(STAGE, RESULT)
    if kept is not None:
        return {name: Sensitivity.of_facts(facts) for name, facts in kept[0]["layers"].items()}
    done = counted(progress, "decomposing", len(layers))
    probes: dict[str, _Probe] = {}
    for name, layer in layers.items():
        finite_weight(name, layer.weight)
        probes[name] = _Probe(layer, _input(name, settings[name], calibration))
        release_memory()
        done(1)
    steps, rows = trajectories.samples.shape[:2]
    step, row = spread_batch(steps, rows, SAMPLES, torch.Generator().manual_seed(seed))
    done = counted(progress, "measuring", len(step))
    with _frozen(denoiser), hooked(_taps(probes)):
        for index in range(len(step)):
            chosen = step[index : index + 1], row[index : index + 1]
            if not _restored(probes, index, state):
                number = (seed + index) % MAX_SEED
                _run(denoiser, trajectories, chosen, probes.values(), number)
                _keep(probes, index, state)
            done(1)
    every = {name: probe.sensitivity(settings[name]) for name, probe in probes.items()}
    found = {name: each for name, each in every.items() if each is not None and each.matters}
    if state is not None:
        state.save(STAGE, RESULT, {"layers": {n: asdict(each) for n, each in found.items()}}, {})
    return found


def _input(name: str, settings: LayerSettings, calibration: Calibration | None) -> Quantizer | None:
    """Return the quantizer that the search will find for the input of a layer."""
    if settings.activation_bits is None or calibration is None:
        return None
    inputs = calibration.inputs[name]
    return quantizer_of_input(search_input(inputs, settings.activation_bits, settings.scheme)[0])


def _taps(probes: Mapping[str, _Probe]) -> Iterator[Any]:
    """Let each layer give its inputs and the gradients of its outputs to its probe."""
    trigger = torch.zeros((), requires_grad=True)  # lets outputs need gradients

    def hook(note: Callable[..., None]) -> Callable[..., torch.Tensor]:
        def tap(_: nn.Module, args: tuple[Any, ...], kwargs: Any, y: torch.Tensor) -> torch.Tensor:
            x = args[0] if args else kwargs["input"]
            found: torch.Tensor = _Tap.apply(y, x.detach(), trigger, note)  # type: ignore[no-untyped-call]
            return found

        return tap

    for probe in probes.values():
        probe.quantizer = None if probe.quantizer is None else probe.quantizer.to(probe.signs)
        yield probe.layer.register_forward_hook(hook(probe.add), with_kwargs=True)


def _run(
    denoiser: nn.Module,
    trajectories: Trajectories,
    sample: tuple[torch.Tensor, torch.Tensor],
    probes: Iterable[_Probe],
    seed: int,
) -> None:
    """Predict a sample, and send a random vector back through the network.

    The gradient checkpointing of some classes fails. It is then left out.
    """
    for saving in (_checkpointed(denoiser), nullcontext()):
        generator = torch.Generator().manual_seed(seed)
        for probe in probes:
            probe.start_sample(generator)
        try:
            with saving, torch.enable_grad():
                prediction = trajectories.of_sample(trajectories.predict(denoiser, *sample))
                direction = torch.randn(prediction.shape, generator=generator)
                prediction.backward(direction.to(prediction))
            return
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, TypeError) as error:
            failure = error
    raise InputError(
        f"a budget cannot be divided, because {type(denoiser).__name__} computes no gradient: "
        f"{failure}"
    ) from failure


def _restored(probes: Mapping[str, _Probe], index: int, state: QuantizationState | None) -> bool:
    """Read the sums of a sample, if they are kept; return whether they were."""
    kept = None if state is None else state.load(STAGE, f"sample {index}")
    if kept is None:
        return False
    for name, sums in kept[1].items():
        probes[name].found.append(sums.to(probes[name].signs.device))
    return True


def _keep(probes: Mapping[str, _Probe], index: int, state: QuantizationState | None) -> None:
    """End a sample, and keep its sums."""
    ran = {name: probe.sums for name, probe in probes.items() if probe.sums is not None}
    for name, probe in probes.items():
        probe.end_sample(name)
    if state is not None:
        state.save(STAGE, f"sample {index}", {}, ran)


@contextmanager
def _frozen(denoiser: nn.Module) -> Iterator[None]:
    """Let no parameter need a gradient inside the block."""
    trained = [each for each in denoiser.parameters() if each.requires_grad]
    _require_gradients(trained, needed=False)
    try:
        yield
    finally:
        _require_gradients(trained, needed=True)


def _require_gradients(parameters: Iterable[nn.Parameter], *, needed: bool) -> None:
    for each in parameters:
        each.requires_grad_(needed)


@contextmanager
def _checkpointed(denoiser: nn.Module) -> Iterator[None]:
    """Compute activations again in the backward pass, where the denoiser supports it."""
    supported = getattr(denoiser, "_supports_gradient_checkpointing", False)
    if not supported or getattr(denoiser, "is_gradient_checkpointing", False):
        yield
        return
    denoiser.enable_gradient_checkpointing()  # type: ignore[operator]
    try:
        yield
    finally:
        denoiser.disable_gradient_checkpointing()  # type: ignore[operator]
