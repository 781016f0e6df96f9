"""Span corruption, as T5 is trained (Raffel et al. 2020, section 3.1.4): windows of text with blanks to be filled.

Of `a b c d e f g` with the blanks `c d` and `g` the encoder reads `a b <0> e f <1>`, and the decoder predicts
`<0> c d <1> g <2>`. The sentinels <0>, <1>, ... are ids behind the dataset's own; the last one ends the sequence, since
EOS is a token of the text. As in T5's code a window begins with text and ends with a blank, and all ways to share out
its tokens among so many blanks are as likely.

The blanks of a row are a pure function of a stream's name, the step and the row.

Shape letters: R rows, W tokens of a window, M inputs, N outputs, S blanks, D random numbers.
"""

import dataclasses
import hashlib
from collections.abc import Iterable
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import ArrayLike

from data.errors import DataError

_WHOLE = 8  # lengths are multiples of it, by padding: a TPU's registers have so many rows


class SpanSizes(NamedTuple):
    """What windows of one length become."""

    inputs: int  # M, tokens of the encoder
    outputs: int  # N, tokens of the decoder
    sentinels: int


@dataclasses.dataclass(frozen=True)
class SpanCorruption:
    """How much is left out."""

    rate: float = 0.15  # share of the tokens
    mean_span: float = 3.0  # mean length of a blank, tokens

    def __post_init__(self) -> None:
        if not 0 < self.rate < 1:
            raise DataError(f"rate must be above 0 and below 1, got {self.rate}")
        if not self.mean_span >= 1:
            raise DataError(f"mean_span must be at least 1 token, got {self.mean_span}")

    def counts(self, lengths: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
        """How many tokens of windows of so many are left out, and in how many blanks."""
        lengths = np.asarray(lengths, np.int64)
        missing = np.clip(np.round(lengths * self.rate).astype(np.int64), 1, np.maximum(lengths - 1, 1))
        most = np.maximum(np.minimum(missing, lengths - missing), 1)
        blanks = np.clip(np.round(missing / self.mean_span).astype(np.int64), 1, most)
        return np.where(lengths, missing, 0), np.where(lengths, blanks, 0)

    def sizes(self, window: int) -> SpanSizes:
        """What holds any window of at most so many tokens; a full one leaves less than 8 places of padding."""
        missing, blanks = (int(n) for n in self.counts(window))
        inputs, outputs = (-(-n // _WHOLE) * _WHOLE for n in (window - missing + blanks, missing + blanks + 1))
        return SpanSizes(inputs, outputs, blanks + 1)


class Windows(Protocol):
    """What `data.TrainBatches` and `data.EvalBatches` have in common."""

    context_length: int
    batch_size: int
    num_batches: int

    def rows(self, step: int, rows: Iterable[int], /) -> dict[str, np.ndarray]: ...


class SpanBatches:
    """The windows of other batches, with blanks."""

    def __init__(
        self,
        windows: Windows,
        corruption: SpanCorruption,
        stream: str,
        *,
        first_sentinel: int,
        bos_id: int,
        pad_id: int,
    ):
        """`stream` names the random numbers: another one makes other blanks."""
        self.batch_size, self.num_batches = windows.batch_size, windows.num_batches
        self._windows, self._corruption, self._sizes = windows, corruption, corruption.sizes(windows.context_length)
        self._first_sentinel, self._bos_id, self._pad_id = first_sentinel, bos_id, pad_id
        name = f"span corruption {corruption.rate}, {corruption.mean_span}, {stream}"
        self._key = np.frombuffer(hashlib.blake2b(name.encode(), digest_size=16).digest(), "<u8")

    def rows(self, step: int, rows: Iterable[int]) -> dict[str, np.ndarray]:
        """The given rows of batch `step`: `encoder_inputs` int32 `[rows, M]`, `inputs` and `targets` int32 `[rows, N]`,
        and `bytes` int32 `[rows]`, which are 0: blanks are no text whose bits could be shared out among its bytes.
        """
        rows = list(rows)
        tokens_RW = self._windows.rows(step, rows)["targets"]
        length_R = np.sum(tokens_RW != self._pad_id, axis=1)  # padding is behind all else
        draws = 2 * (tokens_RW.shape[1] - 1)
        draws_RD = np.zeros((len(rows), draws))
        for place, row in enumerate(rows):
            bits = np.random.Philox(key=self._key, counter=[0, 0, row, step]).random_raw(draws)
            draws_RD[place] = (bits >> 11) * 2.0**-53
        start_RS, end_RS = self._blanks(length_R, draws_RD)
        inputs_RM, targets_RN = self._split(tokens_RW, length_R, start_RS, end_RS)
        outputs_RN = np.full_like(targets_RN, self._bos_id)
        outputs_RN[:, 1:] = targets_RN[:, :-1]
        return {
            "encoder_inputs": inputs_RM,
            "inputs": outputs_RN,
            "targets": targets_RN,
            "bytes": np.zeros(len(rows), np.int32),
        }

    def _blanks(self, length_R: np.ndarray, draws_RD: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where blanks begin and end, int [R, S]; a row that has fewer is filled up with empty ones at its end."""
        missing_R, blanks_R = self._corruption.counts(length_R)
        of_text_RD, of_blanks_RD = np.split(draws_RD, 2, axis=1)
        most = self._sizes.sentinels - 1
        missing_RS = _shared_out(missing_R, blanks_R, most, of_blanks_RD)
        text_RS = _shared_out(length_R - missing_R, blanks_R, most, of_text_RD)
        end_RS = np.cumsum(text_RS + missing_RS, axis=1)
        return end_RS - missing_RS, end_RS

    def _split(
        self, tokens_RW: np.ndarray, length_R: np.ndarray, start_RS: np.ndarray, end_RS: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """What the encoder reads and what the decoder predicts, int32 [R, M] and [R, N]."""
        (rows, width), (inputs, outputs, _) = tokens_RW.shape, self._sizes
        row_R, row_RS = np.arange(rows), np.broadcast_to(np.arange(rows)[:, None], start_RS.shape)
        change_RW = np.zeros((rows, width + 1), np.int64)
        first_RW = np.zeros((rows, width + 1), bool)
        there_RS = end_RS > start_RS
        first_RW[row_RS[there_RS], start_RS[there_RS]] = True
        np.add.at(change_RW, (row_RS, start_RS), 1)
        np.add.at(change_RW, (row_RS, end_RS), -1)
        first_RW = first_RW[:, :width]
        missing_RW = np.cumsum(change_RW, axis=1)[:, :width] > 0
        blank_RW = np.cumsum(first_RW, axis=1) - 1  # the newest blank's number
        sentinel_RW = self._first_sentinel + blank_RW

        inputs_RM = np.full((rows, inputs), self._pad_id, np.int32)
        kept_RW = (np.arange(width) < length_R[:, None]) & (~missing_RW | first_RW)
        row, place = np.nonzero(kept_RW)
        read_RW = np.where(first_RW, sentinel_RW, tokens_RW)
        inputs_RM[row, np.cumsum(kept_RW, axis=1)[row, place] - 1] = read_RW[row, place]

        targets_RN = np.full((rows, outputs), self._pad_id, np.int32)
        at_RW = np.cumsum(missing_RW, axis=1) + blank_RW  # in the targets: behind its sentinel and those before
        row, place = np.nonzero(missing_RW)
        targets_RN[row, at_RW[row, place]] = tokens_RW[row, place]
        row, place = np.nonzero(first_RW)
        targets_RN[row, at_RW[row, place] - 1] = sentinel_RW[row, place]
        missing_R, blanks_R = missing_RW.sum(axis=1), first_RW.sum(axis=1)
        row_R = row_R[length_R > 0]
        targets_RN[row_R, (missing_R + blanks_R)[row_R]] = self._first_sentinel + blanks_R[row_R]
        return inputs_RM, targets_RN


def fillings(targets_N: np.ndarray, first_sentinel: int) -> list[list[int]]:
    """What stands behind each sentinel <0>, <1>, ... of a decoder's sequence, up to the one that is missing or that
    ends it; the rest is not read.
    """
    found: list[list[int]] = []
    for token in targets_N.tolist():
        if token == first_sentinel + len(found):
            found.append([])
        elif token >= first_sentinel or not found:
            break
        else:
            found[-1].append(token)
    return found


def _shared_out(items_R: np.ndarray, parts_R: np.ndarray, most: int, draws_RD: np.ndarray) -> np.ndarray:
    """So many items in so many parts of one at least, int [R, most]; all ways are as likely for uniform draws."""
    width = draws_RD.shape[1] + 1
    gap_D = np.arange(width - 1)  # behind item 0, 1, ...
    order_RD = np.argsort(np.where(gap_D < items_R[:, None] - 1, draws_RD, np.inf), axis=1, kind="stable")
    is_cut_RD = np.zeros(draws_RD.shape, bool)
    np.put_along_axis(is_cut_RD, order_RD, gap_D < parts_R[:, None] - 1, axis=1)
    part_RW = np.zeros((len(items_R), width), np.int64)
    part_RW[:, 1:] = np.cumsum(is_cut_RD, axis=1)
    there_RW = np.arange(width) < items_R[:, None]
    flat = (np.arange(len(items_R))[:, None] * most + part_RW)[there_RW]
    return np.bincount(flat, minlength=len(items_R) * most).reshape(-1, most)
