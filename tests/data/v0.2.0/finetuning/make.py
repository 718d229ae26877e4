"""Write a fine-tuning that was interrupted, with msfp 0.2.0: python make.py NEW_FOLDER.

In the folder are then

    full          a full-precision pipeline
    quantized     msfp quantize full --output quantized ...
    tuned.state   what msfp finetune quantized --teacher full --output tuned --compare ... left when
                  it was interrupted at its third state: a training that has ended, one that has not
    expected.json what the same command wrote that was not interrupted
"""

import contextlib
import shutil
import sys
from pathlib import Path

import torch
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel

from msfp.cli import main
from msfp.training.state import TrainingState

QUANTIZE = (
    "quantize full --output quantized --no-refine --steps 3 --count 4 --batch 4 --include conv_in "
    "--include down_blocks.1 --include conv_out"
)
FINETUNE = (
    "finetune quantized --teacher full --compare --sampler-steps 3 --sampler-batch 4 --count 8 "
    "--held-out 4 --steps 8 --batch 12 --rank 1 --hub 2 --power 1 --accumulate 2 --rate norms=0 "
    "--rate adapters=0.002 --rate router=0.002 --evaluate-every 2 --save-every 4 --output"
)


def make_pipeline():
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(4, 8),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=2,
        attention_head_dim=4,
    ).eval()
    return DDIMPipeline(unet, DDIMScheduler(clip_sample=False))


def run(command):
    return main(command.split())


def interrupt(number):
    """Have the next command interrupted once a state of some number is saved."""
    save, saved = TrainingState.save, []

    def save_and_stop(self, file, **facts):
        save(self, file, **facts)
        saved.append(file)
        if len(saved) == number:
            raise KeyboardInterrupt

    TrainingState.save = save_and_stop


def write(folder):
    folder.mkdir(parents=True)
    torch.set_num_threads(1)
    with contextlib.chdir(folder):
        make_pipeline().save_pretrained("full")
        assert run(QUANTIZE) == 0
        assert run(f"{FINETUNE} whole") == 0
        Path("whole/finetuning.json").rename("expected.json")
        shutil.rmtree("whole")
        interrupt(3)
        assert run(f"{FINETUNE} tuned") == 130


if __name__ == "__main__":
    write(Path(sys.argv[1]))
