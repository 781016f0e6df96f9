"""Finds per-layer budgets, measures them, generates with them, and shows them.

    python -m launch.budgets search --checkpoint DIR --data DIR --target-checkpoint DIR --output budgets.json
    python -m launch.budgets evaluate --budgets budgets.json
    python -m launch.budgets generate --budgets budgets.json --prompt 'Once upon a time'
    python -m launch.budgets report budgets.json ... --output report.html

A checkpoint is a training run's workdir, or a folder of `selective_attention.export_safetensors`. Exit codes: 0 done, 2
a mistake, which one line names, 130 interrupted, 141 nobody read on.
"""

import argparse
import sys

import jax

from data import Dataset, open_dataset
from inference_budget import POLICIES, Budgets, Decoder, Evaluator, EvictionPolicy, model_fingerprint
from inference_budget.interchange import budgets_of, read_budgets_file
from launch.commands import InputError, Parser, positive, run_to_the_end
from selective_attention import Transformer
from selective_attention.quantised import CACHE_DTYPES
from trainer.hosts.compilation_cache import open_shared_cache

from .inputs import check_output, check_vocabulary, load_model, read_windows
from .report import table, write_report
from .result import SearchFile, UsableFile, cache_size
from .search import run_search


def main(arguments: list[str] | None = None) -> None:
    options = _parser().parse_args(arguments)
    run_to_the_end(lambda: options.run(options), options.interrupted)


def _load(options: argparse.Namespace) -> tuple[UsableFile, Transformer, Dataset, Budgets, EvictionPolicy]:
    content = read_budgets_file(options.budgets, UsableFile)
    model = load_model(options.checkpoint or content["checkpoint"]["path"])
    budgets, policy = budgets_of(content, model_fingerprint(model))
    if options.data is None and "data" not in content:
        raise InputError(f"{options.budgets} names no dataset; give --data")
    dataset = open_dataset(options.data or content["data"]["path"])
    check_vocabulary(model, dataset.manifest.vocab_size, dataset.path)
    found_on = content["data"]["fingerprint"] if "data" in content else dataset.manifest.fingerprint
    if found_on != dataset.manifest.fingerprint:
        raise InputError(
            f"{dataset.path} is another dataset than the one that the budgets were found on "
            f"({dataset.manifest.fingerprint[:12]}, not {found_on[:12]}); give that one with --data"
        )
    return content, model, dataset, budgets, policy


def run_evaluate(options: argparse.Namespace) -> None:
    content, model, dataset, budgets, policy = _load(options)
    count = options.windows or content.get("windows", {}).get(options.split, 64)
    windows = read_windows(dataset, options.split, budgets.context_length, count)
    full = Budgets.full(model.config.num_layers, windows.length)
    evaluator = Evaluator(model, windows, policy, cache_dtype=options.cache_dtype)
    pruned, unpruned = evaluator.losses([budgets])[0], Evaluator(model, windows, None).losses([full])[0]
    print(f"{len(windows)} windows of {windows.length} tokens of {options.split}, <BOS> first, each token once")
    print(f"{content['policy']}, {budgets.memory_factor:.2f}x fewer tokens: perplexity {pruned.perplexity:.6f}")
    print(cache_size(model, budgets, policy, options.cache_dtype))
    if policy.shrinks:
        held_LWN = evaluator.tokens_held(budgets)
        mean, most = held_LWN.mean(axis=(1, 2)), held_LWN.max(axis=(1, 2))
        for layer, budget in enumerate(budgets.tokens):
            print(f"layer {layer} holds {mean[layer]:.1f} tokens on average, at most {most[layer]} of {budget}")
    print(f"full budgets: perplexity {unpruned.perplexity:.6f}")
    difference, error = pruned.minus(unpruned)
    print(f"difference {difference:+.4f} nats, paired standard error {error:.4f}")
    last = pruned.last_quarter_perplexity, unpruned.last_quarter_perplexity
    print(f"last quarter of positions: {last[0]:.3f}, full budgets {last[1]:.3f}")


def run_generate(options: argparse.Namespace) -> None:
    _, model, dataset, budgets, policy = _load(options)
    try:
        text = sys.stdin.read() if options.prompt is None else options.prompt
        text.encode()  # what is no text comes from a command line as surrogates
    except UnicodeError as error:
        raise InputError(f"the prompt is not UTF-8 ({error}); convert it, such as with iconv") from error
    if not text:
        raise InputError("the prompt is empty; give --prompt, or text on standard input")
    tokenizer = dataset.tokenizer()
    decoder = Decoder(model, budgets, policy, cache_dtype=options.cache_dtype, bos_id=tokenizer.bos_id)
    prompt = [tokenizer.bos_id, *tokenizer.encode(text)]
    drawn: list[int] = []
    shown: str | None = None  # of what was drawn; nothing at all before the prompt is taken in, which may be refused

    def show(tokens: list[list[int]], *, last: bool = False) -> None:
        nonlocal shown
        drawn.extend(tokens[0])
        if shown is None:
            print(text, end="", flush=True)
            shown = ""
        whole = tokenizer.continuation(prompt, drawn)
        half = whole.endswith("\ufffd") and not last  # of a character, which waits for its other half
        if whole.startswith(shown) and not half:
            print(whole[len(shown) :], end="", flush=True)
            shown = whole

    decoder.generate(
        [prompt],
        options.tokens or max(min(100, model.config.max_length - len(prompt)), 1),
        key=jax.random.key(options.seed),
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        stop_ids=[tokenizer.eos_id],
        on_tokens=show,
    )
    show([[]], last=True)
    print()


def run_report(options: argparse.Namespace) -> None:
    check_output(options.output)
    searches = [read_budgets_file(path, SearchFile) for path in options.files]
    write_report(searches, options.output)
    for row in table(searches):
        print(" | ".join(row))
    print(options.output)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m launch.budgets", description=(__doc__ or "").splitlines()[0])
    policies = f"{', '.join(POLICIES)}, forgotten-NATS, or a class of your own as module:Class"
    commands = parser.add_subparsers(required=True, metavar="command")
    add = commands.add_parser("search", help="find budgets that meet a target")
    add.add_argument("--checkpoint", required=True, help="the model")
    add.add_argument("--data", required=True, help="dataset folder")
    target = add.add_mutually_exclusive_group(required=True)
    target.add_argument("--target-checkpoint", help="a model whose perplexity, on the same windows, is the target")
    target.add_argument("--target-perplexity", type=_perplexity, help="the target itself")
    add.add_argument("--output", required=True, help="file to write, such as budgets.json")
    add.add_argument("--policy", default="selective", help=f"who leaves a full layer: {policies}")
    add.add_argument("--context", type=positive, help="tokens of a window; by default the model's context")
    add.add_argument(
        "--step", type=positive, help="tokens by which a budget is lowered; by default 1/32 of the context"
    )
    add.add_argument("--first-step", type=positive, help="a coarser step to begin with, halved down to --step")
    add.add_argument("--windows", type=positive, default=64, help="training windows that the search measures on")
    add.add_argument("--validation-windows", type=positive, default=256, help="windows that the result is measured on")
    add.add_argument("--lazy", action="store_true", help="measure fewer layers; the choices may differ from greedy's")
    add.add_argument("--exchange", action="store_true", help="then move budget between layers while that pays")
    add.set_defaults(run=run_search, interrupted="the same command goes on from the journal beside its output")
    for name, run, text in (
        ("evaluate", run_evaluate, "measure the perplexity of budgets; tasks: python -m launch.evaluate"),
        ("generate", run_generate, "continue a prompt; files of them: python -m inference_budget generate"),
    ):
        add = commands.add_parser(name, help=text)
        add.add_argument("--budgets", required=True, help="file of `search`")
        add.add_argument("--checkpoint", help="the model; by default where the search found it")
        add.add_argument("--data", help="dataset folder; by default where the search found it")
        add.add_argument("--cache-dtype", choices=CACHE_DTYPES, help="of keys and values; by default the model's")
        add.set_defaults(run=run, interrupted="the same command begins anew")
        if name == "evaluate":
            add.add_argument("--split", default="validation", help="train or validation")
            add.add_argument("--windows", type=positive, help="windows to measure on; by default the search's number")
        else:
            add.add_argument("--prompt", help="text; by default standard input")
            add.add_argument("--tokens", type=positive, help="tokens to draw at most; by default 100, or what is left")
            add.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token")
            add.add_argument("--top-k", type=positive)
            add.add_argument("--top-p", type=float)
            add.add_argument("--seed", type=int, default=0)
    add = commands.add_parser("report", help="one HTML page about several searches")
    add.add_argument("files", nargs="+", help="files of `search`")
    add.add_argument("--output", required=True, help="HTML file to write")
    add.set_defaults(run=run_report, interrupted="the same command begins anew")
    return parser


def _perplexity(text: str) -> float:
    value = float(text)
    if not value > 1:
        raise argparse.ArgumentTypeError(f"a perplexity is above 1, not {text}")
    return value


if __name__ == "__main__":
    open_shared_cache()
    main()
