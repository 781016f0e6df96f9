"""What a config must agree on with the dataset and the mesh, checked before anything is compiled."""

from jax.sharding import Mesh
from ml_collections import ConfigDict

from data import Dataset
from trainer.errors import ConfigError
from trainer.state import model_config

POSITIVE_FIELDS = (
    "context_length",
    "batch_size",
    "steps",
    "accumulation",
    "checkpoint.every_steps",
    "checkpoint.keep_last",
    "checkpoint.timeout_seconds",
    "eval.every_steps",
    "eval.batches",
    "faults.exit_seconds",
    "faults.first_step_timeout_seconds",
    "faults.max_bad_steps",
    "faults.peer_timeout_seconds",
    "faults.start_timeout_seconds",
    "faults.step_timeout_factor",
    "faults.step_timeout_seconds",
    "log_every_steps",
    "memory_loss.tau",
)
NOT_NEGATIVE_FIELDS = (
    "checkpoint.every_minutes",
    "checkpoint.keep_every_steps",
    "checkpoint.keep_best",
    "faults.check_replicas_every_steps",
    "faults.spike_factor",
)


def check_config(config: ConfigDict) -> None:
    """Raises ConfigError for values that no run can have."""
    for name in POSITIVE_FIELDS + NOT_NEGATIVE_FIELDS:
        value = config
        for part in name.split("."):
            value = value[part]
        if value < 0 or (value == 0 and name in POSITIVE_FIELDS):
            kind = "positive" if name in POSITIVE_FIELDS else "0 or more"
            raise ConfigError(f"--config.{name} must be {kind}, got {value}")
    model_config(config)


def check_dataset(config: ConfigDict, dataset: Dataset) -> None:
    """Raises ConfigError unless the dataset has this vocabulary and windows of this length."""
    manifest = dataset.manifest
    if manifest.vocab_size != config.model.vocab_size:
        raise ConfigError(
            f"the dataset in {config.data.path} has {manifest.vocab_size} token ids, the model "
            f"{config.model.vocab_size}; set --config.model.vocab_size={manifest.vocab_size}"
        )
    if manifest.record_length % config.context_length:
        raise ConfigError(
            f"--config.context_length={config.context_length} does not divide the dataset's record length "
            f"{manifest.record_length}; choose a divisor"
        )


def check_batch(config: ConfigDict, mesh: Mesh) -> None:
    """Raises ConfigError unless the mesh divides what it shards."""
    shape, model = mesh.shape, model_config(config)
    rows = shape["data"] * shape["fsdp"] * config.accumulation
    if config.batch_size % rows:
        raise ConfigError(
            f"--config.batch_size={config.batch_size} cannot be divided into data={shape['data']} x "
            f"fsdp={shape['fsdp']} x accumulation={config.accumulation} = {rows} parts; choose a multiple of {rows}"
        )
    # Context parallelism pairs an early and a late chunk of the sequence on each device.
    chunks = 2 * shape["context"] if shape["context"] > 1 else 1
    if config.context_length % chunks:
        raise ConfigError(
            f"mesh context={shape['context']} splits the sequence into {chunks} chunks, which do not divide "
            f"context_length={config.context_length}; change --config.mesh.context or --config.context_length"
        )
    if model.num_kv_heads % shape["tensor"] and shape["tensor"] % model.num_kv_heads:
        raise ConfigError(
            f"mesh tensor={shape['tensor']} neither divides num_kv_heads={model.num_kv_heads} nor is divided by it; "
            "change --config.mesh.tensor or --config.model.num_kv_heads"
        )
    divided = (
        ("d_model", model.d_model, "fsdp"),
        ("num_heads", model.num_heads, "tensor"),
        ("mlp_dim", model.mlp_dim, "tensor"),
        ("vocab_size", model.vocab_size, "tensor"),
    )
    for name, size, axis in divided:
        if size % shape[axis]:
            raise ConfigError(
                f"mesh {axis}={shape[axis]} does not divide {name}={size}; change --config.mesh.{axis} or the model"
            )
