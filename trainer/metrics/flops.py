"""Model FLOPs utilisation (MFU): the FLOPs of the model itself, over what the devices can do meanwhile."""

from trainer.settings import Settings

# FLOP/s in bfloat16 of one JAX device, by its `device_kind`: the "TPU v4", "v5e", "v5p" and "v6e" pages of Cloud TPU's
# documentation.
PEAK_FLOPS = {"TPU v4": 275e12, "TPU v5": 459e12, "TPU v5 lite": 197e12, "TPU v6 lite": 918e12}


def mfu(config: Settings, step_seconds: float, devices: int, device_kind: str) -> float:
    """The share of the devices' peak that the model's FLOPs are; `device_kind` must be in PEAK_FLOPS."""
    return model_flops(config) / step_seconds / (devices * PEAK_FLOPS[device_kind])


def model_flops(config: Settings) -> float:
    """FLOPs of the model in a step: 6 x parameters in matmuls x tokens, and 12 x layers x heads' width x N x N / 2 a
    sequence for causal attention; neither the selection nor what is recomputed counts.
    """
    model, length = config.transformer, config.context_length
    width = model.num_heads * model.head_dim
    return matmul_flops(config) + config.batch_size * 12 * model.num_layers * width * length**2 / 2


def matmul_flops(config: Settings) -> float:
    """Of `model_flops`, what is not attention: forward and backward of the projections, SwiGLU and the logits."""
    model = config.transformer
    counts = model.parameter_counts()
    parameters = counts["attention"] + counts["mlp"] + model.vocab_size * model.d_model
    return 6.0 * parameters * config.batch_size * config.context_length
