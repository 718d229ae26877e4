"""Products by Triton kernels, compiled where there is a GPU, else in Triton's interpreter."""

import copy
import warnings

import pytest
import torch
from torch import nn

from fpformats import decode, parse
from msfp.layers.execution import triton_path
from msfp.layers.execution.triton_path import TritonPath
from tests.msfp.layers.execution.test_definition import by_definition, trainable

pytest.importorskip("triton", reason="Triton is not installed")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CONVOLUTIONS = {
    "plain": lambda: nn.Conv2d(6, 10, 3, padding=1),
    "without bias": lambda: nn.Conv2d(6, 10, 3, bias=False),
    "odd channels": lambda: nn.Conv2d(5, 7, 3, padding=1),
    "one by one": lambda: nn.Conv2d(6, 10, 1),
    "strided": lambda: nn.Conv2d(6, 10, (3, 2), stride=(2, 1), padding=(0, 2)),
    "dilated": lambda: nn.Conv2d(6, 10, (2, 3), padding=(1, 3), dilation=(1, 2)),
    "uneven padding": lambda: nn.Conv2d(6, 10, (3, 2), padding="same"),
    "reflecting": lambda: nn.Conv2d(6, 10, 3, padding=1, padding_mode="reflect"),
    "several steps of channels": lambda: nn.Conv2d(130, 66, (1, 2), padding=1),
}


@pytest.fixture
def path():
    with torch.no_grad():
        yield TritonPath(DEVICE)


def random(*shape, spread=2.0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)) * spread


def check(path, plain, x, **formats):
    """The output is the defined one, bit for bit; give it."""
    layer = trainable(plain, **formats).pack().to(x.dtype)
    expected = by_definition(layer, x)
    moved, x = layer.to(DEVICE), x.to(DEVICE)
    assert path.takes(moved, x)
    y = path.product(moved, x, 0)
    assert y.dtype == x.dtype
    assert torch.equal(y.cpu(), expected)
    return y


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("inputs", ["E2M1", "E2M2U"])
@pytest.mark.parametrize("shape", [(12,), (3, 12), (2, 67, 12), (70, 140)], ids=str)
def test_linear_layers_give_the_defined_bits(path, shape, inputs, dtype):
    check(path, nn.Linear(shape[-1], 70), random(*shape).to(dtype), inputs=inputs)


@pytest.mark.parametrize("weight", ["E1M2", "E2M1", "E3M0", "E2M2", "E1M6", "E2M0"])
@pytest.mark.parametrize("inputs", ["E1M2", "E3M0", "E1M3U", "E3M1U", "E2M3U"])
def test_formats_of_all_widths_and_ranges(path, inputs, weight):
    check(path, nn.Linear(34, 9), random(21, 34), inputs=inputs, weight=weight)


@pytest.mark.parametrize("zero", [0, 1, 100, 192])
def test_zero_points_reach_over_the_whole_format(path, zero):
    check(path, nn.Conv2d(4, 5, 3, padding=1), random(1, 4, 5, 4), inputs="E3M1U", zero=zero)


@pytest.mark.parametrize("features", [13, 12])
@pytest.mark.parametrize("bias", [False, True])
def test_rows_of_codes_that_begin_inside_a_byte(path, features, bias):
    check(path, nn.Linear(features, 6, bias=bias), random(3, features))


@pytest.mark.parametrize("inputs", ["E2M1", "E2M2U"])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions_give_the_defined_bits(path, name, inputs):
    plain, dtype = CONVOLUTIONS[name](), DTYPES[len(name) % len(DTYPES)]
    x = random(2, plain.in_channels, 5, 4).to(dtype)
    y = check(path, plain, x, inputs=inputs)
    assert y.is_contiguous(memory_format=torch.channels_last)


def test_convolutions_read_every_order_of_memory(path):
    plain, x = nn.Conv2d(6, 10, 3, padding=1), random(2, 6, 5, 4)
    for each in (x.to(memory_format=torch.channels_last), x.mT.contiguous().mT):
        assert not each.is_contiguous()
        check(path, plain, each)


def test_convolutions_of_several_tiles(path):
    check(path, nn.Conv2d(3, 130, 2, padding=1), random(1, 3, 12, 11))


def test_sums_beyond_24_bits_are_rounded_once(path):
    plain = nn.Linear(3000, 2)
    plain.weight.abs_().add_(1)
    x = random(2, 3000).abs() + 60
    formats = {"weight": "E1M6", "inputs": "E1M6", "scale": 1.0}
    check(path, plain, x, **formats)
    layer = trainable(plain, **formats)
    sums = layer.input_steps(x).double() @ layer.weight_steps(0).double().T
    assert (sums > 2**24).all()


def test_every_tile_gives_the_same_bits(path, monkeypatch):
    for tile in triton_path.TILES:
        monkeypatch.setattr(triton_path, "_tile", lambda *_, tile=tile: tile)
        check(path, nn.Linear(36, 70), random(37, 36))


@pytest.mark.parametrize("rows", [1, 16, 17, 64, 1024, 4096])
def test_tiles_are_no_larger_than_what_keeps_all_processors_busy(rows):
    tile = triton_path._tile(rows, 1280, 132)
    assert tile in triton_path.TILES
    assert tile[0] < 2 * rows or tile == triton_path.TILES[-1]
    larger = triton_path.TILES[: triton_path.TILES.index(tile)]
    assert all(
        each[0] >= 2 * rows or triton_path._tiles(rows, 1280, *each) < 132 for each in larger
    )


def test_the_weight_is_prepared_once_and_again_after_a_change(path, monkeypatch):
    made = []
    prepare = triton_path.prepare
    monkeypatch.setattr(triton_path, "prepare", lambda *a: made.append(a) or prepare(*a))
    layer, x = trainable(nn.Linear(12, 6)).pack().to(DEVICE), random(3, 12).to(DEVICE)
    first = path.product(layer, x, 0)
    assert torch.equal(path.product(layer, x, 0), first)
    assert len(made) == 1
    layer.codes.zero_()
    y = path.product(layer, x, 0)
    assert len(made) == 2
    assert torch.equal(y, layer.bias.expand_as(y))
    layer.cache_weight(False)
    path.product(layer, x, 0)
    assert TritonPath not in layer.kept()


def test_codes_of_four_bits_stay_packed():
    for plain in (nn.Linear(12, 6), nn.Conv2d(12, 6, 3)):
        layer = trainable(plain).pack().to(DEVICE)
        weight = triton_path.prepare(layer, 0).weight
        assert weight.numbers.dtype == torch.uint8
        assert weight.numbers.numel() == layer.codes.numel()
    layer = trainable(nn.Linear(12, 6)).pack().to(DEVICE)
    numbers = triton_path.prepare(layer, 0).weight.numbers
    assert numbers.data_ptr() == layer.codes.data_ptr()


def test_each_adapter_has_its_own_codes(path):
    layer = trainable(nn.Linear(12, 6)).pack()
    other = trainable(nn.Linear(12, 6)).pack()
    both = copy.deepcopy(layer)
    both.adapters = 2
    both.codes = nn.Parameter(torch.cat([layer.codes, other.codes]), requires_grad=False)
    other.weight_scale = layer.weight_scale
    both.bias = other.bias = layer.bias
    x = random(3, 12)
    expected = [by_definition(each, x) for each in (layer, other)]
    both, x = both.to(DEVICE), x.to(DEVICE)
    for adapter in range(2):
        assert torch.equal(path.product(both, x, adapter).cpu(), expected[adapter])


@torch.enable_grad()
def test_layers_in_training_are_computed_without_gradients(path):
    layer, x = trainable(nn.Linear(12, 6)), random(3, 12)
    expected = by_definition(layer.pack(), x)
    layer, x = layer.to(DEVICE), x.to(DEVICE)
    assert not path.takes(layer, x)
    with torch.no_grad():
        assert path.takes(layer, x)
        assert torch.equal(path.product(layer, x, 0).cpu(), expected)


def test_inputs_with_nan_are_left_to_others(path):
    layer, x = trainable(nn.Linear(12, 6)).pack().to(DEVICE), random(3, 12).to(DEVICE)
    x[1, 2] = float("nan")
    assert path.product(layer, x, 0) is None


@pytest.mark.parametrize(
    ("plain", "x"),
    [
        (nn.Conv1d(4, 6, 3), random(2, 4, 9)),
        (nn.Conv3d(4, 6, 1), random(2, 4, 3, 3, 3)),
        (nn.Conv2d(4, 6, 3, groups=2), random(2, 4, 5, 5)),
        (nn.Conv2d(4, 6, 3), random(4, 5, 5)),
        (nn.Conv2d(4, 6, 3), random(0, 4, 5, 5)),
        (nn.Conv2d(4, 6, 3), random(2, 3, 5, 5)),
        (nn.Linear(4, 6), random(0, 4)),
        (nn.Linear(4, 6), random(3, 5)),
        (nn.Linear(4, 6), random(3, 4).double()),
        (nn.Linear(4, 6), random()),
    ],
)
def test_what_has_no_kernel_is_not_taken(path, plain, x):
    assert not path.takes(trainable(plain).pack().to(DEVICE), x.to(DEVICE))


def test_formats_wider_than_a_byte_and_several_scales_are_not_taken(path):
    x = random(2, 4, 5, 5).to(DEVICE)
    assert not path.takes(trainable(nn.Conv2d(4, 6, 3), inputs="E3M2").pack().to(DEVICE), x)
    layer = trainable(nn.Conv2d(4, 6, 3), inputs="E2M1")
    scale = torch.tensor([0.5, 0.5, 0.25, 0.25]).view(4, 1, 1)
    layer.input_quantizer.scale = nn.Parameter(scale)
    assert not path.takes(layer.pack().to(DEVICE), x)


@torch.no_grad()
def test_only_tensors_of_its_device_are_taken():
    layer, x = trainable(nn.Linear(12, 6)).pack(), random(3, 12)
    assert not TritonPath().takes(layer, x)
    assert not TritonPath("meta").takes(layer, x)


def test_a_compiler_is_left_alone(path, monkeypatch):
    layer, x = trainable(nn.Linear(12, 6)).pack().to(DEVICE), random(3, 12).to(DEVICE)
    assert path.takes(layer, x)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert not path.takes(layer, x)


@pytest.fixture
def unchecked():
    triton_path.agrees.cache_clear()
    yield
    triton_path.agrees.cache_clear()


@pytest.mark.usefixtures("unchecked")
def test_a_device_with_other_bits_is_not_used_and_the_user_is_told(path, monkeypatch):
    layer, x = trainable(nn.Linear(12, 6)).pack().to(DEVICE), random(3, 12).to(DEVICE)
    multiply = triton_path.multiply
    monkeypatch.setattr(triton_path, "multiply", lambda *a: multiply(*a) + 1)
    with pytest.warns(UserWarning, match=r"computed in floating point.*other bits than defined"):
        assert not path.takes(layer, x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not path.takes(layer, x)


@pytest.mark.usefixtures("unchecked")
def test_a_device_where_kernels_do_not_compile_is_not_used(path, monkeypatch):
    layer, x = trainable(nn.Linear(12, 6)).pack().to(DEVICE), random(3, 12).to(DEVICE)

    def fail(*_):
        raise RuntimeError("no assembler\nat all")

    monkeypatch.setattr(triton_path, "multiply", fail)
    with pytest.warns(UserWarning, match=r"fail there \(no assembler\)"):
        assert not path.takes(layer, x)


def test_without_triton_nothing_is_taken(path, monkeypatch):
    layer, x = trainable(nn.Linear(12, 6)).pack().to(DEVICE), random(3, 12).to(DEVICE)
    monkeypatch.setattr(triton_path, "_is_supported", triton_path._is_supported.__wrapped__)
    monkeypatch.setattr(triton_path, "_kernels", lambda: None)
    assert not path.takes(layer, x)


@pytest.mark.parametrize("name", ["E2M1", "E1M2", "E3M0"])
def test_the_table_has_the_numbers_of_all_codes(name):
    fmt = parse(name)
    numbers = triton_path._table(fmt).view(torch.int8).float() * fmt.step
    assert torch.equal(numbers, decode(torch.arange(16, dtype=torch.uint8), fmt))


def test_it_runs_layers_on_its_device_only(path):
    layer = trainable(nn.Linear(12, 6)).pack()
    assert path.runs(layer.integer_grids, torch.device(DEVICE))
    assert not path.runs(layer.integer_grids, torch.device("meta"))
