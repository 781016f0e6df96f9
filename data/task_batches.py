"""Batches of a made-up task: each is a pure function of the task, the seed, the batch size and the step.

Sequence number `index` of a stream is drawn by Philox from the stream, the context's length and the index alone. Its
bits are the same in every release of NumPy. Training and validation never share a sequence: by a hash of its tokens
each belongs to one of them, and what belongs to the other is drawn again.
"""

import hashlib
from collections.abc import Iterable

import numpy as np

from data.batches import FILLER
from data.errors import DataError
from data.tasks import BOS, PAD, Task, fingerprint

UNASKED = -1  # the target where there is a token that is not to be predicted; where there is none it is PAD
HELD_OUT = 8  # one of so many sequences is validation's
VALIDATION_SEQUENCES = 2_048
_ATTEMPTS = 1_000  # to draw a sequence of the right split


class _Sequences:
    """The endless sequences of one stream, in contexts of N tokens."""

    def __init__(self, task: Task, context_length: int, batch_size: int, stream: str, held_out: bool):
        if batch_size < 1:
            raise DataError(f"batch_size must be positive, not {batch_size}")
        self.task, self.context_length, self.batch_size = task, context_length, batch_size
        self._draws, self._held_out = task.draws(context_length), held_out
        name = f"{fingerprint(task)}, {stream}, {context_length} tokens"
        self._key = np.frombuffer(hashlib.blake2b(name.encode(), digest_size=16).digest(), "<u8")

    def read(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Rows of the given sequences: `inputs` and `targets` int32 `[rows, N]`, and `bytes` int32 `[rows]`, which are
        0: there is no text. Targets are UNASKED but for answers. FILLER gives a row of padding.
        """
        tokens_RN = np.full((len(indices), self.context_length), PAD, np.int32)
        answers_RN = np.zeros(tokens_RN.shape, bool)
        (missing,) = np.nonzero(indices != FILLER)
        for attempt in range(_ATTEMPTS):
            if not len(missing):
                break
            draws_RD = np.stack([self._draw(int(index), attempt) for index in indices[missing]])
            tokens_RN[missing], answers_RN[missing] = self.task.make(draws_RD, self.context_length)
            missing = missing[[self._is_held_out(tokens_RN[row]) != self._held_out for row in missing]]
        if len(missing):
            raise DataError(
                f"task {self.task.name} has too few sequences of {self.context_length} tokens to hold some back for "
                "validation; choose a longer context_length"
            )
        targets_RN = np.where(answers_RN | (tokens_RN == PAD), tokens_RN, UNASKED)
        inputs_RN = np.empty_like(tokens_RN)
        inputs_RN[:, 0] = BOS
        inputs_RN[:, 1:] = tokens_RN[:, :-1]
        return {"inputs": inputs_RN, "targets": targets_RN, "bytes": np.zeros(len(indices), np.int32)}

    def _draw(self, index: int, attempt: int) -> np.ndarray:
        bits = np.random.Philox(key=self._key, counter=[0, attempt, index, 0]).random_raw(self._draws)
        return (bits >> 11) * 2.0**-53

    @staticmethod
    def _is_held_out(tokens_N: np.ndarray) -> bool:
        tokens = tokens_N[tokens_N != PAD].astype("<i4").tobytes()
        return hashlib.blake2b(tokens, digest_size=1).digest()[0] % HELD_OUT == 0


class TaskTrainBatches(_Sequences):
    """Other sequences in every batch, without end."""

    def __init__(self, task: Task, *, context_length: int, batch_size: int, seed: int):
        """Takes sequences of at most `context_length` tokens.

        Raises:
          DataError: the task has none that is so short.
        """
        super().__init__(task, context_length, batch_size, f"training, seed {seed}", held_out=False)

    def rows(self, step: int, rows: Iterable[int]) -> dict[str, np.ndarray]:
        """As `read`: the given rows, in [0, batch size), of batch `step`."""
        return self.read(np.array([step * self.batch_size + row for row in rows], np.int64))


class TaskEvalBatches(_Sequences):
    """The same VALIDATION_SEQUENCES sequences whatever the seed, each once; the last batch is filled with padding."""

    def __init__(self, task: Task, *, context_length: int, batch_size: int):
        """As `TaskTrainBatches`."""
        super().__init__(task, context_length, batch_size, "validation", held_out=True)
        self.num_batches = -(-VALIDATION_SEQUENCES // batch_size)

    def rows(self, batch: int, rows: Iterable[int]) -> dict[str, np.ndarray]:
        """As `read`: the given rows of batch `batch`, in [0, num_batches)."""
        indices = np.array([batch * self.batch_size + row for row in rows], np.int64)
        return self.read(np.where(indices < VALIDATION_SEQUENCES, indices, FILLER))
