import shutil

import pytest
from denoisers import CASES
from pages import DOCS, script
from pipelines import CASES as PIPELINES

from msfp.experiments.study import render as rendering


@pytest.mark.parametrize(
    ("page", "table"), [("methods", "methods"), ("fine-tuning", "ingredients")]
)
def test_tables_of_the_pages_are_those_of_the_records(page, table):
    made = getattr(script("render_tables"), table)()
    assert f"<!-- table -->\n{made}<!-- end -->" in (DOCS / f"{page}.md").read_text()


def test_the_page_of_results_is_that_of_the_records(tmp_path, monkeypatch):
    monkeypatch.setattr(rendering, "png", lambda _picture: b"")
    shutil.copy(DOCS / "results" / "results.jsonl", tmp_path)
    shutil.copytree(DOCS / "results" / "images", tmp_path / "images")
    assert rendering.render(tmp_path).read_text() == (DOCS / "results" / "results.md").read_text()


def test_the_page_of_denoisers_has_every_class_of_the_sweep():
    lines = (DOCS / "denoisers.md").read_text().splitlines()
    names = [line.split(" | ")[0].removeprefix("| ") for line in lines if line.startswith("| ")]
    assert names[1:] == sorted(CASES)


def test_the_page_of_pipelines_has_every_pipeline_that_was_tried():
    lines = (DOCS / "pipelines.md").read_text().splitlines()
    names = [line.split(" | ")[0].removeprefix("| ") for line in lines if line.startswith("| ")]
    assert names[1:] == sorted(PIPELINES)
