"""The trainer's flags, which the commands that plan and check a run share."""

import os
import re
import sys
from typing import NoReturn

from absl import flags
from ml_collections import config_flags

from trainer.errors import EXIT_MISTAKE

WORKDIR = flags.DEFINE_string("workdir", None, "Folder of this run's checkpoints, TensorBoard events and result.")
CONFIG = config_flags.DEFINE_config_file("config", None, "Config file, e.g. configs/c4.py:d12", lock_config=True)
INIT_FROM = flags.DEFINE_string(
    "init_from", "", "Folder of an exported model, whose parameters a new run begins with; a resumed one has its own."
)
PROFILE_STEPS = flags.DEFINE_string("profile_steps", "", "Steps to trace, such as 100:105, which are 100 to 104.")
OVERRIDE_RESUME = flags.DEFINE_multi_string(
    "override-resume",
    [],
    "Config field that may differ from the checkpoint's although it changes the mathematics or the order of the data, "
    "e.g. optimizer.peak_lr; may be given several times.",
)


def parse_flags(argv: list[str]) -> list[str]:
    """absl's flags; a mistake in them is one line that says what to do, and exit code 2."""
    for argument in argv:
        path = argument.removeprefix("--config=").partition(":")[0]
        if argument.startswith("--config=") and not os.path.isfile(path):
            _exit_with(f"--config: there is no file {path}")
    try:
        return flags.FLAGS(argv)
    except (AttributeError, KeyError) as error:  # an unknown --config.key; ml_collections adds the nearest one
        names = re.findall(r"\w+", str(error).replace("\\n", " "))
        nearest = f"; did you mean {names[4]}?" if names[1:4] == ["Did", "you", "mean"] else ""
        _exit_with(f"--config has no key {names[0]}{nearest}")
    except flags.Error as error:  # of a config file's own errors only the last line says what was wrong
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        _exit_with(lines[-1].removeprefix("ValueError: "))


def _exit_with(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(EXIT_MISTAKE)
