"""A run's config, read once: typed, checked and frozen. The fields themselves are declared in `configs.base`."""

import dataclasses
import difflib
import functools
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from ml_collections import ConfigDict

from configs import base
from data import DataError, SpanCorruption
from selective_attention import EncoderDecoder, Selection, TransformerConfig
from trainer.errors import ConfigError

Group = TypeVar("Group")
_RANGES: dict[str, Callable[[Any], bool]] = {base.POSITIVE: lambda x: x > 0, base.NOT_NEGATIVE: lambda x: x >= 0}


class Settings(base.Config):
    """A config whose fields have their types and ranges; made by `read_settings`."""

    @functools.cached_property
    def transformer(self) -> TransformerConfig:
        """The model's sizes and choices.

        Raises:
          ConfigError: a value that the model refuses; `read_settings` has raised it.
        """
        m = self.model
        names = {field.name for field in dataclasses.fields(TransformerConfig)}
        given = {name: value for name, value in vars(m).items() if name in names}  # fields of one name are one thing
        given["selection"] = m.selection if m.selective else Selection.OFF
        given["attention"] = None if m.attention == "auto" else m.attention
        given["rotary_scaling"] = None if m.rotary_scaling.kind == "none" else vars(m.rotary_scaling)
        for name in ("num_layers", "num_heads", "d_model", "mlp_dim"):
            if not given[name]:
                del given[name]  # it is as the width says
        try:
            return TransformerConfig.from_width(m.width, max_length=self.context_length, **given)
        except ValueError as error:
            raise ConfigError(f"config.model: {error}") from error

    @functools.cached_property
    def corruption(self) -> SpanCorruption | None:
        """The blanks that an encoder-decoder fills; None for a decoder, which predicts every token of a context.

        Raises:
          ConfigError: as `transformer`.
        """
        if self.model.architecture == "decoder":
            return None
        if self.model.architecture != "encoder_decoder":
            raise ConfigError(
                f"--config.model.architecture must be decoder or encoder_decoder, got {self.model.architecture!r}"
            )
        if self.data.task:
            raise ConfigError(
                f"an encoder-decoder fills blanks in a dataset's text; leave out --config.data.task={self.data.task}"
            )
        try:
            return SpanCorruption(**vars(self.data.corruption))
        except DataError as error:
            raise ConfigError(f"--config.data.corruption: {error}") from error

    @property
    def lengths(self) -> dict[str, int]:
        """The positions of each of a batch's arrays of tokens."""
        if self.corruption is None:
            return {"inputs": self.context_length, "targets": self.context_length}
        inputs, outputs, _ = self.corruption.sizes(self.context_length)
        return {"encoder_inputs": inputs, "inputs": outputs, "targets": outputs}

    def parameter_counts(self) -> dict[str, int]:
        """By part, and their total: as `TransformerConfig.parameter_counts`."""
        if self.corruption is None:
            return self.transformer.parameter_counts()
        return EncoderDecoder.parameter_counts(self.transformer)


def read_settings(config: ConfigDict | Mapping[str, Any]) -> Settings:
    """The settings of a config; fields that it lacks are at their defaults.

    Raises:
      ConfigError: a key that no field has, or a value that no run can have.
    """
    settings = _read(Settings, config)
    _ = settings.transformer, settings.corruption  # raise
    return settings


def read_saved(config: Mapping[str, Any]) -> Settings:
    """The settings of a run that saved its config in a checkpoint, perhaps before some of today's fields were there, or
    with some that are gone.
    """
    return read_settings(_known(base.Config, config))


def changed(settings: Settings, change: Mapping[str, object]) -> Settings:
    """A copy with these fields, named with dots, set.

    Raises:
      ConfigError: as `read_settings`.
    """
    config = ConfigDict(dataclasses.asdict(settings))
    config.update_from_flattened_dict(change)
    return read_settings(config)


def free_fields(group: type[Any] = base.Config, prefix: str = "") -> list[str]:
    """The names of the fields, and groups of fields, that a resumed run may change."""
    names = []
    for name, (kind, marks) in _declared(group).items():
        if base.FREE in marks:
            names.append(f"{prefix}{name}")
        elif dataclasses.is_dataclass(kind):
            names += free_fields(kind, f"{prefix}{name}.")
    return names


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, object]:
    """The values of all fields, by their names with dots."""
    values: dict[str, object] = {}
    for name, value in config.items():
        values |= flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return values


def nearest(name: str, names: Iterable[str]) -> str:
    """What a message about a misspelt name ends with."""
    found = difflib.get_close_matches(name, names, n=1)
    return f"; did you mean {found[0]}?" if found else ""


def _read(group: type[Group], config: Any, prefix: str = "") -> Group:
    declared, values = _declared(group), dict[str, Any]()
    for key, value in config.items():
        name = f"{prefix}{key}"
        if key not in declared:
            raise ConfigError(f"--config has no key {name}{nearest(key, declared)}")
        kind, marks = declared[key]
        if dataclasses.is_dataclass(kind):
            values[key] = _read(kind, value, f"{name}.")
            continue
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind:
            raise ConfigError(f"--config.{name} must be a value of type {kind.__name__}, got {value!r}")
        for mark in marks:
            if mark in _RANGES and not _RANGES[mark](value):
                raise ConfigError(f"--config.{name} must be {mark}, got {value}")
        values[key] = value
    return group(**values)


def _known(group: type[Any], config: Mapping[str, Any]) -> dict[str, object]:
    declared = _declared(group)
    return {
        name: _known(declared[name][0], value) if isinstance(value, Mapping) else value
        for name, value in config.items()
        if name in declared
    }


def _declared(group: type[Any]) -> dict[str, tuple[type, tuple[str, ...]]]:
    """The type of each field of a class of `configs.base`, and its marks."""
    hints = typing.get_type_hints(group, include_extras=True)
    return {name: (getattr(x, "__origin__", x), getattr(x, "__metadata__", ())) for name, x in hints.items()}
