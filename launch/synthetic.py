"""How well runs of configs/synthetic.py solve their task, at the length they were trained on and others, and what they
forget meanwhile.

    python -m launch.synthetic WORKDIR... [--lengths=64,128,256] [--sequences=2048]
        [--held=4,8,16 [--policy=selective,oldest]] [--json=OUT]

Sequences are those of validation, which no training had. `masked` is the share of tokens whose F is above 1 where the
first answer (in parity the last) is to be given: of the stale ones, which a perfect memory would forget, and of those
alive; AUC is how well F tells the one from the other, 0.5 is blind. Beside it stands the AUC of age alone, and of F
before training: what is older is more likely to be stale, and has had more time to be selected. With `--held` all
answers of the first length are also given by caches that hold so many tokens in each layer, <BOS> and the current one
included.

Shape letters: L layers, R rows, N positions of the context, T = N - 1 tokens that are behind BOS in it.
"""

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from data import Task, TaskEvalBatches
from data.tasks import PAD
from inference_budget import Budgets, eviction_times, find_policy
from launch.budgets.inputs import check_output
from launch.commands import InputError, Parser, positive, run_to_the_end
from selective_attention import Selection, Transformer
from trainer.errors import ResumeError, StorageError
from trainer.hosts.compilation_cache import open_shared_cache
from trainer.settings import Settings
from trainer.source import task_of
from trainer.state import model_graph
from trainer.step import is_correct

MASKED = 1.0  # F, nats, from which a token counts as masked
_ROWS = 64  # at a time


@dataclasses.dataclass(frozen=True)
class Forgetting:
    """What one layer's F makes of the tokens that are stale, and of those that are not."""

    auc: float  # of F as a detector of stale tokens; nan where there are none, or all are
    stale_masked: float  # share of the stale tokens that are masked
    alive_masked: float  # share of the others that are
    stale_masked_after: dict[str, float]  # share of the stale tokens behind this one, in assignment a name, that are


@dataclasses.dataclass(frozen=True)
class Held:
    """All answers, by a cache that holds so many tokens in each layer."""

    tokens: int
    policy: str
    answers: int
    wrong: int


@dataclasses.dataclass(frozen=True)
class Accuracy:
    """A model on the validation sequences of one length."""

    length: int  # of the context, tokens
    answers: int
    wrong: int
    sequences: int
    wrong_sequences: int  # of which an answer is wrong
    layers: list[Forgetting]  # none of a model without selection
    wrong_after: dict[str, int]  # wrong answers behind this token, in assignment the name that is asked for
    age_auc: float  # of how far back a token is as a detector of stale ones
    ideal: float  # tokens that a perfect memory holds above the first layer: <BOS>, what is alive, and the current one


def measure(model: Transformer, task: Task, length: int, sequences: int) -> Accuracy:
    """The accuracy at contexts of `length` tokens.

    Raises:
      data.DataError: the task has no sequences that are so short.
    """
    graph, params = nnx.split(_of_length(model, length))
    source = TaskEvalBatches(task, context_length=length, batch_size=_ROWS)
    look = jax.jit(lambda params, inputs, targets, row: _look(nnx.merge(graph, params), inputs, targets, row))
    totals, f_LK, chosen, wrong_after = np.zeros(5, np.int64), [], [], np.zeros((2, len(task.pieces)), np.int64)
    for first in range(0, sequences, _ROWS):
        batch = source.read(np.arange(first, min(first + _ROWS, sequences)))
        tokens_RN, targets_RN = _tokens(batch), batch["targets"]
        row_R, stale_RN, alive_RN = task.stale(tokens_RN)
        right_RN, f_LRN = look(params, batch["inputs"], targets_RN, row_R + 1)
        asked_RN, wrong_RN = targets_RN > PAD, (targets_RN > PAD) & ~np.asarray(right_RN)
        totals += [asked_RN.sum(), wrong_RN.sum(), len(row_R), wrong_RN.any(axis=1).sum(), alive_RN.sum()]
        wrong_after += [np.bincount(batch["inputs"][of], minlength=len(task.pieces)) for of in (asked_RN, wrong_RN)]
        chosen_RT = (stale_RN | alive_RN)[:, :-1]
        age_RT = (row_R[:, None] - np.arange(length - 1)).astype(float)
        before_RT = batch["inputs"][:, :-1]
        chosen.append([of_RT[chosen_RT] for of_RT in (stale_RN[:, :-1], age_RT, before_RT)])
        if f_LRN is not None:
            f_LK.append(np.asarray(f_LRN)[:, :, 1:][:, chosen_RT])
    stale_K, age_K, before_K = (np.concatenate(of) for of in zip(*chosen, strict=True))
    names_K = np.array(task.pieces)[before_K]
    layers = [_forgetting(f_K, stale_K, names_K) for f_K in np.concatenate(f_LK, axis=1)] if f_LK else []
    answers, wrong, measured, wrong_sequences, alive = map(int, totals)
    counts = (length, answers, wrong, measured, wrong_sequences)
    after = {task.pieces[int(token)]: int(wrong_after[1, token]) for token in np.flatnonzero(wrong_after[0])}
    return Accuracy(*counts, layers, after, auc(age_K, stale_K), 2 + alive / measured)


def untrained(model: Transformer, task: Task, length: int, sequences: int, seed: int) -> list[Forgetting]:
    """What the same model forgets with a run's first values."""
    if model.config.selection is Selection.OFF:
        return []
    return measure(Transformer(model.config, rngs=nnx.Rngs(params=seed)), task, length, sequences).layers


def measure_held(model: Transformer, task: Task, length: int, sequences: int, tokens: int, policy: str) -> Held:
    """All answers, when every layer holds so many tokens and the policy says who leaves.

    Raises:
      BudgetsError: no such policy, none for this model, or no such budgets.
    """
    of_length, source = _of_length(model, length), TaskEvalBatches(task, context_length=length, batch_size=_ROWS)
    budgets, answers, wrong = Budgets((tokens,) * model.config.num_layers, length), 0, 0
    for first in range(0, sequences, _ROWS):
        rows = min(_ROWS, sequences - first)
        batch = source.read(np.resize(np.arange(first, first + rows), _ROWS))  # one shape, so one program
        inputs_RN, targets_RN = jnp.asarray(batch["inputs"]), jnp.asarray(batch["targets"])
        _, logits_RNV = eviction_times(of_length, inputs_RN, budgets, find_policy(policy))
        asked_RN, right_RN = (batch["targets"] > PAD)[:rows], np.asarray(is_correct(logits_RNV, targets_RN))[:rows]
        answers += int(asked_RN.sum())
        wrong += int((asked_RN & ~right_RN).sum())
    return Held(tokens, policy, answers, wrong)


def _of_length(model: Transformer, length: int) -> Transformer:
    config = dataclasses.replace(model.config, max_length=length)
    return nnx.merge(model_graph(config), nnx.state(model, nnx.Param))


def _tokens(batch: dict[str, np.ndarray]) -> np.ndarray:
    """All tokens behind BOS, [R, N]."""
    tokens_RN = np.roll(batch["inputs"], -1, axis=1)
    tokens_RN[:, -1] = np.maximum(batch["targets"][:, -1], PAD)  # a sequence ends with an answer
    return tokens_RN


def _look(model: Transformer, inputs_RN: Array, targets_RN: Array, row_R: Array) -> tuple[Array, Array | None]:
    """Whether each target is the model's first choice, and F of position `row_R` of each sequence, [L, R, N]."""
    right_RN = is_correct(model(inputs_RN), targets_RN)
    if model.config.selection is Selection.OFF:
        return right_RN, None
    return right_RN, model.selection_masks(inputs_RN, lambda f_RNM: f_RNM[jnp.arange(len(row_R)), row_R])


def _forgetting(f_K: np.ndarray, stale_K: np.ndarray, names_K: np.ndarray) -> Forgetting:
    masked_K = f_K > MASKED
    stale, alive = (float(masked_K[of].mean()) if of.any() else float("nan") for of in (stale_K, ~stale_K))
    after = {str(name): float(masked_K[stale_K & (names_K == name)].mean()) for name in np.unique(names_K[stale_K])}
    return Forgetting(auc(f_K, stale_K), stale, alive, after)


def auc(scores_K: np.ndarray, positive_K: np.ndarray) -> float:
    """The chance that a positive has a higher score than a negative, where a tie is half a chance; nan without both.

    Args:
      scores_K: numbers.
      positive_K: bool, which of them are positive.
    """
    positives = int(positive_K.sum())
    negatives = len(positive_K) - positives
    if not positives or not negatives:
        return float("nan")
    _, place_K, counts = np.unique(scores_K, return_inverse=True, return_counts=True)
    rank_K = (np.cumsum(counts) - (counts - 1) / 2)[place_K]  # from 1, ties share their mean
    return float((rank_K[positive_K].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def table(at: Accuracy, caches: Sequence[Held]) -> str:
    """A run at one length: what is right, what its layers forget, and what is right when they hold little."""
    accuracy, whole = 1 - at.wrong / at.answers, 1 - at.wrong_sequences / at.sequences
    lines = [
        f"  context {at.length:,}: {at.wrong:,} of {at.answers:,} answers wrong, {accuracy:.2%} right, "
        f"{whole:.2%} of sequences without a mistake"
    ]
    lines.append("    wrong behind " + ", ".join(f"{name}: {wrong:,}" for name, wrong in at.wrong_after.items()))
    if at.layers:
        lines.append(f"    age alone: AUC {at.age_auc:.3f}")
    for number, layer in enumerate(at.layers):
        after = ", ".join(f"{name} {share:.0%}" for name, share in layer.stale_masked_after.items())
        lines.append(f"    layer {number}: {_said(layer)}; of the stale behind {after}")
    for held in caches:
        lines.append(
            f"    {held.tokens:,} tokens a layer held ({held.policy}): {held.wrong:,} of {held.answers:,} wrong, "
            f"{1 - held.wrong / held.answers:.2%} right; a perfect memory holds {at.ideal:.1f}"
        )
    return "\n".join(lines)


def _said(layer: Forgetting) -> str:
    return f"AUC {layer.auc:.3f}, masked {layer.stale_masked:.1%} of the stale, {layer.alive_masked:.1%} of the others"


def main() -> None:
    """The command."""
    parser = Parser(prog="python -m launch.synthetic", description="Accuracy on a made-up task, by length.")
    add = parser.add_argument
    add("workdirs", nargs="+", metavar="WORKDIR", help="of a run of configs/synthetic.py")
    add("--lengths", metavar="N,N", help="contexts, tokens; by default that of training, twice and four times that")
    add("--sequences", type=positive, default=2048, help="of validation (default: %(default)s)")
    add("--held", metavar="K,K", help="also by caches that hold so many tokens in each layer, at the first length")
    add("--policy", default="selective", metavar="P,P", help="who leaves such a cache (default: %(default)s)")
    add("--json", metavar="OUT", help="file for the same as JSON")
    options = parser.parse_args()
    run_to_the_end(lambda: _run(options), "nothing was written")


def _run(options: argparse.Namespace) -> None:
    if options.json:
        check_output(options.json)
    results = {}
    for workdir in options.workdirs:
        model, settings = _load(workdir)
        task, held = task_of(settings), _numbers("held", options.held) if options.held else []
        lengths = _lengths(options.lengths, settings)
        print(f"{workdir}: {task.name}, trained in contexts of {settings.context_length:,}", flush=True)
        at_lengths = []
        for length in lengths:
            found = measure(model, task, length, options.sequences)
            here = [(k, policy) for k in held for policy in options.policy.split(",")] if length == lengths[0] else []
            caches = [measure_held(model, task, length, options.sequences, k, policy) for k, policy in here]
            print(table(found, caches), flush=True)
            at_lengths.append(dataclasses.asdict(found) | {"held": [dataclasses.asdict(cache) for cache in caches]})
        before = untrained(model, task, lengths[0], options.sequences, settings.seed)
        for number, layer in enumerate(before):
            print(f"  before training, layer {number}: {_said(layer)}")
        results[workdir] = {
            "task": task.name,
            "trained_length": settings.context_length,
            "untrained": [dataclasses.asdict(layer) for layer in before],
            "lengths": at_lengths,
        }
    if options.json:
        Path(options.json).write_text(json.dumps(results, indent=2) + "\n")


def _load(workdir: str) -> tuple[Transformer, Settings]:
    from trainer.export import load_model  # seconds

    try:
        model, settings, _ = load_model(workdir)
    except (ResumeError, StorageError, ValueError) as error:
        raise InputError(f"{workdir}: {error}") from error
    if not settings.data.task:
        raise InputError(f"{workdir} was trained on the dataset {settings.data.path}, not on a made-up task")
    return model, settings


def _lengths(given: str | None, settings: Settings) -> list[int]:
    """Those of --lengths, by default once, twice and four times that of training."""
    trained = settings.context_length
    lengths = _numbers("lengths", given) if given else [trained, 2 * trained, 4 * trained]
    if settings.model.positions == "learned" and max(lengths) > trained:
        raise InputError(f"--lengths={max(lengths)}: this model has learned positions for {trained} tokens alone")
    return lengths


def _numbers(option: str, given: str) -> list[int]:
    try:
        return [positive(text) for text in given.split(",")]
    except (ValueError, argparse.ArgumentTypeError):
        raise InputError(f"--{option}={given}: give numbers of tokens with commas between, such as 64,128") from None


if __name__ == "__main__":
    open_shared_cache()
    main()
