"""Whether two calibrations are one."""

import numpy as np


def same(one, other):
    """Whether two calibrations are equal, their histograms to the last bit, in the same order."""
    assert list(one.inputs) == list(other.inputs)
    for name, histogram in one.inputs.items():
        for key, array in histogram.state().items():
            assert np.array_equal(array, other.inputs[name].state()[key])
    assert list(one.timesteps.items()) == list(other.timesteps.items())
    rest = ("activations", "weights", "calls", "total", "description")
    return all(getattr(one, key) == getattr(other, key) for key in rest)
