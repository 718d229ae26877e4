from msfp.cli.main import main

QUICK = ("--steps", "2", "--count", "4", "--batch", "4")


def test_a_dry_run_prints_what_the_command_takes_and_writes_nothing(tmp_path, capsys):
    assert main(["quantize", "digits", *QUICK, "--output", str(tmp_path / "q"), "--dry-run"]) == 0
    text = capsys.readouterr().out
    for part in ("UNet2DModel: 65 layers are quantized", "W4A4", "E2M2U", "refinement", "Disk:"):
        assert part in text
    assert not list(tmp_path.iterdir())


def test_a_dry_run_of_rounding_alone_has_no_refinement(tmp_path, capsys):
    words = ["--refine", "none", "--offload", "--output", str(tmp_path / "q"), "--dry-run"]
    assert main(["quantize", "digits", *QUICK, *words]) == 0
    text = capsys.readouterr().out
    assert "search" in text
    assert "refinement" not in text
