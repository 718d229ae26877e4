import torch

from msfp.evaluate import FrechetDistance, noise_errors
from msfp.reference import PIPELINE_FOLDER, digit_classifier, digit_features, quality
from msfp.reference.digits import digits
from msfp.reference.train import TrainingState, build_denoiser, training_steps


def test_the_model_is_small_and_of_the_stated_kind(reference):
    size = sum(file.stat().st_size for file in PIPELINE_FOLDER.rglob("*"))
    assert size <= 8_000_000
    assert 1_500_000 <= sum(p.numel() for p in reference.unet.parameters()) <= 2_000_000
    assert {k: v.shape for k, v in build_denoiser().state_dict().items()} == {
        k: v.shape for k, v in reference.unet.state_dict().items()
    }


def test_the_model_predicts_the_noise_in_real_digits(reference):
    images, _ = digits()
    draw = torch.Generator().manual_seed(0)
    noise = torch.randn(images[:64].shape, generator=draw)
    timestep = torch.full((64,), 300)
    with torch.no_grad():
        noisy = reference.scheduler.add_noise(images[:64], noise, timestep)
        error = (reference.unet(noisy, timestep).sample - noise).square().mean()
    assert error < 0.05


def test_the_classifier_reads_digits():
    images, labels = digits()
    with torch.no_grad():
        accuracy = (digit_classifier()(images).argmax(1) == labels).float().mean()
    assert accuracy > 0.98


def test_the_frechet_distance_tells_digits_from_noise_and_halves_from_each_other():
    real = (digits()[0] + 1) / 2
    distance = FrechetDistance(digit_features, real[::2])
    noise = torch.rand(real[1::2].shape, generator=torch.Generator().manual_seed(0))
    assert distance(real[1::2]) < 2 * max(quality()["frechet_real_halves"])
    assert distance(noise) > 10 * distance(real[1::2])
    assert abs(distance(real[::2])) < 1e-3


def test_full_precision_has_no_noise_error_against_itself(reference, trajectories):
    assert max(noise_errors(reference.unet, trajectories)) < 1e-10


def test_interrupted_training_continues_to_the_same_weights(tmp_path, monkeypatch):
    monkeypatch.setattr("msfp.reference.train.STEPS", 4)
    monkeypatch.setattr("msfp.reference.train.BATCH", 4)
    monkeypatch.setattr("msfp.reference.train.SAVE_EVERY", 2)

    def train(file, stop):
        torch.manual_seed(0)
        state = TrainingState(build_denoiser(), file)
        for _loss in training_steps(state, seed=0):
            if state.step == stop:
                break
        return state

    whole = train(tmp_path / "whole", stop=4)
    train(tmp_path / "parts", stop=3)  # its last saved state is that of step 2
    resumed = train(tmp_path / "parts", stop=4)
    for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)
    for name, average in whole.average.items():
        assert torch.equal(average, resumed.average[name])
