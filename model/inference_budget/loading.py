"""What the commands decode with: a model, its budgets and its tokenizer, as options name them."""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

from selective_attention import Transformer, import_safetensors
from selective_attention.quantised import CACHE_DTYPES

from .budgets import Budgets, BudgetsError
from .engine import BLOCK, Engine
from .interchange import BudgetsFile, budgets_of, model_fingerprint, read_budgets_file
from .policies import EvictionPolicy, OldestFirst, policy_name
from .requests import DEFAULT_CLASS
from .text import TOKENIZER_FILE, TextTokenizer

Class = tuple[Budgets, EvictionPolicy]


@dataclasses.dataclass(frozen=True)
class Loaded:
    """An engine, and what its prompts and completions are made of.

    Attributes:
      identity: of the model and of each class of budgets; what completions depend on beside their requests.
    """

    engine: Engine
    tokenizer: TextTokenizer | None
    identity: str


def add_engine_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options that `load_engine` reads."""
    add = parser.add_argument
    add("--checkpoint", metavar="FOLDER", help="exported model; by default where --budgets found it")
    add("--budgets", metavar="FILE", help="budgets.json of a search; by default the cache is full")
    add("--budget-class", metavar="NAME=FILE", action="append", default=[], help="other budgets that requests may name")
    add("--tokenizer", metavar="PATH", help="tokenizer.model, or a folder with one; by default the checkpoint's")
    add("--rows", type=positive, default=8, help="requests of a class that decode together (default: %(default)s)")
    add("--steps", type=positive, default=16, help="tokens a row draws between two looks (default: %(default)s)")
    add("--block", type=positive, default=BLOCK, help="prompt tokens taken in at a time (default: %(default)s)")
    add("--cache-dtype", choices=CACHE_DTYPES, help="of keys and values in the cache; by default the model's")


def load_engine(options: argparse.Namespace) -> Loaded:
    """The engine that the options ask for.

    Raises:
      BudgetsError: something cannot be read, or does not fit the rest.
    """
    files = {DEFAULT_CLASS: options.budgets} if options.budgets else {}
    for named in options.budget_class:
        name, equals, path = named.partition("=")
        if not (name and equals and path) or name == DEFAULT_CLASS or name in files:
            raise BudgetsError(f"--budget-class={named}: give NAME=FILE, each name once and none {DEFAULT_CLASS!r}")
        files[name] = path
    contents = {name: read_budgets_file(path, BudgetsFile) for name, path in files.items()}
    checkpoint = options.checkpoint or next((content["checkpoint"]["path"] for content in contents.values()), None)
    if checkpoint is None:
        raise BudgetsError("there is no model; give --checkpoint, or --budgets with a file that names one")
    tokenizer = _tokenizer(options.tokenizer, Path(checkpoint))
    model = _model(checkpoint)
    fingerprint = model_fingerprint(model)
    classes = {name: budgets_of(content, fingerprint) for name, content in contents.items()}
    full = Budgets.full(model.config.num_layers, model.config.max_length), OldestFirst()
    default: Class = classes.pop(DEFAULT_CLASS, full)
    engine = Engine(
        model,
        *default,
        rows=options.rows,
        steps=options.steps,
        block=options.block,
        cache_dtype=options.cache_dtype,
        bos_id=None if tokenizer is None else tokenizer.bos_id,
        more_classes=classes,
    )
    return Loaded(engine, tokenizer, _identity(fingerprint, engine.classes, options.cache_dtype))


def positive(text: str) -> int:
    """The type of an option that is a number of things."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {text}")
    return value


def _model(path: str) -> Transformer:
    if not (Path(path) / "config.json").is_file():
        raise BudgetsError(f"{path} holds no exported model; make one with python -m trainer.export, give its folder")
    try:
        return import_safetensors(path)
    except (OSError, ValueError, ImportError) as error:
        raise BudgetsError(f"{path}: {error}") from error


def _tokenizer(path: str | None, checkpoint: Path) -> TextTokenizer | None:
    if path is None and not (checkpoint / TOKENIZER_FILE).is_file():
        return None
    return TextTokenizer(path or checkpoint)


def _identity(fingerprint: str, classes: dict[str, Class], dtype: Any) -> str:
    said = {name: [budgets.tokens, policy_name(policy)] for name, (budgets, policy) in classes.items()}
    return json.dumps([fingerprint, said, dtype])
