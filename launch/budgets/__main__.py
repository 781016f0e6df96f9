"""Finds per-layer budgets, measures them, generates with them, and shows them.

    python -m launch.budgets search --checkpoint DIR --data DIR --target-checkpoint DIR --output budgets.json
    python -m launch.budgets evaluate --budgets budgets.json
    python -m launch.budgets generate --budgets budgets.json --prompt 'Once upon a time'
    python -m launch.budgets report budgets.json ... --output report.html

A checkpoint is a training run's workdir, or a folder of `selective_attention.export_safetensors`. Exit codes: 0 done, 2
a mistake, which one line names.
"""

import argparse
import math
import sys
from pathlib import Path
from typing import Any

import jax
from tqdm import tqdm

from inference_budget.budgets import Budgets
from inference_budget.generation import generate
from inference_budget.perplexity import Evaluator, Losses, Windows
from inference_budget.policies import POLICIES
from inference_budget.search import Found, Point, baselines, search

from .inputs import Data, InputError, load_model, model_fingerprint
from .report import table, write_report
from .result import Journal, budgets_of, point_json, points_json, read_json, write_json


def main(arguments: list[str] | None = None) -> None:
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def run_search(options: argparse.Namespace) -> None:
    output = Path(options.output)
    if not output.parent.is_dir():
        raise InputError(f"--output={output}: there is no folder {output.parent}")
    model, data, policy = load_model(options.checkpoint), Data(options.data), POLICIES[options.policy]
    length = options.context or model.config.max_length
    training = data.windows("train", length, options.windows)
    validation = data.windows("validation", length, options.validation_windows)
    step = options.step or max(length // 32, 1)
    identity = {
        "checkpoint": {"path": str(Path(options.checkpoint).resolve()), "fingerprint": model_fingerprint(model)},
        "data": {"path": str(data.path.resolve()), "fingerprint": data.fingerprint},
        "context_length": length,
        "policy": policy.name,
        "windows": {"train": len(training), "validation": len(validation)},
    }
    evaluator = Evaluator(model, training, policy)
    target = None if options.target_checkpoint is None else load_model(options.target_checkpoint)
    target_nll = math.log(options.target_perplexity) if target is None else _plain(target, training).mean
    journal = Journal(output.with_name(f"{output.name}.journal"), identity)
    with tqdm(desc="search", unit="cut", disable=None) as bar:

        def progress(point: Point) -> None:
            bar.update()
            bar.set_postfix_str(f"{point.budgets.memory_factor:.2f}x, perplexity {point.perplexity:.3f}")

        found = search(
            evaluator,
            target_nll=target_nll,
            step=step,
            first_step=options.first_step,
            lazy=options.lazy,
            known=journal,
            progress=progress,
        )
    best = found.best(target_nll)
    if best is None:
        least = min(found.curve, key=lambda point: point.nll)
        raise InputError(
            f"the target perplexity of {math.exp(target_nll):.3f} is out of reach: the best is {least.perplexity:.3f}, "
            f"at a memory factor of {least.budgets.memory_factor:.2f}"
        )
    others = baselines(evaluator, _spread_totals(found), journal)
    held_out = _held_out(model, validation, policy, best, found, None if target is None else _plain(target, validation))
    content = identity | {
        "budgets": list(best.budgets.tokens),
        "memory_factor": best.budgets.memory_factor,
        "search": {
            "step": step, "first_step": options.first_step or step, "lazy": options.lazy,
            "full_sweeps": found.full_sweeps, "lazy_missed": found.missed, "target_perplexity": math.exp(target_nll),
            "target_checkpoint": options.target_checkpoint,
        },
        "found": point_json(best),
        "validation": held_out,
        "curve": points_json(found.curve),
        "baselines": {name: points_json(points) for name, points in others.items()},
    }  # fmt: skip
    write_json(output, content)
    print(f"{policy.name}: {best.budgets.memory_factor:.2f}x less memory, budgets {list(best.budgets.tokens)}")
    print(f"training windows: perplexity {best.perplexity:.3f}, target {math.exp(target_nll):.3f}")
    _print_held_out(held_out)
    if found.full_sweeps:
        print(f"lazy evaluation would have chosen otherwise in {found.missed} of {found.full_sweeps} full sweeps")


def _plain(model: Any, windows: Windows) -> Losses:
    return Evaluator(model, windows, None).losses([Budgets.full(model.config.num_layers, windows.length)])[0]


def _spread_totals(found: Found, count: int = 12) -> list[int]:
    totals = sorted({point.budgets.total for point in found.curve})
    return totals[:: max(len(totals) // count, 1)]


def _held_out(
    model: Any, windows: Windows, policy: Any, best: Point, found: Found, target: Losses | None
) -> dict[str, Any]:
    """What was found, on windows that the search has not seen; and the largest factor whose loss is at most the
    target's there, among the points of the curve.
    """
    evaluator = Evaluator(model, windows, policy)
    full = Budgets.full(model.config.num_layers, windows.length)
    unpruned, pruned = evaluator.losses([full, best.budgets])

    def measured(losses: Losses) -> dict[str, float]:
        return {"perplexity": losses.perplexity, "last_quarter_perplexity": losses.last_quarter_perplexity}

    result: dict[str, Any] = {"full": measured(unpruned), "pruned": measured(pruned)}
    result["pruned_minus_full"] = dict(zip(("nats", "standard_error"), pruned.minus(unpruned), strict=True))
    if target is not None:
        difference, error = pruned.minus(target)
        result |= {"target": measured(target)}
        result["pruned_minus_target"] = {"nats": difference, "standard_error": error}
        holding = None
        for point in sorted(found.curve, key=lambda point: -point.budgets.memory_factor):
            if (losses := evaluator.losses([point.budgets])[0]).mean <= target.mean:
                holding = {"memory_factor": point.budgets.memory_factor, "budgets": list(point.budgets.tokens)}
                holding |= measured(losses)
                break
        result["largest_at_target"] = holding
    return result


def _print_held_out(result: dict[str, Any]) -> None:
    print("validation windows:")
    for name in ("full", "pruned", "target"):
        if name in result:
            values = result[name]
            last = values["last_quarter_perplexity"]
            print(f"  {name:<7} perplexity {values['perplexity']:.3f}, last quarter of positions {last:.3f}")
    for name in ("pruned_minus_full", "pruned_minus_target"):
        if name in result:
            difference = result[name]
            label = name.replace("_", " ")
            print(f"  {label}: {difference['nats']:+.4f} nats, standard error {difference['standard_error']:.4f}")
    if "largest_at_target" in result:
        point = result["largest_at_target"]
        print(f"  largest factor that meets the target here: {'none' if point is None else point['memory_factor']}")


def _load(options: argparse.Namespace) -> tuple[dict[str, Any], Any, Data, Budgets, Any]:
    content = read_json(options.budgets)
    model = load_model(options.checkpoint or content["checkpoint"]["path"])
    budgets, policy = budgets_of(content, model_fingerprint(model))
    return content, model, Data(options.data or content["data"]["path"]), budgets, policy


def run_evaluate(options: argparse.Namespace) -> None:
    content, model, data, budgets, policy = _load(options)
    count = options.windows or content["windows"].get(options.split, 64)
    windows = data.windows(options.split, budgets.context_length, count)
    full = Budgets.full(model.config.num_layers, windows.length)
    unpruned, pruned = Evaluator(model, windows, policy).losses([full, budgets])
    print(f"{len(windows)} windows of {windows.length} tokens of {options.split}, <BOS> first, each token once")
    print(f"{policy.name} at {budgets.memory_factor:.2f}x: perplexity {pruned.perplexity:.6f}")
    print(f"full budgets: perplexity {unpruned.perplexity:.6f}")
    difference, error = pruned.minus(unpruned)
    print(f"difference {difference:+.4f} nats, paired standard error {error:.4f}")
    last = pruned.last_quarter_perplexity, unpruned.last_quarter_perplexity
    print(f"last quarter of positions: {last[0]:.3f}, full budgets {last[1]:.3f}")


def run_generate(options: argparse.Namespace) -> None:
    _, model, data, budgets, policy = _load(options)
    text = sys.stdin.read() if options.prompt is None else options.prompt
    if not text:
        raise InputError("the prompt is empty; give --prompt, or text on standard input")
    tokenizer = data.tokenizer
    prompt = [data.bos_id, *tokenizer.encode(text)]
    drawn: list[int] = []
    shown: str | None = None  # of what was drawn; nothing at all before the prompt is taken in, which may be refused

    def show(tokens: list[list[int]]) -> None:
        nonlocal shown
        drawn.extend(tokens[0])
        if shown is None:
            print(text, end="", flush=True)
            shown = ""
        whole = tokenizer.decode(drawn)
        if whole.startswith(shown) and not whole.endswith("\ufffd"):  # half a character waits for its other half
            print(whole[len(shown) :], end="", flush=True)
            shown = whole

    generate(
        model,
        [prompt],
        budgets,
        policy,
        options.tokens,
        key=jax.random.key(options.seed),
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        stop_ids=[data.eos_id],
        dtype=options.cache_dtype,
        on_tokens=show,
    )
    print()


def run_report(options: argparse.Namespace) -> None:
    searches = [read_json(path) for path in options.files]
    write_report(searches, options.output)
    for row in table(searches):
        print(" | ".join(row))
    print(options.output)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m launch.budgets", description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(required=True, metavar="command")
    add = commands.add_parser("search", help="find budgets that meet a target")
    add.add_argument("--checkpoint", required=True, help="the model")
    add.add_argument("--data", required=True, help="dataset folder")
    target = add.add_mutually_exclusive_group(required=True)
    target.add_argument("--target-checkpoint", help="a model whose perplexity, on the same windows, is the target")
    target.add_argument("--target-perplexity", type=_perplexity, help="the target itself")
    add.add_argument("--output", required=True, help="file to write, such as budgets.json")
    add.add_argument("--policy", default="selective", choices=POLICIES, help="who leaves a full layer")
    add.add_argument("--context", type=_positive, help="tokens of a window; by default the model's context")
    add.add_argument(
        "--step", type=_positive, help="tokens by which a budget is lowered; by default 1/32 of the context"
    )
    add.add_argument("--first-step", type=_positive, help="a coarser step to begin with, halved down to --step")
    add.add_argument("--windows", type=_positive, default=64, help="training windows that the search measures on")
    add.add_argument("--validation-windows", type=_positive, default=256, help="windows that the result is measured on")
    add.add_argument("--lazy", action="store_true", help="measure fewer layers; the choices may differ from greedy's")
    add.set_defaults(run=run_search)
    for name, run, text in (
        ("evaluate", run_evaluate, "measure budgets"),
        ("generate", run_generate, "continue a prompt"),
    ):
        add = commands.add_parser(name, help=text)
        add.add_argument("--budgets", required=True, help="file of `search`")
        add.add_argument("--checkpoint", help="the model; by default where the search found it")
        add.add_argument("--data", help="dataset folder; by default where the search found it")
        add.set_defaults(run=run)
        if name == "evaluate":
            add.add_argument("--split", default="validation", help="train or validation")
            add.add_argument("--windows", type=_positive, help="windows to measure on; by default the search's number")
        else:
            add.add_argument("--prompt", help="text; by default standard input")
            add.add_argument("--tokens", type=_positive, default=100, help="tokens to draw at most")
            add.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token")
            add.add_argument("--top-k", type=_positive)
            add.add_argument("--top-p", type=float)
            add.add_argument("--seed", type=int, default=0)
            add.add_argument("--cache-dtype", choices=("float32", "bfloat16"), help="by default the model's")
    add = commands.add_parser("report", help="one HTML page about several searches")
    add.add_argument("files", nargs="+", help="files of `search`")
    add.add_argument("--output", required=True, help="HTML file to write")
    add.set_defaults(run=run_report)
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {text}")
    return value


def _perplexity(text: str) -> float:
    value = float(text)
    if not value > 1:
        raise argparse.ArgumentTypeError(f"a perplexity is above 1, not {text}")
    return value


if __name__ == "__main__":
    main()
