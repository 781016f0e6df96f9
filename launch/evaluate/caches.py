"""What is evaluated: a model with its tokenizer and text, and the caches that it is given."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from data import Dataset, Tokenizer, load_tokenizer, open_dataset
from data.manifest import TOKENIZER_JSON
from inference_budget import Budgets, EvictionPolicy, Scorer, find_policy, model_fingerprint, policy_name
from inference_budget.budgets import check_budgets
from inference_budget.interchange import budgets_of, read_budgets_file
from inference_budget.policies import check_policy
from launch.budgets.inputs import check_vocabulary, load_model, located
from launch.budgets.result import UsableFile
from launch.commands import InputError
from selective_attention import Transformer

from .results import FULL


@dataclasses.dataclass(frozen=True)
class CacheSize:
    """How many tokens each layer may hold, and who leaves; no policy for a full cache."""

    budgets: Budgets
    policy: EvictionPolicy | None
    dtype: str | None = None  # of keys and values; None for the model's

    @property
    def policy_name(self) -> str | None:
        return None if self.policy is None else policy_name(self.policy)

    @property
    def name(self) -> str:
        size = FULL if self.policy is None else f"{self.policy_name} {self.budgets.memory_factor:.2f}x"
        return size if self.dtype is None else f"{size}, {self.dtype}"


@dataclasses.dataclass(frozen=True)
class Subject:
    """What is evaluated."""

    model: Transformer
    checkpoint: dict[str, str]  # path and fingerprint
    text: Dataset | None  # for tasks that are made of text
    tokenizer: Tokenizer
    caches: list[CacheSize]  # the first one is full

    @property
    def length(self) -> int:
        """The context of all caches, tokens."""
        return self.caches[0].budgets.context_length

    @property
    def dataset(self) -> Dataset:
        """The text.

        Raises:
          InputError: none was given.
        """
        if self.text is None:
            raise InputError(f"{self.checkpoint['path']} has a tokenizer, but no text; give a dataset with --data")
        return self.text

    def scorer(self, cache: CacheSize) -> Scorer:
        policy = cache.policy or find_policy("oldest")  # whom nothing makes room for in a full cache
        return Scorer(self.model, cache.budgets, policy, cache_dtype=cache.dtype, bos_id=self.tokenizer.bos_id)


def load_subject(
    checkpoint: str | None,
    data: str | None,
    files: Sequence[str],
    factors: Sequence[float],
    policies: Sequence[str],
    context: int | None = None,
    dtypes: Sequence[str] = (),
) -> Subject:
    """The model, and its full cache before those that were asked for.

    Args:
      checkpoint: by default where the first of `files` says.
      data: a dataset, of which tokenizer and text are taken; by default the one that the file or the run names, or for
        an imported model its own tokenizer, without a text.
      files: of `python -m launch.budgets search`.
      factors: memory factors of uniform budgets, with each of `policies`; of those that forget, 1 as well.
      policies: by default each file's own, and for `factors` "selective".
      context: tokens; by default the model's, or that of the files.
      dtypes: of keys and values: all caches in each of them, beside a full one in the model's.

    Raises:
      InputError, DataError, BudgetsError: what cannot be used.
    """
    given = [find_policy(name) for name in policies]
    if not (files or factors or all(policy.shrinks for policy in given)):
        raise InputError("--policy is of a cache that is not full; give --memory-factor or --budgets")
    contents = [read_budgets_file(path, UsableFile) for path in files]
    if not (checkpoint or contents):
        raise InputError("there is no model; give --checkpoint, or --budgets with a file that names one")
    checkpoint = checkpoint or contents[0]["checkpoint"]["path"]
    model = load_model(checkpoint)
    fingerprint, config = model_fingerprint(model), model.config
    caches = list[CacheSize]()
    for content in contents:
        budgets, own = budgets_of(content, fingerprint)
        caches += [CacheSize(budgets, policy) for policy in given or [own]]
    length = context or min([config.max_length, *(cache.budgets.context_length for cache in caches)])
    if length > config.max_length:
        raise InputError(
            f"--context={context}: the model has been made for {config.max_length} tokens; give at most that"
        )
    for policy in given or [find_policy("selective")]:
        for factor in [1.0, *factors] if policy.shrinks else factors:
            total = round(config.num_layers * length / factor)
            caches.append(CacheSize(Budgets.uniform(config.num_layers, length, total), policy))
    for cache in caches:
        check_budgets(cache.budgets, config)
        if cache.policy is not None:
            check_policy(cache.policy, config)
        if cache.budgets.context_length != length:
            raise InputError("the files of --budgets are for other contexts than this; evaluate one context at a time")
    text, tokenizer = _text_of(checkpoint, data or next((c["data"]["path"] for c in contents if "data" in c), None))
    if text is None:
        check_vocabulary(model, tokenizer.vocab_size, checkpoint)
    else:
        check_vocabulary(model, text.manifest.vocab_size, text.path)
    full = CacheSize(Budgets.full(config.num_layers, length), None)
    source = {"path": located(checkpoint), "fingerprint": fingerprint}
    in_dtypes = [dataclasses.replace(cache, dtype=dtype) for dtype in dtypes for cache in (full, *caches)]
    return Subject(model, source, text, tokenizer, [full, *(in_dtypes or caches)])


def _text_of(checkpoint: str, path: str | None) -> tuple[Dataset | None, Tokenizer]:
    """The dataset at `path`, by default the run's, and its tokenizer; or an imported model's tokenizer alone."""
    if path is None and (Path(checkpoint) / TOKENIZER_JSON).is_file():
        return None, load_tokenizer(checkpoint)
    text = open_dataset(path) if path else data_of_run(checkpoint)
    return text, text.tokenizer()


def data_of_run(checkpoint: str) -> Dataset:
    """The dataset that a training run read.

    Raises:
      InputError: it is no run's workdir, or its dataset is not there any more.
    """
    from trainer.checkpoints.checksums import DamagedError  # seconds, as in load_model
    from trainer.checkpoints.folder import checkpoint_folder, list_steps, read_metadata
    from trainer.settings import read_saved

    folder = checkpoint_folder(checkpoint)
    for step in sorted(list_steps(folder), reverse=True):
        try:
            metadata = read_metadata(folder / str(step))
        except DamagedError:
            continue
        data = read_saved(metadata["config"]).data
        if data.task:
            raise InputError(f"{checkpoint} was trained on the task {data.task}; measure it with launch.synthetic")
        path = Path(data.path)
        if path.exists() and (dataset := open_dataset(path)).manifest.fingerprint == metadata["dataset_fingerprint"]:
            return dataset
        raise InputError(f"{path} does not hold the dataset of {checkpoint} any more; give it with --data")
    raise InputError(f"{checkpoint} has no tokenizer; give the dataset that the model was trained on with --data")
