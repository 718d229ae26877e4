import pytest
from tiny import tiny_pipeline

from msfp import InputError
from msfp.cli.loading import check_model
from msfp.cli.main import main


def test_folders_of_pipelines_and_names_on_the_hub_are_models(tmp_path):
    tiny_pipeline().save_pretrained(tmp_path / "pipe")
    check_model(str(tmp_path / "pipe"))
    check_model("owner/name-1.0")


def test_a_folder_that_is_no_pipeline_is_told_from_one_that_is_not_there(tmp_path):
    with pytest.raises(InputError, match=r"is not a pipeline folder: it has no model_index\.json"):
        check_model(str(tmp_path))
    for name in (str(tmp_path / "absent"), "absent", "./a/b", "a/b/c"):
        with pytest.raises(InputError, match="is no folder: it must be a pipeline folder, a name"):
            check_model(name)


def test_a_name_on_the_hub_that_is_not_in_the_cache_is_refused_in_a_sentence(tmp_path, capsys):
    words = ["quantize", "no-such-owner/no-such-model", "--local-files-only"]
    assert main([*words, "--output", str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "no-such-owner/no-such-model cannot be loaded: " in line
    assert not list(tmp_path.iterdir())
