"""Where a run's tokens come from: a dataset, or a task that makes them up."""

import dataclasses
from collections.abc import Callable
from typing import Protocol

from data import (
    EvalBatches,
    Manifest,
    SpanBatches,
    SpanCorruption,
    Task,
    TaskEvalBatches,
    TaskTrainBatches,
    TrainBatches,
    find_task,
    open_dataset,
)
from data.spans import Windows
from data.tasks import PAD, fingerprint
from data.tokenizer import legible
from trainer.batches import Rows
from trainer.checks import check_dataset
from trainer.errors import ConfigError
from trainer.settings import Settings

VALIDATION = "validation"  # the stream of the blanks in held-out windows, which do not depend on the seed


class EvalRows(Rows, Protocol):
    """Batches that end."""

    num_batches: int


@dataclasses.dataclass(frozen=True)
class Source:
    """Tokens to train and to validate on."""

    name: str  # for people
    fingerprint: str  # of all sequences there are
    vocab_size: int  # token ids
    pad_id: int  # the id that does not count
    train: Rows
    validation: EvalRows
    piece: Callable[[int], str]  # a token as a reader can see it
    has_answers: bool  # whether a prediction is right or wrong, and not only more or less likely


def open_source(settings: Settings) -> Source:
    """What the settings name, checked against them.

    Raises:
      ConfigError, data.DataError: it cannot be trained on with these settings.
    """
    length, batch_size = settings.context_length, settings.batch_size
    if settings.data.task:
        return _task(settings)
    dataset = open_dataset(settings.data.path, settings.faults.storage_retry_seconds)
    manifest = dataset.manifest
    check_dataset(settings, manifest)
    tokenizer, known = dataset.tokenizer(), manifest.vocab_size
    train = TrainBatches(dataset, context_length=length, batch_size=batch_size, seed=settings.seed)
    validation = EvalBatches(dataset, context_length=length, batch_size=batch_size)
    source = Source(
        name=settings.data.path,
        fingerprint=manifest.fingerprint,
        vocab_size=known,
        pad_id=manifest.tokenizer.pad_id,
        train=train,
        validation=validation,
        piece=lambda token: legible(tokenizer.piece(token)) if token < known else f"<{token - known}>",
        has_answers=False,
    )
    if settings.corruption is None:
        return source
    return dataclasses.replace(
        source,
        vocab_size=known + settings.corruption.sizes(length).sentinels,
        train=with_blanks(train, settings.corruption, manifest, f"training, seed {settings.seed}"),
        validation=with_blanks(validation, settings.corruption, manifest, VALIDATION),
    )


def with_blanks(windows: Windows, corruption: SpanCorruption, manifest: Manifest, stream: str) -> SpanBatches:
    """The windows of a dataset of this manifest for an encoder-decoder; another stream makes other blanks."""
    bos_id, pad_id = manifest.tokenizer.bos_id, manifest.tokenizer.pad_id
    return SpanBatches(windows, corruption, stream, first_sentinel=manifest.vocab_size, bos_id=bos_id, pad_id=pad_id)


def _task(settings: Settings) -> Source:
    if settings.data.path:
        raise ConfigError(
            f"--config.data.task={settings.data.task} makes its sequences up, and reads no dataset; leave out "
            f"--config.data.path={settings.data.path}"
        )
    task = task_of(settings)
    vocab_size, length, batch_size = len(task.pieces), settings.context_length, settings.batch_size
    if vocab_size > settings.model.vocab_size:
        raise ConfigError(
            f"task {task.name} has {vocab_size} token ids, the model {settings.model.vocab_size}; "
            f"set --config.model.vocab_size={vocab_size}"
        )
    return Source(
        name=f"task {task.name}",
        fingerprint=fingerprint(task),
        vocab_size=vocab_size,
        pad_id=PAD,
        train=TaskTrainBatches(task, context_length=length, batch_size=batch_size, seed=settings.seed),
        validation=TaskEvalBatches(task, context_length=length, batch_size=batch_size),
        piece=lambda token: legible(task.pieces[token]),
        has_answers=True,
    )


def task_of(settings: Settings) -> Task:
    """The made-up task that a run was trained on.

    Raises:
      data.DataError: there is no such task, or none of these sizes.
    """
    data = settings.data
    return find_task(data.task, names=data.task_names, values=data.task_values, queries=data.task_queries)
