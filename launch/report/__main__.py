"""A page about finished runs: perplexities, loss curves, a sample of each, and what selective attention forgot.

    python -m launch.report --data=DATASET --output=DIR selective=WORKDIR standard=WORKDIR

Writes DIR/index.html, which needs nothing else: no network, no other file.
"""

import argparse
import json
import logging
import math
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tqdm import tqdm

from data import DataError, Dataset, EvalBatches, Tokenizer, open_dataset
from launch.report.page import Curve, RunReport, SentenceMasks, render
from selective_attention import Transformer
from selective_attention.transformer.sampling import sample
from trainer.errors import ResumeError
from trainer.export import load_model
from trainer.loop import RESULT_FILE
from trainer.settings import Settings

SENTENCE_TOKENS = (40, 60)  # of the sentence that is shown, without BOS
MAX_WINDOWS = 200  # of the validation split that are searched for it
MASK_BATCH = 16  # sentences whose masks are computed at a time
PROMPT_TOKENS, SAMPLE_TOKENS = 16, 120
TEMPERATURE, TOP_K = 0.8, 50
# A sentence or several, from a capital letter to a full stop, within one paragraph.
SENTENCE = re.compile(r"(?<=[.!?]\s)[A-Z](?:(?!\n\s*\n).){40,300}?[.!?](?=\s)", re.DOTALL)
MIN_LETTERS = 0.9  # of a sentence's characters that are not space; code and tables have fewer


class ReportError(RuntimeError):
    """A report that cannot be made; the message says of which run, and what to do."""


def write_report(
    runs: Mapping[str, str | Path], dataset_path: str | Path, output_dir: str | Path, *, seed: int = 0
) -> list[RunReport]:
    """Writes `output_dir`/index.html about finished runs, and returns what its tables show.

    Args:
      runs: names as the page shows them, and workdirs of `python -m trainer`. The masks of those with selective
        attention are shown.
      dataset_path: the dataset of the runs, whose validation split gives the prompt and the sentence.
      output_dir: made if it does not exist; its index.html is overwritten.
      seed: of the samples.

    Returns:
      One RunReport a run, in the order of `runs`; `terminal_table` prints them.

    Raises:
      ReportError: a workdir without a result, or a run of another dataset's vocabulary.
      data.DataError, trainer.errors.ResumeError: a dataset or checkpoint that cannot be read.
    """
    if not runs:
        raise ReportError("no runs were given; give at least one NAME=WORKDIR")
    for name, workdir in runs.items():
        _read_result(name, Path(workdir))  # before anything that takes long
    dataset = open_dataset(dataset_path)
    tokenizer = dataset.tokenizer()
    reports, sentence = [], None
    with tqdm(total=len(runs), desc="report", unit="run", disable=None) as bar:
        for name, workdir in runs.items():
            model, config, _ = load_model(str(workdir))
            if config.model.vocab_size != tokenizer.vocab_size:
                raise ReportError(
                    f"run {name!r} ({workdir}) has {config.model.vocab_size} token ids, but the dataset {dataset_path} "
                    f"has {tokenizer.vocab_size}; give the dataset that it was trained on"
                )
            if config.model.selective and sentence is None:
                sentence = choose_sentence(model, dataset, config.context_length)
            shown = sentence if config.model.selective else None
            reports.append(_run_report(name, workdir, (model, config), dataset, shown, seed))
            bar.update()
    path = Path(output_dir) / "index.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(render(reports), encoding="utf-8")
    return reports


def _run_report(
    name: str,
    workdir: str | Path,
    loaded: tuple[Transformer, Settings],
    dataset: Dataset,
    sentence: np.ndarray | None,
    seed: int,
) -> RunReport:
    """What the page says of a run, with the masks of the sentence, if there is one."""
    (model, config), tokenizer, result = loaded, dataset.tokenizer(), _read_result(name, Path(workdir))
    masks = None
    if sentence is not None:
        masks_LNN = np.asarray(_masks(model, sentence[None]))[:, 0]
        masks = SentenceMasks([tokenizer.piece(token) for token in sentence], masks_LNN)
    prompt, continuation = _sample(model, dataset, config.context_length, seed)
    return RunReport(
        name=name,
        selective=config.model.selective,
        parameters=config.transformer.parameter_counts()["total"],
        num_layers=model.config.num_layers,
        steps=result["steps"],
        train_tokens=result["steps"] * config.batch_size * config.context_length,
        loss=result["loss"],
        perplexity=result["perplexity"],
        validation_tokens=result["tokens"],
        train_curve=read_scalar(workdir, "run/loss"),
        eval_curve=read_scalar(workdir, "run/validation_loss"),
        prompt=prompt,
        continuation=continuation,
        masks=masks,
    )


def terminal_table(reports: Sequence[RunReport]) -> str:
    """The results as text, one line a run under a line of headings."""
    width = max(len("run"), *(len(report.name) for report in reports))
    lines = [f"{'run':<{width}}  {'validation perplexity':>21}  {'parameters':>13}  {'steps':>7}  {'tokens':>14}"]
    for r in reports:
        lines.append(
            f"{r.name:<{width}}  {r.perplexity:>21.2f}  {r.parameters:>13,}  {r.steps:>7,}  {r.train_tokens:>14,}"
        )
    return "\n".join(lines)


def read_scalar(workdir: str | Path, tag: str) -> Curve:
    """A scalar of a run's TensorBoard events. Where a restarted run wrote a step twice, the later value holds."""
    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it warns of every resumed run
    events = EventAccumulator(str(Path(workdir) / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    if tag not in events.Tags()["scalars"]:
        return Curve([], [])
    points = {event.step: event.value for event in sorted(events.Scalars(tag), key=lambda event: event.wall_time)}
    return Curve(sorted(points), [points[step] for step in sorted(points)])


def choose_sentence(model: Transformer, dataset: Dataset, context_length: int) -> np.ndarray:
    """A validation sentence of 40 to 60 tokens, int32 [1 + tokens] with BOS.

    It is the one where `model` most clearly keeps some tokens and forgets others, by the variance of exp(-F) over the
    keys of a query, averaged over queries and layers. Where the split has no sentence of that length, or the context is
    too short for it, the starts of windows take their place.
    """
    tokenizer = dataset.tokenizer()
    windows_BN = _validation_windows(dataset, context_length)
    longest = min(SENTENCE_TOKENS[1], context_length - 1)
    candidates = [
        tokens
        for window_N in windows_BN
        for text in _documents(window_N, tokenizer)
        for match in SENTENCE.finditer(text)
        if _is_prose(match[0]) and SENTENCE_TOKENS[0] <= len(tokens := tokenizer.encode(match[0])) <= longest
    ]
    if not candidates:
        candidates = [window_N[:longest].tolist() for window_N in windows_BN]
    tokens_CN = np.full((len(candidates), 1 + longest), tokenizer.pad_id, np.int32)
    for row_N, tokens in zip(tokens_CN, candidates, strict=True):
        row_N[: 1 + len(tokens)] = [tokenizer.bos_id, *tokens]
    best, most = tokens_CN[0], -np.inf
    for start in range(0, len(tokens_CN), MASK_BATCH):
        batch_BN = tokens_CN[start : start + MASK_BATCH]
        masks_LBNN = np.asarray(_masks(model, np.resize(batch_BN, (MASK_BATCH, 1 + longest))))
        for tokens_N, masks_LNN in zip(batch_BN, masks_LBNN.swapaxes(0, 1), strict=False):
            length = np.count_nonzero(tokens_N != tokenizer.pad_id)
            rows = [np.exp(-masks_LNN[:, i, : i + 1]).var(axis=1) for i in range(length)]
            if (contrast := np.mean(rows)) > most:
                best, most = tokens_N[:length], contrast
    return best


_masks = jax.jit(Transformer.selection_masks)


def _validation_windows(dataset: Dataset, context_length: int) -> np.ndarray:
    """int32 [B, N]: windows spread over the validation split, the last and perhaps padded one left out."""
    batches = EvalBatches(dataset, context_length=context_length, batch_size=1)
    count = max(1, batches.num_windows - 1)
    return batches.read(np.unique(np.linspace(0, count - 1, min(count, MAX_WINDOWS)).astype(np.int64)))["targets"]


def _documents(window_N: np.ndarray, tokenizer: Tokenizer) -> list[str]:
    ends = np.flatnonzero(window_N == tokenizer.eos_id)
    return [tokenizer.decode(part.tolist()) for part in np.split(window_N, ends)]


def _is_prose(text: str) -> bool:
    characters = [character for character in text if not character.isspace()]
    return sum(character.isalpha() for character in characters) >= MIN_LETTERS * len(characters)


def _sample(model: Transformer, dataset: Dataset, context_length: int, seed: int) -> tuple[str, str]:
    """(the first tokens of the validation split, the model's continuation up to the end of the document) as text."""
    tokenizer = dataset.tokenizer()
    window_N = _validation_windows(dataset, context_length)[0]
    prompt = [tokenizer.bos_id, *window_N[: min(PROMPT_TOKENS, context_length // 2)].tolist()]
    count = min(SAMPLE_TOKENS, context_length - len(prompt))
    drawn_1N = sample(
        model,
        jnp.array([prompt], jnp.int32),
        count,
        key=jax.random.key(seed),
        temperature=TEMPERATURE,
        top_k=min(TOP_K, tokenizer.vocab_size),
    )
    drawn = np.asarray(drawn_1N)[0].tolist()
    if tokenizer.eos_id in drawn:
        drawn = drawn[: drawn.index(tokenizer.eos_id)]
    text, whole = tokenizer.decode(prompt), tokenizer.decode([*prompt, *drawn])
    return text, whole[len(text) :]


def _read_result(name: str, workdir: Path) -> dict:
    try:
        result = json.loads((workdir / RESULT_FILE).read_text())
    except OSError as error:
        raise ReportError(
            f"run {name!r}: no {RESULT_FILE} in {workdir} ({error.strerror}); finish it with `python -m trainer "
            f"--workdir={workdir} ...`, or correct the path"
        ) from None
    return result | {"perplexity": math.inf if result["perplexity"] is None else result["perplexity"]}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m launch.report", description=__doc__.partition("\n")[0])
    parser.add_argument("runs", nargs="+", metavar="NAME=WORKDIR", help="a finished run and its name on the page")
    parser.add_argument("--data", required=True, metavar="DATASET", help="the dataset folder of the runs")
    parser.add_argument("--output", required=True, metavar="DIR", help="where to write index.html")
    parser.add_argument("--seed", type=int, default=0, help="of the samples (default: 0)")
    options = parser.parse_args(arguments)
    runs = dict(run.partition("=")[::2] for run in options.runs)
    if not all(name and workdir for name, workdir in runs.items()) or len(runs) < len(options.runs):
        parser.error("give each run once, as NAME=WORKDIR with a name of its own")
    try:
        reports = write_report(runs, options.data, options.output, seed=options.seed)
    except (ReportError, ResumeError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(terminal_table(reports))
    print(f"the page is {options.output}/index.html")
    return 0


if __name__ == "__main__":
    sys.exit(main())
