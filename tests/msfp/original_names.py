"""What the latent-diffusion repository calls the tensors of diffusers' modules."""

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


def original_checkpoint(unet, autoencoder):
    """The state dict that the repository would have written for a pipeline's modules."""
    tensors = {
        f"model.diffusion_model.{unet_name(name)}": tensor
        for name, tensor in unet.state_dict().items()
        if not name.startswith("encoder_hid_proj")
    }
    tensors["cond_stage_model.embedding.weight"] = unet.encoder_hid_proj.weight.T
    for name, tensor in autoencoder.state_dict().items():
        old = autoencoder_name(name)
        # Its attention is made of convolutions.
        kernel = tensor[:, :, None, None] if "attn_1" in old and tensor.dim() == 2 else tensor
        tensors[f"first_stage_model.{old}"] = kernel
    return tensors
