"""How well a run of configs/t5.py fills blanks in held-out text.

    python -m launch.spans WORKDIR [--data=DATASET] [--windows=64] [--show=2] [--temperature=0] [--seed=0]

The blanks are those of validation. A blank is right where all of its tokens are, and no other. The encoder runs once;
each token is written after those before it.

Shape letters: R windows, M inputs, N outputs.
"""

import argparse
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from data import Dataset, EvalBatches, open_dataset
from data.spans import fillings
from launch.commands import InputError, Parser, positive, run_to_the_end
from launch.evaluate.caches import data_of_run
from selective_attention import EncoderDecoder, fill
from trainer.checks import check_dataset
from trainer.errors import ConfigError, ResumeError, StorageError
from trainer.settings import Settings
from trainer.source import VALIDATION, with_blanks

_ROWS = 32  # at a time


def write(
    model: EncoderDecoder, settings: Settings, dataset: Dataset, windows: int, temperature: float = 0.0, seed: int = 0
) -> Iterator[dict[str, np.ndarray]]:
    """The first windows of validation in batches as `data.SpanBatches` gives them, with what the model writes as
    `written`, int32 [R, N].

    Raises:
      SamplingError: the temperature is below 0.
    """
    corruption, manifest = settings.corruption, dataset.manifest
    assert corruption is not None  # or there would be no such model
    source = EvalBatches(dataset, context_length=settings.context_length, batch_size=_ROWS)
    blanks = with_blanks(source, corruption, manifest, VALIDATION)
    keys = jax.random.split(jax.random.key(seed), blanks.num_batches)
    for step, key in enumerate(keys[: -(-windows // _ROWS)]):
        rows = min(_ROWS, windows - step * _ROWS, source.num_windows - step * _ROWS)
        batch = blanks.rows(step, range(_ROWS))
        inputs_RM, length = batch["encoder_inputs"], batch["targets"].shape[1]
        visible_RM = jnp.asarray(inputs_RM != manifest.tokenizer.pad_id)
        written_RN = fill(
            model,
            jnp.asarray(inputs_RM),
            length,
            bos_id=manifest.tokenizer.bos_id,
            key=key,
            visible_BM=visible_RM,
            temperature=temperature,
        )
        batch["written"] = np.asarray(written_RN)
        yield {name: x[:rows] for name, x in batch.items()}


def right(written_N: np.ndarray, targets_N: np.ndarray, first_sentinel: int, pad_id: int) -> list[bool]:
    """Of each blank of a window, whether it was filled with exactly its own tokens."""
    truth, said = blanks_of(targets_N[targets_N != pad_id], first_sentinel), blanks_of(written_N, first_sentinel)
    return [n < len(said) and said[n] == own for n, own in enumerate(truth)]


def blanks_of(tokens_N: np.ndarray, first_sentinel: int) -> list[list[int]]:
    """As `fillings`, without what stands behind the last sentinel, which is no blank."""
    return fillings(tokens_N, first_sentinel)[:-1]


def shown(batch: dict[str, np.ndarray], row: int, dataset: Dataset) -> str:
    """A window with numbered blanks, and what was written into each."""
    tokenizer, first = dataset.tokenizer(), dataset.manifest.vocab_size
    parts: list[list[int]] = [[]]
    for token in batch["encoder_inputs"][row].tolist():
        if token >= first:
            parts.append([])
        elif token != tokenizer.pad_id:
            parts[-1].append(token)
    text = tokenizer.decode(parts[0])
    for number, part in enumerate(parts[1:]):
        text += f" [{number}] {tokenizer.decode(part)}"
    truth, said = (blanks_of(batch[name][row], first) for name in ("targets", "written"))
    lines = [text]
    for number, own in enumerate(truth):
        other = repr(tokenizer.decode(said[number])) if number < len(said) else "nothing"
        sign = "=" if number < len(said) and said[number] == own else " "
        lines.append(f"  {sign} [{number}] {tokenizer.decode(own)!r}: {other}")
    return "\n".join(lines)


def main() -> None:
    """The command."""
    parser = Parser(prog="python -m launch.spans", description="How well an encoder-decoder fills blanks.")
    add = parser.add_argument
    add("workdir", metavar="WORKDIR", help="of a run of configs/t5.py")
    add("--data", metavar="DATASET", help="folder of the dataset, by default the run's own")
    add("--windows", type=positive, default=64, help="of validation (default: %(default)s)")
    add("--show", type=int, default=2, help="how many of them to print (default: %(default)s)")
    add("--temperature", type=float, default=0.0, help="0 writes the likeliest token (default: %(default)s)")
    add("--seed", type=int, default=0, help="of what is drawn (default: %(default)s)")
    options = parser.parse_args()
    run_to_the_end(lambda: _run(options), "nothing was written")


def _run(options: argparse.Namespace) -> None:
    from trainer.export import load  # seconds

    try:
        model, settings, step = load(options.workdir, EncoderDecoder)
        dataset = open_dataset(options.data) if options.data else data_of_run(options.workdir)
        check_dataset(settings, dataset.manifest)
    except (ResumeError, StorageError, ConfigError, ValueError) as error:
        raise InputError(f"{options.workdir}: {error}") from error
    found: list[bool] = []
    windows, left = 0, options.show
    first, pad_id = dataset.manifest.vocab_size, dataset.manifest.tokenizer.pad_id
    for batch in write(model, settings, dataset, options.windows, options.temperature, options.seed):
        for row, (written_N, targets_N) in enumerate(zip(batch["written"], batch["targets"], strict=True)):
            if left > 0:
                left -= 1
                print(shown(batch, row, dataset), flush=True)
            found += right(written_N, targets_N, first, pad_id)
            windows += 1
    print(f"step {step:,}: {sum(found):,} of {len(found):,} blanks in {windows:,} windows right, {np.mean(found):.2%}")


if __name__ == "__main__":
    main()
