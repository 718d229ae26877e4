import dataclasses
import math
import multiprocessing
import random

import pytest
import torch
from scipy import stats

from msfp.cli.main import main
from msfp.config import FIRST_LAYERS, LAST_LAYERS, RefinementConfig
from msfp.errors import InputError
from msfp.experiments.study import run as study_run
from msfp.experiments.study.ablation import (
    BITS,
    DEFAULT,
    FULL_PRECISION,
    MODELS,
    RECIPES,
    REVISION,
    Row,
    all_rows,
)
from msfp.experiments.study.bench import Bench
from msfp.experiments.study.benchmark_models import BENCHMARK_MODELS, Settings, model_folder
from msfp.experiments.study.groups import Group, comparisons
from msfp.experiments.study.render import render
from msfp.experiments.study.run import (
    chosen_rows,
    missing_rows,
    picture_file,
    run_rows,
    valid_records,
)
from msfp.experiments.study.statistics import compare, geometric_mean, mean
from msfp.experiments.study.store import VERSION, Store
from msfp.experiments.study.tables import (
    comparison_table,
    cost_table,
    distance_table,
    settings_tests,
    verdict,
)
from msfp.training.config import FinetuneConfig, LearningRates

RETIRED = {name for name, recipe in RECIPES.items() if recipe.retired}
SMALL = Settings(images=4, calibration=4, trajectories=4, held_out=4, batch=4)


def row(recipe="mixup", seed=0, steps=2, **changes):
    return Row("digits-ddpm", 0, "ddim", steps, seed, "W4A4", recipe, **changes)


@pytest.fixture
def small(monkeypatch):
    """The digits model with little of everything."""
    model = dataclasses.replace(BENCHMARK_MODELS["digits-ddpm"], settings=SMALL)
    monkeypatch.setitem(BENCHMARK_MODELS, "digits-ddpm", model)
    tuned = dataclasses.replace(RECIPES["dfa-1"], finetune={"steps": 2, "hub": 2})
    monkeypatch.setitem(RECIPES, "dfa-1", tuned)
    refine = {"rounding": "nearest", "samples": 4, "positions": 256}
    quick = dataclasses.replace(RECIPES["matched"], quantization={"refine": refine})
    monkeypatch.setitem(RECIPES, "matched", quick)


def record(recipe, seed, error, psnr=20.0):
    """A record as the bench writes it, of made-up numbers."""
    made, model = row(recipe, seed, steps=20), BENCHMARK_MODELS["digits-ddpm"]
    quantization, tuning = made.quantization(), model.finetune(made)
    return {
        "version": VERSION,
        "name": made.name,
        "row": dataclasses.asdict(made),
        "settings": dataclasses.asdict(model.settings),
        "quantization": quantization and quantization.to_dict(),
        "finetune": tuning and tuning.to_dict(),
        "versions": {"msfp": "0"},
        "seconds": {"quantize": 1.0, "finetune": 0.5, "forward": 2.0},
        "bytes": 1000,
        "frechet": 1.0,
        "noise_error": error,
        "noise_errors": [error, error],
        "timesteps": [999, 499],
        "psnr": psnr,
        "ssim": 0.9,
        "sqnr": 10.0,
    }


def test_every_row_has_configs_of_its_own():
    rows = all_rows()
    assert {each.recipe for each in rows} == set(RECIPES) - RETIRED
    assert {each.bits for each in rows} == set(BITS)
    for each in rows:
        assert (each.quantization() is None) == (each.recipe == FULL_PRECISION)
        each.finetune()
    assert len({each.name for each in rows}) == len(rows)


def test_recipes_build_on_recipes_that_come_before_them():
    names = list(RECIPES)
    for recipe in RECIPES.values():
        for against in recipe.against:
            assert names.index(against) < names.index(recipe.name)


def test_a_row_is_fine_tuned_with_its_own_seed():
    assert row("lora", 3).finetune() == FinetuneConfig(steps=160, seed=3)


def test_a_guided_model_is_fine_tuned_towards_the_guided_prediction():
    model = BENCHMARK_MODELS["digits-dit"]
    config = model.finetune(dataclasses.replace(row("lora"), model="digits-dit"))
    assert config.guidance_branches == (2.0, -1.0)
    assert model.settings.trajectories % config.guidance_rows == 0
    assert BENCHMARK_MODELS["digits-ddpm"].finetune(row("lora")).guidance_branches == (1.0,)


def test_a_glob_that_matches_no_row_is_refused():
    with pytest.raises(InputError, match="rows 'digits-gan/\\*' matches none"):
        chosen_rows(["digits-gan/*"])


def test_an_interval_covers_the_mean_as_often_as_it_says():
    draw = random.Random(0)
    means = [mean([draw.gauss(1, 1) for _ in range(5)]) for _ in range(2000)]
    covered = sum(each.low <= 1 <= each.high for each in means) / len(means)
    assert 0.935 <= covered <= 0.965
    assert math.isnan(mean([1.0]).low)


def test_the_interval_of_a_geometric_mean_is_that_of_the_logarithms():
    found = geometric_mean([1.0, 10.0, 100.0])
    logarithms = mean([0.0, 1.0, 2.0])
    assert found.value == pytest.approx(10)
    assert math.log10(found.low) == pytest.approx(logarithms.low)
    assert math.log10(found.high) == pytest.approx(logarithms.high)


def test_the_test_in_pairs_finds_differences_ties_and_open_questions():
    draw = random.Random(0)
    noise = [draw.gauss(0, 1) for _ in range(5)]
    pairs = {
        "shifted": [(each, each + 0.5 + 0.01 * draw.gauss(0, 1)) for each in noise],
        "noise": [(each, each + draw.gauss(0, 1)) for each in noise],
        "few": [(1.0, 2.0), (1.1, 2.1)],
        "equal": [(1.0, 1.0), (2.0, 2.0), (3.0, 3.0)],
        "constant": [(1.0, 2.0), (2.0, 3.0), (3.0, 4.0)],
    }
    found = compare(pairs)
    assert {name: each.verdict(margin=0.1) for name, each in found.items()} == {
        "shifted": "different",
        "noise": "inconclusive",
        "few": "few",
        "equal": "identical",
        "constant": "different",
    }
    assert found["noise"].verdict(margin=5.0) == "tie"
    assert found["shifted"].change == pytest.approx(0.5, abs=0.02)
    plain = stats.ttest_rel(*zip(*pairs["noise"], strict=True), nan_policy="raise")
    interval = plain.confidence_interval(0.95)
    assert (found["noise"].low, found["noise"].high) == pytest.approx((-interval[1], -interval[0]))


def test_adjusting_for_many_comparisons_keeps_false_findings_rare():
    draw = random.Random(0)
    pairs = {str(i): [(0.0, draw.gauss(0, 1)) for _ in range(5)] for i in range(200)}
    assert sum(each.p < 0.05 for each in compare(pairs).values()) <= 3


def kept(name, value):
    return {"version": VERSION, "name": name, "value": value}


def test_a_line_that_was_cut_short_is_dropped_and_the_last_of_a_name_counts(tmp_path):
    store = Store(tmp_path)
    store.append(kept("a", 1))
    store.append(kept("b", 2))
    with store.file.open("a") as stream:
        stream.write('{"name": "c", "val')
    assert set(store.records()) == {"a", "b"}
    store.append(kept("a", 3))
    assert store.records() == {"a": kept("a", 3), "b": kept("b", 2)}


def _append_many(folder, name):
    for number in range(50):
        Store(folder).append(kept(f"{name}-{number}", "x" * 5000))


def test_several_processes_add_to_one_file(tmp_path):
    names = ["a", "b", "c"]
    with multiprocessing.get_context("fork").Pool(len(names)) as pool:
        pool.starmap(_append_many, [(tmp_path, name) for name in names])
    assert len(Store(tmp_path).records()) == 150


FIRST_QUANTIZATION = {
    "weights": 4, "activations": 4, "first_last": 8, "scheme": "mixup", "include": ["*"],
    "exclude": [], "first": list(FIRST_LAYERS), "last": list(LAST_LAYERS), "granularity": "channel",
    "overrides": {"conv_in": {"activations": 8}}, "refine": None, "attention": None,
}  # fmt: skip
FIRST_REFINEMENT = {
    "rounding": "gptq", "sweeps": 0, "scales": "weight", "match_inputs": True,
    "correct_bias": "all", "split_inputs": False, "branch_rank": 0, "damping": 0.03, "samples": 64,
    "positions": 16384, "seed": 3,
}  # fmt: skip
FIRST_TUNING = {
    "hub": 1, "rank": 16, "steps": 160, "batch": 32, "rates": LearningRates().__dict__,
    "denoising_power": 0.0, "seed": 3, "routing": "learned", "place": "inside", "initial": "zero",
    "temperature": [1.0, 1.0], "branches": [1.0], "branch_rows": 1, "accumulation": 1,
    "clip": None, "ema": 0.0, "precision": "no", "checkpointing": False, "cache_teacher": True,
    "student_every": 0, "evaluate_every": 0, "patience": 0, "save_every": 50,
}  # fmt: skip
"""Settings as msfp 0.2.0 wrote them into records."""


def first(recipe, finetune=None, **quantization):
    """A record of seed 3 as msfp 0.2.0 wrote it."""
    made = record(recipe, 3, 0.004)
    del made["version"]
    request = FIRST_QUANTIZATION | {"overrides": {}} | quantization
    return made | {"quantization": request, "finetune": finetune}


def test_records_of_version_1_are_read_with_the_names_of_now(tmp_path):
    store = Store(tmp_path)
    for old in (
        first("mixup"),
        first("matched", refine=FIRST_REFINEMENT),
        first("lora", FIRST_TUNING),
        first("mixup") | {"name": "other", "quantization": FIRST_QUANTIZATION},
    ):
        store.append(old)
    rows = [row(recipe, 3, steps=20) for recipe in ("mixup", "matched", "lora")]
    assert missing_rows(rows, store) == []
    found = store.records()
    assert found["other"]["quantization"]["overrides"] == {"conv_in": {"activation_bits": 8}}
    assert all(each["version"] == VERSION for each in found.values())
    assert not {"initial", "temperature", "student_every"} & found[rows[2].name]["finetune"].keys()
    store.append(first("lora", FIRST_TUNING | {"initial": "svd"}))
    assert missing_rows(rows, store) == [rows[2]]


def test_retired_recipes_are_not_run(tmp_path, capsys):
    assert RETIRED
    for recipe in RETIRED:
        assert RECIPES[recipe].title == f"{RECIPES[recipe].label} (until 0.2.0)"
        assert all(each.recipe != recipe for each in chosen_rows(["*"]))
        command = ["study", "--output", str(tmp_path / "study"), "--rows", f"*/{recipe}/*"]
        assert main(command) == 2
        assert f"'*/{recipe}/*' matches none" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_records_of_retired_recipes_are_kept_and_rendered_with_the_version_they_ended_with(
    tmp_path, capsys
):
    store = Store(tmp_path)
    rounding = FIRST_REFINEMENT | {"match_inputs": False, "correct_bias": "none"}
    for seed in range(3):
        store.append(record("gptq", seed, 0.004 + 1e-5 * seed))
        store.append(record("mixup", seed, 0.005))
        made = {"refine": rounding | {"rounding": "adaround", "seed": seed}}
        named = {"name": row("adaround", seed, steps=20).name, "noise_error": 0.002 + 1e-6 * seed}
        named["row"] = dataclasses.asdict(row("adaround", seed, steps=20))
        store.append(first("adaround", **made) | named)
    valid = [each["row"]["recipe"] for each in valid_records(store)]
    assert sorted(valid) == ["adaround"] * 3 + ["gptq"] * 3 + ["mixup"] * 3
    assert main(["study", "--output", str(tmp_path), "--render"]) == 0
    assert "9 rows: " in capsys.readouterr().out
    page = (tmp_path / "results.md").read_text()
    assert "| mixup + AdaRound (until 0.2.0) | 2.00 [" in page
    assert "| mixup + AdaRound (until 0.2.0) | mixup + GPTQ | **-50%** [" in page
    assert "until" not in page.replace("(until 0.2.0)", "")


@pytest.mark.slow
@pytest.mark.usefixtures("small")
def test_rows_run_once_and_again_when_their_settings_change(tmp_path, monkeypatch):
    rows = [row(FULL_PRECISION), row("matched"), row("dfa-1"), row("nvfp4")]
    run_rows(rows, tmp_path, trained=None)
    store = Store(tmp_path)
    full, matched, tuned, blocks = (store.records()[each.name] for each in rows)
    assert "psnr" not in full
    assert 0 < tuned["noise_error"] < 1
    assert len(matched["noise_errors"]) == len(matched["timesteps"]) == 2
    assert matched["bytes"] < tuned["bytes"] < full["bytes"]
    assert blocks["bytes"] < full["bytes"] / 4
    assert matched["quantization"]["refine"]["samples"] == 4
    assert all(each["bytes"] < each["file_bytes"] for each in (full, matched, tuned))
    assert {"calibrate", "record", "quantize", "finetune"} <= tuned["seconds"].keys()
    assert set(tuned["peak_bytes"]) == {"quantize", "finetune"}
    assert full["frechet_sampled"] > 0
    assert {"processor", "cores", "code", "date"} <= full["versions"].keys()
    assert picture_file(tmp_path, rows[1].name).is_file()
    assert missing_rows(rows, store) == []
    more = dataclasses.replace(
        BENCHMARK_MODELS["digits-ddpm"], settings=dataclasses.replace(SMALL, images=8)
    )
    monkeypatch.setitem(BENCHMARK_MODELS, "digits-ddpm", more)
    assert missing_rows(rows, store) == rows


@pytest.mark.slow
@pytest.mark.usefixtures("small")
def test_a_record_without_a_setting_that_came_later_still_counts(tmp_path):
    wanted = row("dfa-1")
    made, _ = Bench(wanted, None).run(wanted)
    del made["finetune"]["shard"]
    store = Store(tmp_path)
    store.append(made)
    assert missing_rows([wanted], store) == []
    for other in ({"finetune": made["finetune"] | {"rank": 3}}, {"revision": REVISION + 1}):
        store.append(made | other)
        assert missing_rows([wanted], store) == [wanted]


def test_a_page_leaves_out_what_rows_would_not_find_now(tmp_path, capsys):
    store = Store(tmp_path)
    for seed in range(3):
        store.append(record("mixup", seed, 0.004))
    store.append(record("mixup", 3, 0.004) | {"settings": dataclasses.asdict(SMALL)})
    store.append(record("mixup", 4, 0.004) | {"name": "digits-ddpm/0/older/W4A4/ddim-20/4"})
    assert [each["row"]["seed"] for each in valid_records(store)] == [0, 1, 2]
    assert main(["study", "--output", str(tmp_path), "--render"]) == 0
    assert "3 rows (2 of other settings are left out)" in capsys.readouterr().out


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("sampler", ["plms", pytest.param("dpm++", marks=pytest.mark.slow)])
def test_every_sampler_is_followed(sampler):
    wanted = dataclasses.replace(row("int-minmax", steps=4), sampler=sampler)
    bench = Bench(wanted, None)
    measured, images = bench.run(wanted)
    assert math.isfinite(measured["psnr"])
    assert images.shape == (4, 1, 16, 16)
    ddim = Bench(row(FULL_PRECISION, steps=4), None)
    assert not torch.equal(bench.reference, ddim.reference)


@pytest.mark.slow
@pytest.mark.usefixtures("small")
def test_equal_seeds_give_equal_numbers():
    wanted, other = row("int-minmax"), row("int-minmax", seed=1)
    first, second = (Bench(wanted, None).run(wanted)[0] for _ in range(2))
    for measure in ("noise_errors", "psnr", "ssim", "sqnr", "frechet"):
        assert first[measure] == second[measure]
    assert first["noise_errors"] != Bench(other, None).run(other)[0]["noise_errors"]


def test_a_model_that_was_not_trained_is_refused_before_any_row_runs(tmp_path):
    with pytest.raises(InputError, match="models must name a folder"):
        model_folder("digits-ddpm", 1, None)
    with pytest.raises(InputError, match=r"train it with .*digits-ddpm .*--seed 1"):
        run_rows([row(), dataclasses.replace(row(), training=1)], tmp_path, tmp_path)
    assert not Store(tmp_path).file.exists()


def test_a_better_recipe_is_named_and_an_equal_one_is_a_tie(tmp_path):
    store, draw = Store(tmp_path), random.Random(0)
    for seed in range(5):
        store.append(record("signed", seed, 0.005 * math.exp(0.02 * draw.gauss(0, 1))))
        store.append(record("mixup", seed, 0.004 * math.exp(0.02 * draw.gauss(0, 1)), 22.0 + seed))
    group = Group(list(store.records().values()))
    found = comparisons({"": group}, ["noise_error"])["mixup", "signed", "", "noise_error"]
    assert verdict(found, "noise_error").startswith("**-")
    assert "| mixup-sign FP | signed FP | **-" in render(tmp_path).read_text()
    same = Group(
        [record("signed", s, 0.005 + 1e-5 * draw.random()) for s in range(5)]
        + [record("mixup", s, 0.005 + 1e-5 * draw.random()) for s in range(5)]
    )
    assert "| mixup-sign FP | signed FP | tie: " in comparison_table(same)
    assert comparison_table(same).endswith("| identical | 5 |\n")


def test_a_recipe_is_tested_against_the_nearest_that_was_run_and_its_other_rivals():
    records = [
        record(name, seed, error + 1e-5 * seed**2)
        for name, error in (("mixup", 0.004), ("lora", 0.002), ("talora-4", 0.002))
        for seed in range(3)
    ]
    group = Group(records)
    assert group.against("talora-4") == ["lora"]
    assert (group.against("lora"), group.against("mixup")) == (["mixup"], [])
    both = Group([*records, *(record("talora-2", seed, 0.002) for seed in range(3))])
    assert both.against("talora-4") == ["talora-2", "lora"]
    lines = settings_tests({"W4A4": group, "W4A8": Group(records[:2])}).splitlines()
    assert lines[0] == "| recipe | against | of | W4A4 | W4A8 |"
    assert lines[2].startswith("| mixup + LoRA | mixup-sign FP | error | **-50%** [")
    assert len(lines) == 6


def test_all_cells_of_a_table_are_one_family():
    def group(gap):
        errors = [0.005 + 1e-4 * seed for seed in range(4)]
        return Group(
            [record("signed", seed, error) for seed, error in enumerate(errors)]
            + [
                record("mixup", seed, error * (gap + 0.01 * seed**2))
                for seed, error in enumerate(errors)
            ]
        )

    alone = comparisons({"a": group(0.9)}, ["noise_error"])
    together = comparisons({"a": group(0.9), "b": group(0.97)}, ["noise_error"])
    key = ("mixup", "signed", "a", "noise_error")
    assert together[key].p > alone[key].p
    assert together[key].low == alone[key].low


def test_a_distance_is_inside_the_seed_noise_only_by_its_whole_interval():
    def records(recipe, *shifts):
        return [
            record(recipe, seed, None) | {"frechet": 1.0 + 0.1 * seed + shift}
            for seed, shift in enumerate(shifts)
        ]

    group = [
        *records(FULL_PRECISION, 0, 0, 0),
        *records("mixup", 0.05, 0.06, 0.05),
        *records("signed", 0.0, 0.2, -0.05),  # inside by its mean alone
        *records("lora", -0.5, -0.51, -0.5),
        *records("nvfp4", 0.05, 0.06),  # too few to tell
    ]
    note = distance_table(Group(group)).splitlines()[-1]
    assert "for: mixup-sign FP. It is larger for: mixup + LoRA. " in note


def test_equal_pairs_are_no_member_of_the_family():
    draw = random.Random(0)
    pairs = {str(i): [(0.0, draw.gauss(1, 1)) for _ in range(4)] for i in range(4)}
    equal = {"equal": [(1.0, 1.0)] * 4}
    alone, together = compare(pairs), compare(pairs | equal)
    assert together["equal"].verdict(0.1) == "identical"
    assert {name: each for name, each in together.items() if name != "equal"} == alone


def test_costs_are_of_the_records_that_tell_them():
    old = record("lora", 0, 0.002)
    del old["finetune"]["shard"]
    old["seconds"]["finetune"] = 90.0
    assert "| 90 * |" in cost_table(Group([old]))
    new = record("lora", 1, 0.002) | {"file_bytes": 2000, "peak_bytes": {"finetune": 3e6}}
    new["versions"] = new["versions"] | {"code": "abc"}
    new["seconds"]["finetune"] = 60.0
    assert "| 1 | 2 | 1.0 | 60 | 3 | 2000 |" in cost_table(Group([old, new]))


def test_the_default_of_the_tables_is_the_default_of_the_package():
    assert row(DEFAULT).quantization().refine == RefinementConfig()


def test_the_page_shows_every_plot_that_it_names(tmp_path):
    store = Store(tmp_path)
    for seed in range(3):
        store.append(record("mixup", seed, 0.004 + 0.0001 * seed))
    page = render(tmp_path).read_text()
    plots = [part.split(")")[0] for part in page.split("](")[1:]]
    assert plots
    assert all((tmp_path / plot).is_file() for plot in plots)


@pytest.mark.usefixtures("small")
def test_the_command_resumes_where_it_was_stopped(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(study_run, "all_rows", lambda: [row("int-mse"), row("int-minmax")])
    output = ["study", "--output", str(tmp_path / "study")]
    assert main([*output, "--rows", "*/int-mse/*"]) == 0
    capsys.readouterr()
    assert main([*output, "--list"]) == 0
    assert capsys.readouterr().out == f"{row('int-minmax').name}\n"
    assert main(output) == 0
    assert "2 rows" in capsys.readouterr().out
    assert main([*output, "--rows", "*/lora/*"]) == 2


def test_models_that_are_not_there_are_left_out_unless_they_are_named(tmp_path, capsys):
    listing = ["study", "--output", str(tmp_path / "study"), "--list"]
    assert main(listing) == 0
    models = {name.split("/")[0] for name in capsys.readouterr().out.split()}
    assert models == set(MODELS)
    untrained = ["--models", str(tmp_path), "--rows", "colour-ddpm/1/mixup/*"]
    assert main([*listing[:-1], *untrained]) == 2
    assert "train it with" in capsys.readouterr().err
