"""What the settings must agree on with the dataset and the mesh, checked before anything is compiled."""

from collections.abc import Mapping

from data import Manifest
from trainer.errors import ConfigError
from trainer.settings import Settings


def check_dataset(settings: Settings, manifest: Manifest) -> None:
    """Raises ConfigError unless the model knows the dataset's tokens, and windows have this length.

    A model may know more: pretrained ones often have a vocabulary that is padded to a round number.
    """
    if manifest.vocab_size > settings.model.vocab_size:
        raise ConfigError(
            f"the dataset in {settings.data.path} has {manifest.vocab_size} token ids, the model "
            f"{settings.model.vocab_size}; set --config.model.vocab_size={manifest.vocab_size}"
        )
    if settings.corruption is not None:
        sentinels = settings.corruption.sizes(settings.context_length).sentinels
        if (needed := manifest.vocab_size + sentinels) > settings.model.vocab_size:
            raise ConfigError(
                f"the dataset in {settings.data.path} has {manifest.vocab_size} token ids, and blanks in contexts of "
                f"{settings.context_length} need {sentinels} more; set --config.model.vocab_size={needed}"
            )
    if manifest.record_length % settings.context_length:
        raise ConfigError(
            f"--config.context_length={settings.context_length} does not divide the dataset's record length "
            f"{manifest.record_length}; choose a divisor"
        )


def check_batch(settings: Settings, shape: Mapping[str, int]) -> None:
    """Raises ConfigError unless a mesh of this shape, devices along each axis, divides what it shards."""
    model = settings.transformer
    rows = shape["data"] * shape["fsdp"] * settings.accumulation
    if settings.batch_size % rows:
        raise ConfigError(
            f"--config.batch_size={settings.batch_size} cannot be divided into data={shape['data']} x "
            f"fsdp={shape['fsdp']} x accumulation={settings.accumulation} = {rows} parts; choose a multiple of {rows}"
        )
    if settings.corruption is not None and shape["context"] > 1:
        raise ConfigError(
            f"mesh context={shape['context']}: an encoder-decoder's sequences are not split; set "
            "--config.mesh.context=1, and use fsdp or tensor"
        )
    # Context parallelism pairs an early and a late chunk of the sequence on each device.
    chunks = 2 * shape["context"] if shape["context"] > 1 else 1
    if settings.context_length % chunks:
        raise ConfigError(
            f"mesh context={shape['context']} splits the sequence into {chunks} chunks, which do not divide "
            f"context_length={settings.context_length}; change --config.mesh.context or --config.context_length"
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
