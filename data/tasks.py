"""Made-up tasks as a source of tokens: sequences are computed when they are needed, and none is ever stored.

The paper shows its mechanism on two; their exact format is not known here, so this one is our choice.

- assignment: names are given values again and again, `name value name value ...`, then some are asked for their latest,
  `? name value`. A name's value is always another one than before, so whoever reads a stale one is wrong.
- parity: `x y x y ...`, where x is a random bit and y whether the bits so far have an odd number of ones. Running
  results make all but the last two tokens stale.

A sequence of a context of N tokens has at most N behind BOS and at least about half, so a longer context asks for
longer sequences, and where an answer stands says nothing about it. Only answers are to be predicted.

`data.task_batches` draws the numbers that a sequence is made of.

Shape letters: R rows, T tokens behind BOS, A assignments, V names.
"""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from data.errors import DataError

PAD, BOS = 0, 1
_VERSION = 1  # of what is made of the same numbers


class Task(Protocol):
    """A task: its name, its sizes and how its sequences are made."""

    @property
    def name(self) -> str: ...

    @property
    def pieces(self) -> Sequence[str]:
        """Each token as a reader can see it."""

    def draws(self, length: int) -> int:
        """How many random numbers a sequence of at most `length` tokens takes.

        Raises:
          DataError: the task has none that is so short.
        """

    def make(self, draws_RD: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens [R, T], PAD behind the end, and which of them are answers, bool; `draws_RD` are uniform in [0, 1)."""

    def stale(self, tokens_RT: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What a perfect memory forgets when the first answer, or in parity the last, is to be given: where the token
        before it stands, int [R], and which earlier tokens are stale, and which are alive, bool [R, T].
        """


@dataclasses.dataclass(frozen=True)
class Assignment:
    """Variable assignment, of so many names, values and questions."""

    names: int
    values: int
    queries: int
    name = "assignment"
    _QUERY, _FIRST = 2, 3

    def __post_init__(self) -> None:
        if self.names < 1 or self.values < 2 or self.queries < 1:
            raise DataError(f"task assignment needs a name, two values and a query at least, got {self}")

    @property
    def pieces(self) -> list[str]:
        names, values = (f"n{n}" for n in range(self.names)), (f"v{n}" for n in range(self.values))
        return ["<pad>", "<s>", "?", *names, *values]

    def draws(self, length: int) -> int:
        most = self._most(length)
        if most < 2:
            raise DataError(
                f"context_length {length} is too short for task assignment, whose {self.queries} queries take "
                f"{3 * self.queries} tokens; choose {3 * self.queries + 4} at least"
            )
        return 1 + 2 * most + self.queries

    def make(self, draws_RD: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
        most, rows = self._most(length), np.arange(len(draws_RD))
        number_R = _between((most + 1) // 2, most, draws_RD[:, 0])
        name_RA = _between(0, self.names - 1, draws_RD[:, 1 : 1 + most])
        value_RV = np.full((len(rows), self.names), -1)  # each name's latest
        tokens_RT = np.full((len(rows), length), PAD, np.int32)
        for a in range(most):
            there, name_R, draw_R = a < number_R, name_RA[:, a], draws_RD[:, 1 + most + a]
            old_R = value_RV[rows, name_R]
            other_R = (old_R + 1 + _between(0, self.values - 2, draw_R)) % self.values
            new_R = np.where(old_R < 0, _between(0, self.values - 1, draw_R), other_R)
            value_RV[rows[there], name_R[there]] = new_R[there]
            tokens_RT[there, 2 * a] = self._FIRST + name_R[there]
            tokens_RT[there, 2 * a + 1] = self._FIRST + self.names + new_R[there]
        known_RV = value_RV >= 0
        which_RQ = _between(0, known_RV.sum(axis=1, keepdims=True) - 1, draws_RD[:, -self.queries :])
        asked_RQ = np.argmax(np.cumsum(known_RV, axis=1)[:, None] > which_RQ[..., None], axis=-1)
        asking_R = np.full_like(asked_RQ, self._QUERY)
        said_RQ = self._FIRST + self.names + value_RV[rows[:, None], asked_RQ]
        end = np.stack([asking_R, self._FIRST + asked_RQ, said_RQ], axis=-1).reshape(len(rows), -1)
        place = 2 * number_R[:, None] + np.arange(3 * self.queries)
        tokens_RT[rows[:, None], place] = end
        answers_RT = np.zeros(tokens_RT.shape, bool)
        answers_RT[rows[:, None], place[:, 2::3]] = True
        return tokens_RT, answers_RT

    def stale(self, tokens_RT: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of the assignments' values: the name's earlier ones are stale, its latest is alive."""
        end_R = np.argmax(tokens_RT == self._QUERY, axis=1)
        stale_RT, alive_RT = np.zeros(tokens_RT.shape, bool), np.zeros(tokens_RT.shape, bool)
        later_RV = np.zeros((len(tokens_RT), self.names), bool)
        for place in range(tokens_RT.shape[1] // 2 * 2 - 2, -1, -2):
            rows = np.flatnonzero(place < end_R)
            name = tokens_RT[rows, place] - self._FIRST
            stale_RT[rows, place + 1], alive_RT[rows, place + 1] = later_RV[rows, name], ~later_RV[rows, name]
            later_RV[rows, name] = True
        return end_R + 1, stale_RT, alive_RT

    def _most(self, length: int) -> int:
        return (length - 3 * self.queries) // 2


@dataclasses.dataclass(frozen=True)
class Parity:
    """Parity with running results. Bits and results have tokens of their own, so that none has to count places."""

    name = "parity"
    pieces = ("<pad>", "<s>", "0", "1", "even", "odd")
    _BIT, _RESULT = 2, 4

    def draws(self, length: int) -> int:
        if length < 16:
            raise DataError(f"context_length {length} is too short for task parity; choose 16 at least")
        return 1 + length // 2

    def make(self, draws_RD: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
        most = length // 2
        number_R = _between((most + 1) // 2, most, draws_RD[:, 0])
        bit_RA = _between(0, 1, draws_RD[:, 1:])
        there_RA = np.arange(most) < number_R[:, None]
        tokens_RT, answers_RT = np.full((len(draws_RD), length), PAD, np.int32), np.zeros((len(draws_RD), length), bool)
        tokens_RT[:, 0 : 2 * most : 2] = np.where(there_RA, self._BIT + bit_RA, PAD)
        tokens_RT[:, 1 : 2 * most : 2] = np.where(there_RA, self._RESULT + np.cumsum(bit_RA, axis=1) % 2, PAD)
        answers_RT[:, 1 : 2 * most : 2] = there_RA
        return tokens_RT, answers_RT

    def stale(self, tokens_RT: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """All tokens before the result so far, which is alive."""
        last_R = np.sum(tokens_RT != PAD, axis=1) - 2
        place_T = np.arange(tokens_RT.shape[1])
        return last_R, place_T < last_R[:, None] - 1, place_T == last_R[:, None] - 1


def _between(low: int, high: int | np.ndarray, draws: np.ndarray) -> np.ndarray:
    """Integers in [low, high], of which each is as likely, from numbers in [0, 1)."""
    return low + np.floor(draws * (high - low + 1)).astype(np.int64)


TASKS = ("assignment", "parity")


def find_task(name: str, *, names: int, values: int, queries: int) -> Task:
    """The task of a name, of these sizes as far as it has them.

    Raises:
      DataError: there is none, or none of these sizes.
    """
    if name == "assignment":
        return Assignment(names, values, queries)
    if name == "parity":
        return Parity()
    raise DataError(f"{name!r} is not a task; choose one of {', '.join(TASKS)}")


def fingerprint(task: Task) -> str:
    """Of the task, its sizes and how sequences are made: equal where all sequences are."""
    content = [_VERSION, task.name, dataclasses.asdict(task)]  # type: ignore[call-overload]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
