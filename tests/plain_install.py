"""Use what `pip install .` alone installs: import every module, and take a pipeline all the way.

python tests/plain_install.py

Tests need more packages than users have. Run with a Python that has no more than the plain
install, this finds a package that msfp needs and does not name. It is no test module, since a
plain install has no pytest.
"""

import importlib
import json
import pkgutil
import subprocess
import sys
import tempfile
from pathlib import Path

EXTRAS = {
    "fpformats.strategies": "msfp[hypothesis]",
    "fpformats.kernels.cuda": "triton",
    "fpformats.kernels.triton_kernels": "triton",
    "msfp.layers.execution.triton_kernels": "triton",
}
"""Modules that need what is not installed, and what their error must name."""
MODELS = {"digits": (), "digits-transformer": (0, 7), "photographs": ()}
"""Reference pipelines, and the classes of the images that they make."""
FOLDERS = (
    "StableDiffusionPipeline", "StableDiffusionXLPipeline", "StableDiffusion3Pipeline",
    "FluxPipeline", "PixArtSigmaPipeline",
)  # fmt: skip
"""Pipelines that users have in folders."""
OF_OPTIONS = ("prompt", "num_inference_steps")
CALLS = ("--steps", "2", "--count", "2", "--batch", "2")


def import_everything() -> None:
    """Import every module of both packages; only extras may be missing, and must be named."""
    import fpformats
    import msfp

    imported = 0
    for package in (fpformats, msfp):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if module.name.endswith("__main__"):
                continue
            try:
                importlib.import_module(module.name)
            except ImportError as error:
                if EXTRAS.get(module.name, error) not in str(error):
                    raise
                print(f"{module.name}: {error}")
            else:
                imported += 1
    print(f"{imported} modules imported")


def take_a_pipeline_all_the_way(name: str, classes: tuple[int, ...]) -> None:
    """Quantize a reference pipeline, save it, and load it with diffusers to the same images."""
    import torch

    import msfp

    pipe = msfp.reference_pipeline(name)
    sampler = msfp.Sampler(steps=2, batch=2, conditions=classes)
    config = msfp.QuantizationConfig(refine=None)
    msfp.quantize(pipe, config, calibration=sampler.calls(4, seed=0))
    msfp.pack(pipe)
    images = sampler(pipe, 2, seed=1)
    with tempfile.TemporaryDirectory() as folder:
        msfp.save(pipe, folder)
        for loaded in (msfp.load(folder), type(pipe).from_pretrained(folder)):
            assert torch.equal(sampler(loaded, 2, seed=1), images), name
    print(f"{name}: quantized, saved, and loaded to the same images")


def run_commands() -> None:
    """Run the commands of the quickstart in processes of their own."""
    command = Path(sys.executable).with_name("msfp")
    with tempfile.TemporaryDirectory() as folder:
        for words in (
            ("--help",),
            ("--version",),
            ("quantize", "digits", *CALLS, "--refine", "none", "--output", "w4a4"),
            ("inspect", "w4a4", "--filter", "conv_*"),
            ("sample", "w4a4", *CALLS, "--output", "grid.png"),
            ("evaluate", "w4a4", "--original", "digits", *CALLS, "--report", "report.html"),
        ):
            subprocess.run([command, *words], cwd=folder, check=True, stdout=subprocess.DEVNULL)  # noqa: S603
        assert sorted(each.name for each in Path(folder).iterdir()) == [
            "grid.png",
            "report.html",
            "w4a4",
        ]
    print("commands run")


def quantize_folders() -> None:
    """Quantize pipeline folders with prompts by the command, as the command line has it."""
    sys.path.insert(0, str(Path(__file__).parent / "helpers"))
    from pipelines import CASES

    from msfp.cli.main import main

    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        (folder / "prompts.txt").write_text("a fox\na cat\n")
        for name in FOLDERS:
            case = CASES[name]
            case.make().save_pretrained(folder / name)
            given = {k: v for k, v in case.arguments().items() if k not in OF_OPTIONS}
            words = ["quantize", folder / name, "--prompts", folder / "prompts.txt", *CALLS]
            words += ["--output", folder / f"{name}-w4a4", "--call", json.dumps(given)]
            assert main([str(word) for word in words]) == 0, name
            print(f"{name}: quantized from its folder")


if __name__ == "__main__":
    import_everything()
    for model, classes in MODELS.items():
        take_a_pipeline_all_the_way(model, classes)
    run_commands()
    quantize_folders()
