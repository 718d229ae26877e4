import dataclasses
import json
import re

import pytest

from msfp import QuantizationConfig, Sampler, load
from msfp.experiments.demo import bench, report
from msfp.experiments.demo.results import FULL_PRECISION, METHODS, Settings, findings

SMALL = Settings(
    images=4, calibration=4, trajectories=8, held_out=4, finetune=1, sampler=Sampler(2, 4)
)
FLOORS = {
    "frechet_model": {SMALL.label: [0.5, 0.75]},
    "finetune_noise_errors": {SMALL.label: [0.002, 0.0022, 0.0021]},
}
"""In the place of the measured noise of seeds, which is that of other settings."""


@pytest.fixture(scope="module")
def found():
    """A demo of all methods with little of everything, and the stages that it told."""
    stages = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "quality", lambda: FLOORS)
        results = bench.run(QuantizationConfig(), SMALL, 0, lambda *told: stages.append(told))
    return results, stages


@pytest.fixture(scope="module")
def folder(found, tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    report.write(found[0], folder)
    return folder


def test_every_method_is_a_row_behind_full_precision(found):
    rows = found[0].rows
    assert [row.method for row in rows] == [FULL_PRECISION, *(method.name for method in METHODS)]
    full, *quantized = rows
    assert full.noise_error < 1e-9
    assert full.psnr is None
    assert all(0 < row.noise_error < 0.5 for row in quantized)
    assert all(len(row.errors) == len(found[0].timesteps) == 2 for row in rows)
    assert all(row.bytes < full.bytes / 3 for row in quantized)


def test_refinement_is_best_and_integers_without_a_clip_worst_even_with_little_of_everything(found):
    errors = {row.method: row.noise_error for row in found[0].rows[1:]}
    assert max(errors, key=errors.get) == "INT min-max"
    assert errors["mixup-sign FP, refined"] < 0.5 * errors["mixup-sign FP"]


def test_layers_with_unsigned_inputs_and_bytes_are_counted(found):
    rows = {row.method: row for row in found[0].rows}
    assert rows["signed FP"].unsigned_layers == 0
    assert rows["mixup-sign FP"].unsigned_layers == sum(each.unsigned for each in found[0].layers)
    assert rows["mixup-sign FP"].unsigned_layers > 20
    assert rows["mixup-sign FP + TALoRA"].bytes > rows["mixup-sign FP + LoRA"].bytes


def test_progress_tells_each_stage_by_its_method_to_the_end(found):
    last = {stage: (done, total) for stage, done, total, _ in found[1]}
    assert all(done == total for done, total in last.values())
    assert last["calibrating"] == (1, 1)
    assert last["recording held-out trajectories"] == (1, 1)
    assert last["searching mixup"][0] == len(found[0].layers)
    for method in METHODS:
        assert f"sampling {method.name}" in last
        assert (f"fine-tuning {method.name}" in last) == bool(method.hub)


def test_the_table_has_every_row_whole_and_the_findings_call_ties_ties(found):
    table = report.terminal_table(found[0])
    assert table.row_count == 1 + len(METHODS)
    sentences = findings(found[0])
    assert any(re.search(r"tie:|beyond the seed noise", sentence) for sentence in sentences)
    assert "up to 0.75 are full-precision seed noise" in sentences[-1]
    twins = dataclasses.replace(found[0], rows=[*found[0].rows])
    twins.rows[-1] = dataclasses.replace(twins.rows[-1], noise_error=twins.rows[-2].noise_error)
    assert f"{twins.rows[-1].method} and {twins.rows[-2].method} tie: " in findings(twins)[-2]


def test_the_report_is_one_page_that_loads_nothing(folder):
    page = (folder / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 5
    assert not re.search(r'(src|href)="(?!data:)', page)
    for method in METHODS:
        assert method.name in page


def test_the_results_are_json_of_all_that_is_no_tensor(found, folder):
    results = json.loads((folder / "results.json").read_text())
    assert results == json.loads(json.dumps(found[0].to_dict()))
    assert results["config"]["weight_bits"] == 4
    assert [row["method"] for row in results["rows"]][1:] == [method.name for method in METHODS]


def test_the_checkpoint_is_the_last_method_and_samples(found, folder):
    pipe = load(folder / "checkpoint")
    assert pipe.unet.router.kind == "learned"
    assert len(found[0].routing) == len(found[0].layers)
    assert Sampler(2, 4)(pipe, 4, seed=0).isfinite().all()
    assert len(list((folder / "images").glob("samples_*.png"))) == 1 + len(METHODS)
