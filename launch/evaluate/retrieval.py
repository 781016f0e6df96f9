"""Made-up questions whose answers are somewhere in a long context: perplexity hides what eviction breaks.

The context is text of the dataset with lines put in between; every one is exactly as long as asked for, the answer
included, and is made from the seed, the length and its number alone.

- needle: one line gives the code of a thing, anywhere in the text, and its end asks for that. The other answers are
  codes that the text does not have.
- variables: names are given values again and again, and the end asks for the last value of one. The other answers are
  all the values that the text has, among them that name's stale ones.
"""

from collections.abc import Callable, Sequence

import numpy as np

from data import Tokenizer
from inference_budget import Request
from launch.commands import InputError

from .items import Item

ANSWERS = 10  # to choose from, where the needle's code is among them
THINGS = ("door", "garden", "letter", "bridge", "engine", "window", "river", "market", "school", "island")
NAMES, ASSIGNMENTS = ("alpha", "beta", "gamma"), 6


def make_items(kind: str, tokenizer: Tokenizer, text_T: np.ndarray, length: int, count: int, seed: int) -> list[Item]:
    """`count` questions of `length` tokens.

    Args:
      kind: one of KINDS.
      tokenizer: the model's.
      text_T: int [T], tokens of ordinary text, more than `length`.
      length: tokens of context and longest answer together, <BOS> included and the last one, which is never fed, not.
      count, seed: how many, and which.

    Raises:
      InputError: the lines alone are longer than that.
    """
    items = []
    for number in range(count):
        rng = np.random.default_rng([seed, length, number])
        lines, question, answers, gold = KINDS[kind](rng)
        asking = tokenizer.encode(question)
        tokens = [_after(tokenizer, question, f" {answer}") for answer in answers]
        told = [[*tokenizer.encode(before), *_after(tokenizer, before, f" {value}.\n")] for before, value in lines]
        room = length + 1 - 1 - len(asking) - max(map(len, tokens)) - sum(map(len, told))
        if room < 0:
            raise InputError(f"{kind}: its lines alone take {length - room} tokens, more than {length}; give --lengths")
        start = int(rng.integers(0, len(text_T) - room))
        cuts = np.sort(rng.integers(0, room + 1, len(told)))
        context = [tokenizer.bos_id]
        for part, line in zip(np.split(text_T[start : start + room], cuts), [*told, asking], strict=True):
            context += [*map(int, part), *line]
        requests = tuple(Request(context, answer) for answer in tokens)
        items.append(Item(str(number), requests, tuple(answers), gold))
    return items


def _after(tokenizer: Tokenizer, before: str, text: str) -> list[int]:
    return tokenizer.encode(before + text)[len(tokenizer.encode(before)) :]


_Made = tuple[Sequence[tuple[str, str]], str, list[str], int]  # lines and their values, question, answers, right one


def _needle(rng: np.random.Generator) -> _Made:
    told = f"\nThe code of the {rng.choice(THINGS)} is"
    codes = [str(10_000 + code) for code in rng.choice(90_000, ANSWERS, replace=False)]
    gold = int(rng.integers(ANSWERS))
    return [(told, codes[gold])], told, codes, gold


def _variables(rng: np.random.Generator) -> _Made:
    values = [str(10 + value) for value in rng.choice(90, ASSIGNMENTS, replace=False)]
    names = [str(name) for name in rng.choice(NAMES, ASSIGNMENTS)]
    asked = names[int(rng.integers(ASSIGNMENTS))]
    lines = [(f"\n{name} =", value) for name, value in zip(names, values, strict=True)]
    last = max(n for n, name in enumerate(names) if name == asked)
    order = rng.permutation(ASSIGNMENTS)  # an answer's number shall not tell when it was given
    return lines, f"\n{asked} =", [values[n] for n in order], int(np.flatnonzero(order == last)[0])


KINDS: dict[str, Callable[[np.random.Generator], _Made]] = {"needle": _needle, "variables": _variables}
