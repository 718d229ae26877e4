"""The state folder of a quantization: what is done of each layer, so that a killed run resumes."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fpformats import parse
from msfp.config import LayerSettings, QuantizationConfig
from msfp.errors import InputError
from msfp.layers.block import BlockLayer
from msfp.layers.block_quantizer import BlockQuantizer
from msfp.layers.fake_quantizer import Quantizer
from msfp.layers.families import family_of
from msfp.layers.formats import LayerFormats
from msfp.layers.kinds import PlainLayer
from msfp.layers.packed import from_bits, to_bits
from msfp.layers.trainable import TrainableLayer
from msfp.pipelines.trajectories import Trajectories
from msfp.search.calibration import Calibration
from msfp.search.layer_search import quantize_layer
from msfp.search.summary import LayerSummary
from msfp.support.checks import check_path
from msfp.support.container import FileKind, Named, check_fingerprint, read, write
from msfp.support.files import check_folder
from msfp.support.fingerprints import digest
from msfp.support.offloading import at_work

SEARCHED = "searched"
"""Stage of the state."""
LAYER = FileKind("the state of a layer", version=1)


class QuantizationState:
    """Files of a run, in a folder with a part for each stage.

    Args:
        folder: The folder, new or of an interrupted run.
        fingerprint: Facts that must be equal for a run to resume, as plain JSON types.

    Raises:
        InputError: If the folder cannot be written to.
    """

    def __init__(self, folder: str | Path, fingerprint: dict[str, Any]) -> None:
        self.folder, self.fingerprint = check_path("state", folder), fingerprint
        check_folder("state", self.folder)

    def of_data(
        self, calibration: Calibration | None, trajectories: Trajectories | None
    ) -> QuantizationState:
        """Return the same state, whose files must be of the same calibration and trajectories."""
        facts = {
            "calibration": calibration_digest(calibration),
            "trajectories": trajectories_digest(trajectories),
        }
        return QuantizationState(self.folder, self.fingerprint | facts)

    @property
    def calibration(self) -> Path:
        """The file of the calibration."""
        return self.folder / "calibration.safetensors"

    @property
    def calls(self) -> Path:
        """The folder of recorded calls."""
        return self.folder / "calls"

    def load(self, stage: str, layer: str) -> tuple[dict[str, Any], Named] | None:
        """Return the facts and tensors of a layer after a stage, or None if it is not done.

        Raises:
            InputError: If they are those of another run.
        """
        file = self._file(stage, layer)
        if not file.exists():
            return None
        facts = check_fingerprint(file, LAYER, self._fingerprint(layer)).facts
        # Copies have an aligned address, from which matrix products take the order of their sums.
        return facts, {name: value.clone() for name, value in read(file, LAYER)[1].items()}

    def save(self, stage: str, layer: str, facts: dict[str, Any], tensors: Named) -> None:
        """Write the facts and tensors of a layer after a stage, atomically."""
        file = self._file(stage, layer)
        file.parent.mkdir(parents=True, exist_ok=True)
        write(file, LAYER, tensors, facts, self._fingerprint(layer))

    def _fingerprint(self, layer: str) -> dict[str, Any]:
        return self.fingerprint | {"layer": layer}

    def _file(self, stage: str, layer: str) -> Path:
        short = hashlib.sha256(layer.encode()).hexdigest()[:8]  # names may differ by case alone
        name = re.sub("[^A-Za-z0-9]+", "-", layer)[-80:]
        return self.folder / stage / f"{name}-{short}.safetensors"


def state_of(
    folder: str | Path, denoiser: nn.Module, config: QuantizationConfig
) -> QuantizationState:
    """Return the state of the quantization of a full-precision denoiser in a folder."""
    tensors = [*denoiser.named_parameters(), *denoiser.named_buffers()]
    empty = next((name for name, value in tensors if value.is_meta), None)
    if empty is not None:
        raise InputError(f"{empty} has no numbers: it is on the meta device")
    settings = getattr(denoiser, "config", None)
    facts = {
        "denoiser": type(denoiser).__name__,
        "settings": None if settings is None else json.dumps(dict(settings), default=str),
        "config": json.dumps(config.to_dict()),  # with the order of its overrides
        "weights": digest(tensors),
    }
    return QuantizationState(folder, facts)


def calibration_digest(calibration: Calibration | None) -> str | None:
    """Return a hash of the histograms of a calibration."""
    if calibration is None:
        return None
    return digest(
        (f"{name} {key}", torch.from_numpy(value))
        for name, histogram in calibration.inputs.items()
        for key, value in histogram.state().items()
    )


def trajectories_digest(path: Trajectories | None) -> str | None:
    """Return a hash of the samples and predictions of trajectories."""
    if path is None:
        return None
    return digest([("samples", path.samples), ("predictions", path.predictions)])


def quantizer_state(name: str, quantizer: Quantizer) -> tuple[dict[str, Any], Named]:
    """Return a quantizer as facts and tensors, whose names begin with its name."""
    if isinstance(quantizer, BlockQuantizer):
        tensors = {f"{name}.codes": quantizer.codes}
        if quantizer.tensor_scale is not None:
            tensors[f"{name}.tensor_scale"] = to_bits(quantizer.tensor_scale)
        return {name: quantizer.name}, tensors
    tensors = {f"{name}.scale": to_bits(quantizer.scale)}
    if quantizer.zero_point is not None:
        tensors[f"{name}.zero_point"] = to_bits(quantizer.zero_point)
    return {name: str(quantizer.format)}, tensors


def quantizer_of(name: str, facts: dict[str, Any], tensors: Named) -> Quantizer | None:
    """Return the quantizer that `quantizer_state` described, or None if there was none."""
    if name not in facts:
        return None
    if f"{name}.codes" in tensors:
        whole = tensors.get(f"{name}.tensor_scale")
        whole = None if whole is None else from_bits(whole)
        return BlockQuantizer(facts[name], tensors[f"{name}.codes"], whole)
    zero = tensors.get(f"{name}.zero_point")
    scale = from_bits(tensors[f"{name}.scale"])
    return Quantizer(parse(facts[name]), scale, None if zero is None else from_bits(zero))


def on_device(tensors: Named, like: torch.Tensor) -> Named:
    """Return tensors on the device of another."""
    return {name: value.to(like.device) for name, value in tensors.items()}


def searched_layer(
    name: str,
    layer: PlainLayer,
    settings: LayerSettings,
    calibration: Calibration | None,
    state: QuantizationState | None,
    *,
    refined: bool,
) -> tuple[TrainableLayer | BlockLayer, LayerSummary]:
    """Return what `quantize_layer` returns, from the state if it is kept there.

    Layers in block formats are not kept, because their search is short.
    """
    kept = None if state is None else state.load(SEARCHED, name)
    if kept is not None:
        with at_work(layer):
            facts, tensors = kept[0], on_device(kept[1], layer.weight)
        weight = quantizer_of("weight", facts, tensors)
        if weight is not None:
            inputs, branch = quantizer_of("input", facts, tensors), facts["branch_grid"]
            grids = weight, inputs, None if branch is None else tuple(branch)
            wrapped = family_of(layer).trainable.wrap(layer, *grids)
            return wrapped, LayerSummary.from_dict(facts["summary"])
    with at_work(layer):
        found, summary = quantize_layer(name, layer, settings, calibration, refined=refined)
    if state is not None and isinstance(found.formats, LayerFormats):
        assert isinstance(found, TrainableLayer)  # noqa: S101 - no other has these formats here
        facts, tensors = quantizer_state("weight", found.weight_quantizer)
        if found.input_quantizer is not None:
            more, others = quantizer_state("input", found.input_quantizer)
            facts, tensors = facts | more, tensors | others
        facts["branch_grid"] = found.branch_grid
        state.save(SEARCHED, name, facts | {"summary": summary.to_dict()}, tensors)
    return found, summary
