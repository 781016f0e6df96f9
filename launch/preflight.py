"""Says whether a config runs on so many devices with a dataset, before anything is rented.

    python -m launch.preflight --devices 16 [--slices 2] [--data gs://B/data/c4] [--manifest FILE] -- --config=...

The flags after -- are the trainer's own. Prints the mesh and the batch; a mistake is one line and exit code 2.
"""

import argparse
import sys
from pathlib import Path

from data import DataError
from data.manifest import Manifest
from trainer.checks import check_batch, check_dataset
from trainer.errors import EXIT_MISTAKE, ConfigError
from trainer.flags import CONFIG, parse_flags
from trainer.mesh import AXES, mesh_shape
from trainer.settings import changed, read_settings


def describe(
    trainer_flags: list[str], devices: int, slices: int = 1, data: str = "", manifest: Path | None = None
) -> str:
    """The mesh and the batch of a run on `devices` in all, as lines for people.

    Raises:
      ConfigError, data.DataError: the run could not start; the message says what to change.
      SystemExit: a mistake in the flags, which was printed.
    """
    parse_flags(["trainer", *trainer_flags, "--workdir=."])
    settings = changed(read_settings(CONFIG.value), {"data.path": data})
    shape = mesh_shape(settings.mesh, devices, num_slices=slices)
    if shape[0] % slices:
        raise ConfigError(
            f"mesh data={shape[0]} must be a multiple of the {slices} slices, which it spans; change --config.mesh.*"
        )
    check_batch(settings, dict(zip(AXES, shape, strict=True)))
    if manifest is not None:
        check_dataset(settings, Manifest.from_json(manifest.read_text()))
    mesh = " ".join(f"{axis}={size}" for axis, size in zip(AXES, shape, strict=True))
    rows = settings.batch_size // (shape[0] * shape[1])
    return (
        f"mesh {mesh} over {devices} devices in {slices} slice{'s' if slices > 1 else ''}\n"
        f"batch {settings.batch_size} sequences of {settings.context_length} tokens, {rows} a shard of the batch, "
        f"{settings.steps} steps"
    )


def main(arguments: list[str]) -> None:
    own, _, trainer_flags = _partition(arguments)
    parser = argparse.ArgumentParser(prog="python -m launch.preflight", description="Checks a run for a slice.")
    parser.add_argument("--devices", type=int, required=True, help="JAX devices of all slices")
    parser.add_argument("--slices", type=int, default=1)
    parser.add_argument("--data", default="", help="the dataset's folder, for messages")
    parser.add_argument("--manifest", type=Path, help="a copy of the dataset's manifest.json")
    options = parser.parse_args(own)
    try:
        print(describe(trainer_flags, options.devices, options.slices, options.data, options.manifest))
    except (ConfigError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_MISTAKE)
    except KeyError as error:  # a misspelt group of fields, which ml_collections names
        print(f"error: --config has no such key: {' '.join(error.args[0].split())}", file=sys.stderr)
        sys.exit(EXIT_MISTAKE)


def _partition(arguments: list[str]) -> tuple[list[str], list[str], list[str]]:
    at = arguments.index("--") if "--" in arguments else len(arguments)
    return arguments[:at], arguments[at : at + 1], arguments[at + 1 :]


if __name__ == "__main__":
    main(sys.argv[1:])
