"""Load the packed denoisers in a folder, and print a digest of the output of each.

python tests/helpers/load_denoisers.py FOLDER
"""

import sys
import warnings
from pathlib import Path

import diffusers
from denoisers import CASES

import msfp  # noqa: F401 - registers the quantization
from msfp.pipelines.trajectories import as_vector
from msfp.support.fingerprints import digest


def main() -> None:
    """Load each folder by the name of its class."""
    warnings.simplefilter("ignore")
    for folder in sorted(Path(sys.argv[1]).iterdir()):
        case = CASES[folder.name]
        denoiser = getattr(diffusers, folder.name).from_pretrained(folder)
        print(folder.name, digest([("output", as_vector(case.call(denoiser)))]))


if __name__ == "__main__":
    main()
