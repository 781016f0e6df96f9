"""How well runs of configs/synthetic.py solve their task, at the length they were trained on and others, and what they
forget meanwhile.

    python -m launch.synthetic WORKDIR... [--lengths=64,128,256] [--sequences=2048] [--held=4,8,16 [--policy=selective]]
        [--json=OUT]

Sequences are those of validation, which no training had. `masked` is the share of tokens whose F is above 1 where the
first answer (in parity the last) is to be given: of the stale ones, which a perfect memory would forget, and of those
alive; AUC is how well F tells the one from the other, 0.5 is blind. With `--held` that answer is also given by caches
that hold so many tokens in each layer, <BOS> and the current one included.

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
from data.tasks import BOS, PAD
from inference_budget import Budgets, Request, Scorer, find_policy
from launch.budgets.inputs import check_output
from launch.commands import InputError, Parser, positive, run_to_the_end
from selective_attention import Selection, Transformer
from trainer.errors import ResumeError, StorageError
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


@dataclasses.dataclass(frozen=True)
class Held:
    """One answer a sequence, by a cache that holds so many tokens in each layer."""

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
    ideal: float  # tokens that a perfect memory holds above the first layer: <BOS>, what is alive, and the current one


def measure(model: Transformer, task: Task, length: int, sequences: int) -> Accuracy:
    """The accuracy at contexts of `length` tokens.

    Raises:
      data.DataError: the task has no sequences that are so short.
    """
    graph, params = nnx.split(_of_length(model, length))
    source = TaskEvalBatches(task, context_length=length, batch_size=_ROWS)
    look = jax.jit(lambda params, inputs, targets, row: _look(nnx.merge(graph, params), inputs, targets, row))
    totals, f_LK, stale_K = np.zeros(5, np.int64), [], []
    for first in range(0, sequences, _ROWS):
        batch = source.read(np.arange(first, min(first + _ROWS, sequences)))
        tokens_RN, targets_RN = _tokens(batch), batch["targets"]
        row_R, stale_RN, alive_RN = task.stale(tokens_RN)
        right_RN, f_LRN = look(params, batch["inputs"], targets_RN, row_R + 1)
        asked_RN, wrong_RN = targets_RN > PAD, (targets_RN > PAD) & ~np.asarray(right_RN)
        totals += [asked_RN.sum(), wrong_RN.sum(), len(row_R), wrong_RN.any(axis=1).sum(), alive_RN.sum()]
        chosen_RT = (stale_RN | alive_RN)[:, :-1]
        if f_LRN is not None:
            f_LK.append(np.asarray(f_LRN)[:, :, 1:][:, chosen_RT])
            stale_K.append(stale_RN[:, :-1][chosen_RT])
    layers = [_forgetting(f_K, np.concatenate(stale_K)) for f_K in np.concatenate(f_LK, axis=1)] if f_LK else []
    answers, wrong, measured, wrong_sequences, alive = map(int, totals)
    return Accuracy(length, answers, wrong, measured, wrong_sequences, layers, 2 + alive / measured)


def measure_held(model: Transformer, task: Task, length: int, sequences: int, tokens: int, policy: str) -> Held:
    """One answer of each sequence, when every layer holds so many tokens and the policy says who leaves.

    Raises:
      BudgetsError: no such policy, none for this model, or no such budgets.
    """
    batch = TaskEvalBatches(task, context_length=length, batch_size=1).read(np.arange(sequences))
    tokens_RN = _tokens(batch)
    requests = [
        Request([BOS, *row_N[: last + 1].tolist()], [int(row_N[last + 1])])
        for row_N, last in zip(tokens_RN, task.stale(tokens_RN)[0], strict=True)
    ]
    budgets = Budgets((tokens,) * model.config.num_layers, length)
    scores = Scorer(_of_length(model, length), budgets, find_policy(policy), bos_id=BOS).score(requests)
    return Held(tokens, policy, len(scores), sum(not score.greedy for score in scores))


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


def _forgetting(f_K: np.ndarray, stale_K: np.ndarray) -> Forgetting:
    masked_K = f_K > MASKED
    stale, alive = (float(masked_K[of].mean()) if of.any() else float("nan") for of in (stale_K, ~stale_K))
    return Forgetting(auc(f_K, stale_K), stale, alive)


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
    for number, layer in enumerate(at.layers):
        lines.append(
            f"    layer {number}: AUC {layer.auc:.3f}, masked {layer.stale_masked:.1%} of the stale, "
            f"{layer.alive_masked:.1%} of the others"
        )
    for held in caches:
        lines.append(
            f"    {held.tokens:,} tokens a layer held ({held.policy}): {held.wrong:,} of {held.answers:,} wrong, "
            f"{1 - held.wrong / held.answers:.2%} right; a perfect memory holds {at.ideal:.1f}"
        )
    return "\n".join(lines)


def main() -> None:
    """The command."""
    parser = Parser(prog="python -m launch.synthetic", description="Accuracy on a made-up task, by length.")
    add = parser.add_argument
    add("workdirs", nargs="+", metavar="WORKDIR", help="of a run of configs/synthetic.py")
    add("--lengths", metavar="N,N", help="contexts, tokens; by default that of training, twice and four times that")
    add("--sequences", type=positive, default=2048, help="of validation (default: %(default)s)")
    add("--held", metavar="K,K", help="also by caches that hold so many tokens in each layer")
    add("--policy", default="selective", help="who leaves such a cache (default: %(default)s)")
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
            caches = [measure_held(model, task, length, options.sequences, k, options.policy) for k in held]
            print(table(found, caches), flush=True)
            at_lengths.append(dataclasses.asdict(found) | {"held": [dataclasses.asdict(cache) for cache in caches]})
        results[workdir] = {
            "task": task.name,
            "trained_length": settings.context_length,
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
    main()
