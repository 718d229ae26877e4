import itertools
import json

import numpy as np
import pytest
import torch
from calibrations import same
from safetensors import numpy as arrays
from safetensors import safe_open
from safetensors.torch import save_file

from fpformats import Histogram
from msfp import Calibration, InputError
from msfp.search.calibration import KIND
from msfp.support.container import KEY


def part(call, total=3, names=("a", "b"), seed=0, **fields):
    """What one call saw: layers ran in this order, `b` after SiLU."""
    draw = np.random.default_rng(seed + call)
    inputs = {name: Histogram() for name in names}
    for name in names:
        inputs[name].update(draw.standard_normal(500).astype(np.float32))
    return Calibration(
        inputs, {"b": "SiLU"}, {900.0: 1, 100.0 + call: 2}, calls=[call], total=total, **fields
    )


def merged(*parts):
    whole = Calibration({name: Histogram() for name in parts[0].inputs}, total=parts[0].total)
    for each in parts:
        whole.merge(each)
    return whole


def test_calls_merge_to_the_same_in_any_order():
    whole = merged(*map(part, range(3)))
    assert whole.calls == [0, 1, 2]
    assert whole.timesteps == {900: 3, 100: 2, 101: 2, 102: 2}
    assert whole.inputs["a"].count == 1500
    for order in itertools.permutations(range(3)):
        assert same(merged(*map(part, order)), whole)


def test_layers_are_in_the_order_of_the_first_call():
    swapped, plain = part(1, names=("b", "a")), part(2)
    assert list(merged(plain, swapped).inputs) == ["b", "a"]
    assert list(merged(swapped, plain, part(0)).inputs) == ["a", "b"]


def test_a_call_is_never_counted_twice():
    whole = merged(part(0), part(1))
    with pytest.raises(InputError, match="call 1 is in both"):
        whole.merge(part(1))


def test_an_interrupt_leaves_a_call_in_every_layer_or_in_none(monkeypatch):
    whole, add, added = merged(part(0)), Histogram._add_moments, []

    def interrupted(histogram, *moments):
        added.append(histogram)
        if len(added) > 3:  # the first layer is done
            raise KeyboardInterrupt
        add(histogram, *moments)

    monkeypatch.setattr(Histogram, "_add_moments", interrupted)
    with pytest.raises(KeyboardInterrupt):
        whole.merge(part(1))
    monkeypatch.undo()
    assert same(whole, merged(part(0)))


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (part(1, names=("a", "b", "c")), "different denoisers: only one of them has layer 'c'"),
        (part(1, total=4), "of different calls: 3 and 4 calls"),
        (part(1, weights={900: 1}), "weigh timesteps differently"),
        (part(1, description={"seed": 4}), "of different calls: seed none and 4"),
    ],
)
def test_calibrations_that_do_not_belong_together_are_refused(other, message):
    with pytest.raises(InputError, match=message):
        part(0).merge(other)


def test_a_saved_calibration_is_read_back_to_the_bit_and_can_be_merged_on(tmp_path):
    weights = {900: 1024, 100: 1}
    settings = {"weights": weights, "description": {"prompts": ["a", "b"], "guidance": None}}
    first = part(0, **settings)
    first.save(tmp_path / "state.safetensors")
    again = Calibration.load(tmp_path / "state.safetensors")
    assert same(again, first)
    again.merge(part(1, **settings))
    first.merge(part(1, **settings))
    assert same(again, first)


def test_the_file_is_replaced_whole_and_nothing_is_left_beside_it(tmp_path):
    file = tmp_path / "state.safetensors"
    for call in (0, 1):
        part(call).save(file)
        assert Calibration.load(file).calls == [call]
    assert list(tmp_path.iterdir()) == [file]


def test_what_cannot_be_read_is_told_in_a_sentence(tmp_path):
    file = tmp_path / "state.safetensors"
    unread = rf"state\.safetensors cannot be read as {KIND.name}: "
    with pytest.raises(InputError, match=f"{unread}.*[Nn]o such file"):
        Calibration.load(file)
    part(0).save(file)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(InputError, match=unread):
        Calibration.load(file)
    save_file({"x": torch.zeros(1)}, file)
    with pytest.raises(InputError, match=f"must be {KIND.name}, but its metadata have no such"):
        Calibration.load(file)
    with pytest.raises(InputError, match="cannot be written"):
        part(0).save(tmp_path / "absent" / "state.safetensors")


def opened(file):
    """What the metadata of a file say, and its tensors."""
    with safe_open(file, framework="pt") as told:
        description = json.loads(told.metadata()[KEY])
        return description, {key: told.get_tensor(key) for key in told.keys()}  # noqa: SIM118


def test_a_file_of_another_version_or_without_a_layer_is_refused(tmp_path):
    file = tmp_path / "state.safetensors"
    part(0).save(file)
    description, tensors = opened(file)
    save_file(tensors, file, {KEY: json.dumps(description | {"version": 9})})
    with pytest.raises(InputError, match="of version 9; this msfp reads versions up to 2"):
        Calibration.load(file)
    save_file({k: v for k, v in tensors.items() if k != "b.bins"}, file,
              {KEY: json.dumps(description)})  # fmt: skip
    with pytest.raises(InputError, match=r"cannot be read.*b\.bins"):
        Calibration.load(file)


@pytest.mark.parametrize("described", [True, False])
def test_a_file_of_version_1_is_read_to_the_bit(tmp_path, described):
    """Its facts had an entry of their own, and at first no description."""
    file = tmp_path / "state.safetensors"
    settings = {"weights": {900: 1024, 100: 1}}
    if described:
        settings["description"] = {"seed": 4}
    saved = part(0, **settings)
    saved.save(file)
    facts = opened(file)[0]["facts"] | {"format_version": 1}
    if not described:
        del facts["description"]
    tensors = {
        f"{name}.{key}": array
        for name, histogram in saved.inputs.items()
        for key, array in histogram.state().items()
    }
    arrays.save_file(tensors, file, metadata={"msfp_calibration": json.dumps(facts)})
    assert same(Calibration.load(file), saved)
