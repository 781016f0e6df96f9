"""What the models of runs write and forget, which needs their checkpoints and their dataset."""

import dataclasses
import re
from collections.abc import Sequence
from html import escape
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from data import Dataset, EvalBatches, Tokenizer, open_dataset
from launch.report import series
from launch.report.masks import SentenceMasks, masks_section
from launch.report.run import Run
from selective_attention import Transformer
from selective_attention.transformer.sampling import sample
from trainer.errors import ResumeError, StorageError
from trainer.export import load_model

SENTENCE_TOKENS = (40, 60)  # of the sentence that is shown, without BOS
MAX_WINDOWS = 200  # of the validation split that are searched for it
MASK_BATCH = 16  # sentences whose masks are computed at a time
MAX_LAYERS = 24  # whose masks a page shows, of all runs
PROMPT_TOKENS, SAMPLE_TOKENS = 16, 120
TEMPERATURE, TOP_K = 0.8, 50
# A sentence or several, from a capital letter to a full stop, within one paragraph.
SENTENCE = re.compile(r"(?<=[.!?]\s)[A-Z](?:(?!\n\s*\n).){40,300}?[.!?](?=\s)", re.DOTALL)
MIN_LETTERS = 0.9  # of a sentence's characters that are not space; code and tables have fewer


@dataclasses.dataclass(frozen=True)
class Sample:
    """What one run's newest checkpoint writes, and what it forgets of the sentence."""

    prompt: str = ""
    continuation: str = ""
    masks: SentenceMasks | None = None  # of a model that selects
    trouble: str = ""  # why there is no sample


def read_samples(runs: Sequence[Run], dataset_path: str | Path, seed: int = 0) -> list[Sample]:
    """One for each run; the sentence is the same for all.

    Raises:
      data.DataError: the dataset cannot be read.
    """
    dataset = open_dataset(dataset_path)
    samples: list[Sample] = []
    sentence = None
    for run in tqdm(runs, desc="samples", unit="run", disable=None):
        if reason := _misfit(run, dataset):
            samples.append(Sample(trouble=reason))
            continue
        try:
            model, settings, _ = load_model(run.workdir)
        except (ResumeError, StorageError, OSError) as error:
            samples.append(Sample(trouble=str(error)))
            continue
        masks = None
        if settings.model.selective:
            if sentence is None:
                sentence = choose_sentence(model, dataset, settings.context_length)
            shown = sentence[: settings.context_length]
            pieces = [dataset.tokenizer().piece(token) for token in shown]
            masks = SentenceMasks(pieces, np.asarray(_masks(model, shown[None]))[:, 0])
        samples.append(Sample(*_sample(model, dataset, settings.context_length, seed), masks))
    return samples


def _misfit(run: Run, dataset: Dataset) -> str:
    """Why the dataset is not a run's own; empty if it is, or that is not known."""
    vocab_size, pieces = run.field("model.vocab_size"), dataset.tokenizer().vocab_size
    if vocab_size is not None and vocab_size < pieces:
        return f"it has {vocab_size} token ids, but the dataset {dataset.path} has {pieces}"
    fingerprint = dataset.manifest.fingerprint
    if run.fingerprint not in ("", fingerprint):
        return f"it was trained on another dataset than {dataset.path}, whose fingerprint is {fingerprint[:12]}"
    return ""


def samples_sections(runs: Sequence[Run], samples: Sequence[Sample]) -> list[str]:
    """What they wrote, then the masks of each run that has some."""
    figures = []
    for number, (run, one) in enumerate(zip(runs, samples, strict=True)):
        text = f"<pre><span class=prompt>{escape(one.prompt)}</span>{escape(one.continuation)}</pre>"
        if one.trouble:
            text = f"<p class=note>No sample: {escape(one.trouble)}.</p>"
        figures.append(f"<figure><figcaption>{series.key(number)}{escape(run.name)}</figcaption>{text}</figure>")
    written = (
        f"<section><h2>Samples</h2><div class=pair>{''.join(figures)}</div><p class=note>Faint: the prompt, the same "
        "for all, from the validation split. After it: what the model wrote.</p></section>"
    )
    masked = [(run.name, one.masks) for run, one in zip(runs, samples, strict=True) if one.masks is not None]
    most = MAX_LAYERS // max(1, len(masked))
    return [written, *(masks_section(name, masks, max(1, most)) for name, masks in masked)]


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
    return tokenizer.decode(prompt), tokenizer.continuation(prompt, drawn)
