"""Train a reference model and its classifier.

`python -m msfp.experiments.reference.train MODEL FOLDER`
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.progress import track
from safetensors.torch import save_file

from msfp.experiments.reference.classifier import ImageClassifier
from msfp.experiments.reference.models import DIGITS, REFERENCE_MODELS, Data
from msfp.experiments.reference.training import seeded, train_denoiser

CLASSIFIER_IMAGES = 4096
"""Maximum number of images that a classifier for Frechet distances is trained on."""


def train_classifier(data: Data, file: Path, seed: int = 0, epochs: int = 40) -> float:
    """Train the classifier on four fifths of the images; return its accuracy on the rest."""
    torch.manual_seed(seed)
    images, labels = (each[:CLASSIFIER_IMAGES] for each in data())
    order = torch.randperm(len(images), generator=seeded(seed, 0))
    test, train = order[: len(order) // 5], order[len(order) // 5 :]
    model = ImageClassifier(images.shape[1], images.shape[2], int(labels.max()) + 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for epoch in track(range(epochs), "classifier"):
        shuffled = train[torch.randperm(len(train), generator=seeded(seed, epoch + 1))]
        for batch in shuffled.split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
    model.eval()
    with torch.no_grad():
        accuracy = float((model(images[test]).argmax(1) == labels[test]).float().mean())
    save_file(model.state_dict(), file, metadata={"accuracy": f"{accuracy:.4f}"})
    return accuracy


def main() -> None:
    """Train a model and the classifier of its data, and write both to a folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", choices=sorted(REFERENCE_MODELS))
    parser.add_argument("folder", type=Path, help="where the trained folder is written")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    model, folder = REFERENCE_MODELS[arguments.model], arguments.folder
    folder.mkdir(parents=True, exist_ok=True)
    name = "classifier" if model.data is DIGITS.data else "photograph-classifier"
    file = folder / f"{name}.safetensors"
    if not file.exists():
        accuracy = train_classifier(model.data, file, arguments.seed)
        print(f"classifier accuracy on images kept from it: {accuracy:.4f}")
    train_denoiser(model, folder / model.name, arguments.seed)


if __name__ == "__main__":
    main()
