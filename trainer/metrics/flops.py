"""Model FLOPs utilisation (MFU): the FLOPs of the model itself, over what the devices can do meanwhile."""

from trainer.settings import Settings

# FLOP/s in bfloat16 of one JAX device, by its `device_kind`: the "TPU v4", "v5e", "v5p" and "v6e" pages of Cloud TPU's
# documentation.
PEAK_FLOPS = {"TPU v4": 275e12, "TPU v5": 459e12, "TPU v5 lite": 197e12, "TPU v6 lite": 918e12}


def mfu(config: Settings, step_seconds: float, devices: int, device_kind: str) -> float:
    """The share of the devices' peak that the model's FLOPs are; `device_kind` must be in PEAK_FLOPS."""
    return model_flops(config) / step_seconds / (devices * PEAK_FLOPS[device_kind])


def model_flops(config: Settings) -> float:
    """FLOPs of the model in a step: 6 x parameters in matmuls x tokens, and 12 x layers x heads' width x pairs a
    sequence for attention, where causal attention has N x N / 2 pairs; neither the selection nor what is recomputed
    counts.
    """
    model, lengths = config.transformer, config.lengths
    inputs, outputs = lengths.get("encoder_inputs", 0), lengths["inputs"]
    pairs = inputs**2 + outputs**2 / 2 + inputs * outputs
    return matmul_flops(config) + config.batch_size * 12 * model.num_layers * model.num_heads * model.head_dim * pairs


def matmul_flops(config: Settings) -> float:
    """Of `model_flops`, what is not attention: forward and backward of the projections, SwiGLU and the logits."""
    model, lengths = config.transformer, config.lengths
    counts = model.parameter_counts()
    of_tokens = (counts["attention"] + counts["mlp"] + model.vocab_size * model.d_model) * lengths["inputs"]
    if config.corruption is not None:
        projection = model.num_layers * model.d_model * model.head_dim  # of one head
        inputs = lengths["encoder_inputs"]
        of_encoder = 2 * projection * (model.num_heads + model.num_kv_heads) + counts["mlp"]
        of_cross = 2 * projection * (model.num_heads * lengths["inputs"] + model.num_kv_heads * inputs)
        of_tokens += of_encoder * inputs + of_cross
    return 6.0 * of_tokens * config.batch_size
