"""Deterministic batches: the batch of a step is a pure function of the dataset, the seed, the batch size and the step.

Hosts, meshes, workers and restarts do not enter, so none of them can change a batch.

A window is N consecutive tokens of a record; a row is one window: inputs BOS and the window's first N-1 tokens, targets
the N tokens. So column 0 is always a true BOS and each token of the split is predicted once per epoch. Targets equal
`pad_id` only where there is nothing to predict: after the end of a split, and in the rows that fill up the last batch
of an epoch, since no batch mixes two epochs. The loss must leave those out.
"""

import hashlib
from collections.abc import Iterable

import numpy as np

from data.dataset import Dataset
from data.errors import DataError

FILLER = -1


class _Windows:
    """The windows of N tokens of one split, in the order of the text."""

    def __init__(self, dataset: Dataset, context_length: int, batch_size: int, split: str):
        if batch_size < 1:
            raise DataError(f"batch_size must be positive, not {batch_size}")
        record_length = dataset.manifest.record_length
        if context_length < 1 or record_length % context_length:
            raise DataError(
                f"context_length {context_length} does not divide the dataset's record length {record_length}; "
                f"choose a divisor, or prepare the text with another --record-length"
            )
        self.dataset = dataset
        self.context_length = context_length
        self.batch_size = batch_size
        self.split = dataset.check_split(split)
        self.num_windows = -(-dataset.manifest.splits[split].tokens // context_length)
        self.num_batches = -(-self.num_windows // batch_size)
        self._per_record = record_length // context_length
        self._piece_bytes = dataset.tokenizer().piece_bytes()

    def read(self, windows: np.ndarray) -> dict[str, np.ndarray]:
        """Rows of the given windows: `inputs` and `targets` int32 `[rows, N]`, and `bytes` int32 `[rows]`, the UTF-8
        bytes of text that the targets are. FILLER gives a row of padding.
        """
        tokenizer = self.dataset.manifest.tokenizer
        targets_BN = np.full((len(windows), self.context_length), tokenizer.pad_id, np.int32)
        (rows,) = np.nonzero(windows != FILLER)
        if len(rows):
            record, place = np.divmod(windows[rows], self._per_record)
            tokens_BRN = self.dataset.read_records(self.split, record.tolist()).reshape(
                len(rows), self._per_record, self.context_length
            )
            targets_BN[rows] = tokens_BRN[np.arange(len(rows)), place]
        inputs_BN = np.empty_like(targets_BN)
        inputs_BN[:, 0] = tokenizer.bos_id
        inputs_BN[:, 1:] = targets_BN[:, :-1]
        bytes_B = self._piece_bytes[targets_BN].sum(axis=1, dtype=np.int32)
        return {"inputs": inputs_BN, "targets": targets_BN, "bytes": bytes_B}


class TrainBatches(_Windows):
    """Globally shuffled windows, a new permutation each epoch.

    `steps_per_epoch` batches hold every window once; the last is filled with rows of padding.
    """

    def __init__(self, dataset: Dataset, *, context_length: int, batch_size: int, seed: int, split: str = "train"):
        """Takes the windows of `context_length` tokens of a split.

        Raises:
          DataError: `context_length` does not divide the record length, or a batch exceeds the split.
        """
        super().__init__(dataset, context_length, batch_size, split)
        if self.num_windows < batch_size:
            raise DataError(
                f"the split {split!r} has {self.num_windows} windows of {context_length} tokens, fewer than one batch "
                f"of {batch_size}; lower batch_size or prepare more text"
            )
        if self.num_windows >= 2**32:
            raise DataError(f"{self.num_windows:,} windows exceed the shuffle's 2^32; raise context_length")
        self.steps_per_epoch = self.num_batches
        self._seed = seed
        # Here, because grain imports jax, which the processes that prepare text can do without.
        from grain.experimental import index_shuffle

        # What grain's own MapDataset.shuffle calls, without its bookkeeping, which would take a third of the time.
        self._shuffle = index_shuffle

    def indices(self, step: int, rows: Iterable[int] | None = None) -> np.ndarray:
        """The window of each row of batch `step`, int64 `[rows]`; FILLER (-1) for a row of padding."""
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        # Grain seeds epoch e with seed + e; hashed, or one run's second epoch would be another run's first.
        digest = hashlib.blake2b(f"seed {self._seed}, epoch {epoch}".encode(), digest_size=4).digest()
        order = {"max_index": self.num_windows - 1, "seed": int.from_bytes(digest, "little"), "rounds": 4}
        first = step_in_epoch * self.batch_size
        places = [first + row for row in (range(self.batch_size) if rows is None else rows)]
        return np.array([self._shuffle(i, **order) if i < self.num_windows else FILLER for i in places], np.int64)

    def rows(self, step: int, rows: Iterable[int]) -> dict[str, np.ndarray]:
        """As `read`: the given rows, in [0, batch size), of batch `step`."""
        return self.read(self.indices(step, rows))


class EvalBatches(_Windows):
    """The windows in order, each once, in `num_batches` batches; the last is filled with rows of padding."""

    def __init__(self, dataset: Dataset, *, context_length: int, batch_size: int, split: str = "validation"):
        """Takes the windows of `context_length` tokens of a split.

        Raises:
          DataError: `context_length` does not divide the record length, or the split is empty.
        """
        super().__init__(dataset, context_length, batch_size, split)
        if not self.num_windows:
            raise DataError(f"the split {split!r} is empty")

    def rows(self, batch: int, rows: Iterable[int]) -> dict[str, np.ndarray]:
        """As `read`: the given rows of batch `batch`, in [0, num_batches)."""
        windows = np.array([batch * self.batch_size + row for row in rows], np.int64)
        return self.read(np.where(windows < self.num_windows, windows, FILLER))
