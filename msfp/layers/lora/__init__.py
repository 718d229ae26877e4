"""LoRA adapters of quantized layers, and the routers that choose among them."""
