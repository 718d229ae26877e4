"""Class-conditional pipelines with classifier-free guidance, which diffusers does not have."""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import (
    DiTTransformer2DModel,
    ImagePipelineOutput,
    SchedulerMixin,
    UNet2DConditionModel,
    VQModel,
)
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.utils.torch_utils import randn_tensor

from msfp.errors import InputError


class ClassPipeline(DiffusionPipeline):  # type: ignore[misc]
    """A pipeline that samples images of classes; the label after the last class means "no class".

    As in diffusers' `DiTPipeline`, the conditional guidance branch comes first in a batch.
    """

    @property
    @abstractmethod
    def denoiser(self) -> Any:
        """The network, whose config has `in_channels` and `sample_size`."""

    @property
    @abstractmethod
    def classes(self) -> int:
        """Number of classes, without "no class"."""

    @abstractmethod
    def predict(
        self, sample: torch.Tensor, timestep: torch.Tensor, labels: torch.Tensor
    ) -> torch.Tensor:
        """Return the network's prediction for a sample of each label."""

    @abstractmethod
    def decode(self, sample: torch.Tensor) -> torch.Tensor:
        """Return the images in [-1, 1] of final samples."""

    @torch.no_grad()
    def __call__(
        self,
        class_labels: Sequence[int],
        guidance_scale: float = 2.0,
        generator: torch.Generator | None = None,
        num_inference_steps: int = 50,
        output_type: str = "pil",
    ) -> ImagePipelineOutput:
        """Sample one image for each label.

        Args:
            class_labels: Classes of the images.
            guidance_scale: Weight w of eps(none) + w (eps(class) - eps(none)) (Ho and Salimans,
                2022). 1 is the conditional model without guidance, at half the computation.
            generator: Source of the initial noise.
            num_inference_steps: Sampler steps.
            output_type: "pil", or "np" for an array (n, height, width, channels) in [0, 1].

        Raises:
            InputError: If a label is not a class of the network.
        """
        labels = list(class_labels)
        if not all(0 <= label < self.classes for label in labels):
            raise InputError(f"class_labels must lie in 0 to {self.classes - 1}, not {labels}")
        device = self._execution_device
        condition = torch.tensor(labels, device=device)
        self.scheduler.set_timesteps(num_inference_steps, device=device)
        sample = self._noise(len(labels), generator) * self.scheduler.init_noise_sigma
        for timestep in self.progress_bar(self.scheduler.timesteps):
            model_input = self.scheduler.scale_model_input(sample, timestep)
            noise = self._guided(model_input, timestep, condition, guidance_scale)
            sample = self.scheduler.step(noise, timestep, sample).prev_sample
        decoded = self.decode(sample)
        images = (decoded / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).cpu().float().numpy()
        return ImagePipelineOutput(self.numpy_to_pil(images) if output_type == "pil" else images)

    def _noise(self, count: int, generator: torch.Generator | None) -> torch.Tensor:
        """Return the initial noise of `count` images."""
        config, dtype = self.denoiser.config, self.denoiser.dtype
        shape = (count, config.in_channels, config.sample_size, config.sample_size)
        noise: torch.Tensor = randn_tensor(
            shape, generator=generator, device=self._execution_device, dtype=dtype
        )
        return noise

    def _guided(
        self, sample: torch.Tensor, timestep: torch.Tensor, labels: torch.Tensor, guidance: float
    ) -> torch.Tensor:
        """Return the guided prediction; both guidance branches run as one batch."""
        if guidance == 1:
            return self.predict(sample, timestep, labels)
        none = torch.full_like(labels, self.classes)
        both = self.predict(torch.cat([sample] * 2), timestep, torch.cat([labels, none]))
        conditional, unconditional = both.chunk(2)
        return unconditional + guidance * (conditional - unconditional)


class ClassConditionalLDMPipeline(ClassPipeline):
    """Latent diffusion conditioned on class labels by cross-attention (Rombach et al., CVPR 2022).

    The U-Net's projection of conditions, `encoder_hid_proj`, is the table of class embeddings: the
    condition of a label is a one-hot row, which selects the embedding of the class.

    Args:
        vqvae: Autoencoder that decodes latents, after division by its `scaling_factor`.
        unet: U-Net with `encoder_hid_dim_type="text_proj"`. Its `encoder_hid_dim` is the number of
            classes, including "no class".
        scheduler: Any diffusers scheduler that supports the U-Net's prediction type.
    """

    def __init__(
        self, vqvae: VQModel, unet: UNet2DConditionModel, scheduler: SchedulerMixin
    ) -> None:
        super().__init__()
        if unet.config.encoder_hid_dim_type != "text_proj":
            raise InputError(
                "unet must look classes up in encoder_hid_proj: encoder_hid_dim_type must be "
                f"'text_proj', not {unet.config.encoder_hid_dim_type!r}"
            )
        self.register_modules(vqvae=vqvae, unet=unet, scheduler=scheduler)

    @property
    def denoiser(self) -> Any:
        """The U-Net."""
        return self.unet

    @property
    def classes(self) -> int:
        """Number of classes, without "no class"."""
        return int(self.unet.config.encoder_hid_dim) - 1

    def predict(
        self, sample: torch.Tensor, timestep: torch.Tensor, labels: torch.Tensor
    ) -> torch.Tensor:
        """Return the U-Net's prediction for latents of each label."""
        one_hot = F.one_hot(labels, self.classes + 1)[:, None].to(self.unet.dtype)
        prediction: torch.Tensor = self.unet(sample, timestep, encoder_hidden_states=one_hot).sample
        return prediction

    def decode(self, sample: torch.Tensor) -> torch.Tensor:
        """Return the images of latents."""
        images: torch.Tensor = self.vqvae.decode(sample / self.vqvae.config.scaling_factor).sample
        return images


class PixelDiTPipeline(ClassPipeline):
    """diffusers' `DiTPipeline` without its autoencoder: the transformer works on the pixels.

    Args:
        transformer: Transformer that predicts the noise from (x_t, t, class label). The label
            `num_classes` means "no class".
        scheduler: Any diffusers scheduler that supports noise prediction.
    """

    def __init__(self, transformer: DiTTransformer2DModel, scheduler: SchedulerMixin) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)

    @property
    def denoiser(self) -> Any:
        """The transformer."""
        return self.transformer

    @property
    def classes(self) -> int:
        """Number of classes, without "no class"."""
        return int(self.transformer.config.num_embeds_ada_norm)

    def predict(
        self, sample: torch.Tensor, timestep: torch.Tensor, labels: torch.Tensor
    ) -> torch.Tensor:
        """Return the transformer's prediction for images of each label."""
        prediction: torch.Tensor = self.transformer(
            sample, timestep=timestep.expand(len(sample)), class_labels=labels
        ).sample
        return prediction

    def decode(self, sample: torch.Tensor) -> torch.Tensor:
        """Return the samples, which already are images."""
        return sample


def pipeline_class(folder: Path) -> type[DiffusionPipeline]:
    """Return the class that loads a pipeline folder: the class of msfp that it names, if any."""
    index = folder / "model_index.json"
    name = json.loads(index.read_text(encoding="utf-8")).get("_class_name")
    own = (ClassConditionalLDMPipeline, PixelDiTPipeline)
    return next((each for each in own if each.__name__ == name), DiffusionPipeline)
