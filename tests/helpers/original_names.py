"""What the latent-diffusion repository calls the tensors of diffusers' modules."""

import torch
from diffusers.models.attention_processor import Attention

BLOCKS = 3
"""Blocks of the autoencoder; decoders number theirs backwards."""
UNET_ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
UNET_ATTENTION = {"group_norm": "norm", "to_out.0": "proj_out"}
"""Of attention without conditions; queries, keys and values are one tensor there."""
AUTOENCODER_PARTS = {
    "conv_shortcut": "nin_shortcut",
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}


def _replaced(name, table):
    for new, old in table.items():
        name = name.replace(new, old)
    return name


def unet_name(name):
    """The original name of a tensor of a U-Net of four levels with two layers each."""
    parts = name.split(".")
    if parts[0] == "mid_block":
        number = 1 if parts[1] == "attentions" else 2 * int(parts[2])
        head, rest = f"middle_block.{number}", parts[3:]
    elif parts[0] in ("down_blocks", "up_blocks"):
        down, level, kind, layer = parts[0] == "down_blocks", int(parts[1]), parts[2], int(parts[3])
        if kind == "downsamplers":
            return f"input_blocks.{3 * (level + 1)}.0.op.{parts[-1]}"
        if kind == "upsamplers":
            return f"output_blocks.{3 * level + 2}.2.conv.{parts[-1]}"
        block = (
            f"input_blocks.{3 * level + layer + 1}"
            if down
            else f"output_blocks.{3 * level + layer}"
        )
        head, rest = f"{block}.{int(kind == 'attentions')}", parts[4:]
    else:
        return _replaced(name, UNET_ENDS)
    end = ".".join(rest)
    return f"{head}.{_replaced(end, UNET_RESNET) if 'resnets' in parts else end}"


def autoencoder_name(name):
    """The original name of a tensor of a VQModel of three blocks."""
    parts = name.split(".")
    if parts[0] not in ("encoder", "decoder"):
        return name
    if parts[1] == "mid_block":
        part = "attn_1" if parts[2] == "attentions" else f"block_{int(parts[3]) + 1}"
        head, rest = f"{parts[0]}.mid.{part}", parts[4:]
    elif parts[1] in ("down_blocks", "up_blocks"):
        way = parts[1].removesuffix("_blocks")
        level = int(parts[2]) if way == "down" else BLOCKS - 1 - int(parts[2])
        if parts[3] == f"{way}samplers":
            return f"{parts[0]}.{way}.{level}.{way}sample.conv.{parts[-1]}"
        head, rest = f"{parts[0]}.{way}.{level}.block.{parts[4]}", parts[5:]
    else:
        return name.replace("conv_norm_out", "norm_out")
    return f"{head}.{_replaced('.'.join(rest), AUTOENCODER_PARTS)}"


def attention_tensors(attention):
    """The original tensors of an attention without conditions, from diffusers' state dict of it."""
    tensors = {
        _replaced(name, UNET_ATTENTION): tensor
        for name, tensor in attention.state_dict().items()
        if name.startswith(tuple(UNET_ATTENTION))
    }
    for kind in ("weight", "bias"):
        parts = [getattr(layer, kind) for layer in (attention.to_q, attention.to_k, attention.to_v)]
        heads = torch.stack([part.unflatten(0, (attention.heads, -1)) for part in parts], dim=1)
        tensors[f"qkv.{kind}"] = heads.flatten(0, 2).detach()
    # All its layers are convolutions with kernels of width 1.
    return {name: x[..., None] if x.dim() == 2 else x for name, x in tensors.items()}


def unet_tensors(unet):
    """The original tensors of a U-Net."""
    tensors = {}
    for name, tensor in unet.state_dict().items():
        block, _, rest = name.partition(".attentions.")
        path = f"{block}.attentions.{rest.split('.')[0]}"
        if rest and isinstance(unet.get_submodule(path), Attention):
            for part, each in attention_tensors(unet.get_submodule(path)).items():
                tensors[unet_name(f"{path}.{part}")] = each
        elif not name.startswith("encoder_hid_proj"):
            tensors[unet_name(name)] = tensor
    return tensors


def original_checkpoint(unet, autoencoder, averages):
    """The state dict that the repository would have written for a pipeline's modules.

    With averages these are the U-Net's tensors, and its weights are something else.
    """
    tensors = {f"model.diffusion_model.{k}": x for k, x in unet_tensors(unet).items()}
    if averages:
        flat = {name.removeprefix("model.").replace(".", ""): x for name, x in tensors.items()}
        tensors = {name: x + 1 for name, x in tensors.items()}
        tensors |= {f"model_ema.{name}": x for name, x in flat.items()}
        tensors |= {
            "model_ema.decay": torch.tensor(0.9999),
            "model_ema.num_updates": torch.tensor(9),
        }
    if hasattr(unet, "encoder_hid_proj") and unet.encoder_hid_proj is not None:
        tensors["cond_stage_model.embedding.weight"] = unet.encoder_hid_proj.weight.T
    for name, tensor in autoencoder.state_dict().items():
        old = autoencoder_name(name)
        # Its attention is made of convolutions.
        kernel = tensor[:, :, None, None] if "attn_1" in old and tensor.dim() == 2 else tensor
        tensors[f"first_stage_model.{old}"] = kernel
    return tensors
