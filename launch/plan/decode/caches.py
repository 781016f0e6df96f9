"""Which caches a plan compares: full ones, of the standard model and of this one, and those of budgets."""

import dataclasses
from collections.abc import Iterable, Sequence

from inference_budget import Budgets, BudgetsError, find_policy, load_budgets
from inference_budget.budgets import MIN_BUDGET, check_budgets
from inference_budget.interchange import BudgetsFile, read_budgets_file
from inference_budget.policies import check_policy
from launch.budgets.inputs import load_model
from launch.commands import InputError
from selective_attention import Selection, TransformerConfig
from trainer.errors import ConfigError

STANDARD, FULL = "standard", "full"  # names: the full caches of the model without selection, and of this one


@dataclasses.dataclass(frozen=True)
class CacheChoice:
    """One model and the slots that each of its layers has."""

    name: str  # for tables
    config: TransformerConfig
    budgets: Budgets
    policy: str  # the name of who leaves a full layer
    dtype: str | None = None  # of keys and values; None for the model's


def read_budgets(path: str, config: TransformerConfig | None) -> tuple[TransformerConfig, Budgets, str]:
    """The model of a file of budgets, or `config`, the budgets, and the name of their policy.

    Without `config` the file's checkpoint is read, and must be the model that the budgets were found for; with it, only
    the number of layers and the context can be compared.

    Raises:
      ConfigError: there are no such budgets, or they are another model's.
    """
    try:
        content = read_budgets_file(path, BudgetsFile)
        if config is None:
            model = load_model(content["checkpoint"]["path"])
            return model.config, load_budgets(path, model)[0], content["policy"]
        budgets = Budgets(tuple(content["budgets"]), content["context_length"])
        check_budgets(budgets, config)
        check_policy(find_policy(content["policy"]), config)
    except (BudgetsError, InputError) as error:
        raise ConfigError(f"--budgets={path}: {error}") from error
    return config, budgets, content["policy"]


def uniform(config: TransformerConfig, context_length: int, factor: float) -> Budgets:
    """`context_length` / `factor` tokens in each layer, rounded down, at least <BOS> and the current one.

    Raises:
      ConfigError: a factor below 1.
    """
    if not factor >= 1:
        raise ConfigError(f"--memory-factor: {factor:g} is below 1, the full cache")
    return Budgets((max(int(context_length / factor), MIN_BUDGET),) * config.num_layers, context_length)


def choices(
    config: TransformerConfig,
    context_length: int,
    factors: Sequence[float],
    found: Iterable[tuple[str, Budgets, str]] = (),
    dtype: str | None = None,
) -> list[CacheChoice]:
    """The caches to compare, the full ones first.

    Args:
      config: the model.
      context_length: tokens of a full cache.
      factors: of uniform budgets; 1 is the full cache, which is there anyhow.
      found: names, budgets and policies of files; the names are none of full caches.
      dtype: of all their keys and values; None for the model's.

    Raises:
      ConfigError: a factor below 1, or uniform budgets of a model without selection.
    """
    standard = dataclasses.replace(config, selection=Selection.OFF)
    full = Budgets.full(config.num_layers, context_length)
    made = [CacheChoice(STANDARD, standard, full, "oldest")]
    pruned = [factor for factor in factors if factor != 1]
    if config.selection is not Selection.OFF:
        made.append(CacheChoice(FULL, config, full, "selective"))
    elif pruned:
        raise ConfigError(
            "--memory-factor: a model without selection has no policy of its own; give --budgets, whose file names one"
        )
    made += [CacheChoice(f"{f:g}x", config, uniform(config, context_length, f), "selective") for f in pruned]
    made += [CacheChoice(name, config, budgets, policy) for name, budgets, policy in found]
    return [dataclasses.replace(choice, dtype=dtype) for choice in made]
