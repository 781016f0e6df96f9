"""Measures a run's model on held-out windows: loss by position, what context is worth, and what is forgotten.

    python -m launch.study.measure WORKDIR [--data DATASET] [--windows=128]
    python -m launch.study.measure WORKDIR --budgets OTHER/study/budgets-selective.json,...

Writes WORKDIR/study/measured.json, of which `python -m launch.study` makes its page. With --budgets, those of runs with
other seeds, it writes WORKDIR/study/transfer.json: the model's loss under budgets that were found for others.

Shape letters: W windows, N positions, L layers, D distances, K kinds of tokens.
"""

import argparse
import functools
import json
from pathlib import Path
from typing import Any, TypedDict

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx

from data import Dataset, open_dataset
from inference_budget import Budgets, Evaluator, Windows, find_policy, model_fingerprint
from inference_budget.interchange import read_budgets_file
from launch.budgets.inputs import check_vocabulary, load_model, located, read_windows
from launch.budgets.result import SearchFile
from launch.commands import Parser, positive, run_to_the_end
from launch.evaluate.caches import data_of_run
from launch.study.kinds import KINDS, kinds_of
from selective_attention import Selection, Transformer
from trainer.hosts.compilation_cache import open_shared_cache

FOLDER, MEASURED, TRANSFER = "study", "measured.json", "transfer.json"  # within a workdir
FORGOTTEN = 1.0  # nats of F from which a token counts as forgotten: the memory loss's tau
DISTANCES = (2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)  # lower edges, tokens between query and key
LATER = 8  # tokens after which kinds of tokens are looked at: in small models soon, or all is forgotten
_MASK_WINDOWS = 48
_TOKENS = 8_192  # that pass through the model at a time


class Forgetting(TypedDict):
    """What is forgotten of held-out text; shares are of pairs of a query and an earlier token, <BOS> left out."""

    distances: list[int]  # lower edges
    by_distance: list[list[float]]  # [L, D]
    kinds: dict[str, int]  # tokens of each kind
    by_kind: dict[str, list[float]]  # for each layer, of the tokens LATER positions ago


class Measured(TypedDict):
    """measured.json."""

    fingerprint: str  # of the model
    data: str  # the dataset's
    context_length: int
    windows: list[float]  # mean loss of each, nats per token
    by_position: list[float]  # mean loss at each, over the windows
    last_quarter: list[float]  # of each window, with all of the context
    half_context: list[float]  # the same tokens, given the second half of the window alone
    forgetting: Forgetting | None  # None of a model that does not select


class Transferred(TypedDict):
    """Budgets of one model, and of another, on the same windows of one of them."""

    source: str
    memory_factor: float
    nll: float  # nats per token
    minus_full: float
    standard_error: float


def measure(model: Transformer, dataset: Dataset, windows: int) -> Measured:
    """Everything about a model, on its first device.

    Raises:
      InputError, DataError: a dataset that is not the model's.
    """
    check_vocabulary(model, dataset.manifest.vocab_size, dataset.path)
    length = model.config.max_length
    held_out = read_windows(dataset, "validation", length, windows)
    nll_WN = losses(model, held_out)
    half = length // 2
    second = Windows(held_out.inputs[:, half:].copy(), held_out.targets[:, half:])
    second.inputs[:, 0] = held_out.inputs[:, 0]  # <BOS>
    quarter = -(length // 4)
    return {
        "fingerprint": model_fingerprint(model),
        "data": dataset.manifest.fingerprint,
        "context_length": length,
        "windows": nll_WN.mean(axis=1).tolist(),
        "by_position": nll_WN.mean(axis=0).tolist(),
        "last_quarter": nll_WN[:, quarter:].mean(axis=1).tolist(),
        "half_context": losses(model, second)[:, quarter:].mean(axis=1).tolist(),
        "forgetting": None if model.config.selection is Selection.OFF else forgetting(model, dataset, held_out),
    }


def losses(model: Transformer, windows: Windows) -> np.ndarray:
    """Negative log-likelihoods, nats, float64 [W, N]."""
    graph, params = nnx.split(model)
    rows = max(1, _TOKENS // windows.length)
    found = []
    for start in range(0, len(windows), rows):
        part = slice(start, start + rows)
        short = rows - len(windows.inputs[part])
        inputs, targets = (np.pad(x[part], ((0, short), (0, 0))) for x in (windows.inputs, windows.targets))
        found.append(np.asarray(_nll(graph, params, inputs, targets), np.float64)[: rows - short])
    return np.concatenate(found)


@functools.partial(jax.jit, static_argnums=0)
def _nll(graph: Any, params: Any, inputs_BN: jax.Array, targets_BN: jax.Array) -> jax.Array:
    log_BNV = jax.nn.log_softmax(nnx.merge(graph, params)(inputs_BN))
    return -jnp.take_along_axis(log_BNV, targets_BN[..., None], axis=-1)[..., 0]


def forgetting(model: Transformer, dataset: Dataset, windows: Windows) -> Forgetting:
    """Shares of what is masked, on the first windows."""
    graph, params = nnx.split(model)
    tokens_WN = windows.inputs[:_MASK_WINDOWS]
    length = windows.length
    edges = [edge for edge in DISTANCES if edge < length]
    distance_NN = np.arange(length)[:, None] - np.arange(length)
    bucket_NN = np.where(distance_NN >= edges[0], np.searchsorted(edges, distance_NN, side="right"), 0)
    bucket_NN[:, 0] = 0  # <BOS> cannot be masked
    inside_DNN = jnp.asarray(np.stack([bucket_NN == number + 1 for number in range(len(edges))]))
    tokenizer = dataset.tokenizer()
    kind_WN = np.stack([kinds_of(tokenizer, row) for row in tokens_WN])
    later = min(LATER, length // 2)

    @jax.jit
    def look(params: Any, tokens_1N: jax.Array) -> tuple[jax.Array, jax.Array]:
        def reduce(f_1NN: jax.Array) -> tuple[jax.Array, jax.Array]:
            masked_NN = f_1NN[0] > FORGOTTEN
            return (masked_NN & inside_DNN).sum(axis=(1, 2)), jnp.diagonal(masked_NN, -later)

        return nnx.merge(graph, params).selection_masks(tokens_1N, reduce)

    masked_LD, kind_masked = np.zeros((model.config.num_layers, len(edges))), []
    for row in tokens_WN:
        by_distance, by_token = look(params, row[None])
        masked_LD += np.asarray(by_distance)
        kind_masked.append(np.asarray(by_token))
    pairs_D = np.asarray(inside_DNN.sum(axis=(1, 2))) * len(tokens_WN)
    masked_LWM, of_kind_WM = np.stack(kind_masked, axis=1)[:, :, 1:], kind_WN[:, 1 : length - later]
    counts = {kind: int((of_kind_WM == number).sum()) for number, kind in enumerate(KINDS)}
    return {
        "distances": edges,
        "by_distance": (masked_LD / pairs_D).tolist(),
        "kinds": counts,
        "by_kind": {
            kind: [float(masked_WM[of_kind_WM == number].mean()) for masked_WM in masked_LWM]
            for number, kind in enumerate(KINDS)
            if counts[kind]
        },
    }


def transfer(model: Transformer, dataset: Dataset, files: list[str], windows: int) -> list[Transferred]:
    """The loss under the budgets of each file."""
    length = model.config.max_length
    held_out = read_windows(dataset, "validation", length, windows)
    full = Evaluator(model, held_out, None).losses([Budgets.full(model.config.num_layers, length)])[0]
    found: list[Transferred] = []
    for file in files:
        content = read_budgets_file(file, SearchFile)
        budgets = Budgets(tuple(content["budgets"]), length)
        pruned = Evaluator(model, held_out, find_policy(content["policy"])).losses([budgets])[0]
        difference, error = pruned.minus(full)
        found.append(
            {
                "source": Path(file).absolute().parent.parent.name,
                "memory_factor": budgets.memory_factor,
                "nll": pruned.mean,
                "minus_full": difference,
                "standard_error": error,
            }
        )
    return found


def main(arguments: list[str] | None = None) -> None:
    """The command."""
    parser = Parser(prog="python -m launch.study.measure", description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("workdir", metavar="WORKDIR", help="of a run on text, whose newest checkpoint is measured")
    add("--data", help="the run's dataset; by default where the run found it")
    add("--windows", type=positive, default=128, help="held-out windows (default: %(default)s)")
    add("--budgets", metavar="FILE,...", help="files of launch.budgets search for runs with other seeds")
    options = parser.parse_args(arguments)
    run_to_the_end(lambda: _run(options), "the same command begins anew")


def _run(options: argparse.Namespace) -> None:
    model = load_model(options.workdir)
    dataset = open_dataset(options.data) if options.data else data_of_run(options.workdir)
    folder = epath.Path(options.workdir) / FOLDER  # a bucket's, too
    folder.mkdir(exist_ok=True)
    if options.budgets:
        found = transfer(model, dataset, options.budgets.split(","), options.windows)
        write_json(folder / TRANSFER, found)
        for one in found:
            print(f"budgets of {one['source']}, {one['memory_factor']:.2f}x: {one['minus_full']:+.4f} nats above full")
        return
    measured = measure(model, dataset, options.windows)
    write_json(folder / MEASURED, measured)
    worth = np.array(measured["half_context"]) - measured["last_quarter"]
    print(f"{located(options.workdir)}: {np.mean(measured['windows']):.4f} nats per token")
    print(f"the first half of the context is worth {worth.mean():.4f} nats in the last quarter of positions")


def write_json(path: epath.PathLike, content: object) -> None:
    """Writes a file that is there only when it is whole."""
    partial = epath.Path(f"{path}.partial")
    partial.write_text(json.dumps(content, indent=1) + "\n")
    partial.replace(path)


if __name__ == "__main__":
    open_shared_cache()
    main()
