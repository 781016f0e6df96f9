"""The newest checkpoint that a run has made: noted in the workdir, beside the folder of checkpoints and not in it, so
that a run whose checkpoints were lost is told from a new one.
"""

import logging

from etils import epath

from trainer.checkpoints.disk import write_file

REACHED_FILE = "newest_checkpoint"
logger = logging.getLogger("trainer")


def read_reached(workdir: epath.PathLike) -> int | None:
    """The step of the newest checkpoint that there ever was; None if there was none, or nobody can tell.

    Raises:
      OSError: storage does not say.
    """
    path = epath.Path(workdir) / REACHED_FILE
    try:
        return int(path.read_text())
    except FileNotFoundError:
        return None
    except ValueError:
        logger.warning("%s does not hold the number of a step; checkpoints that are missing will not be noticed", path)
        return None


def write_reached(workdir: epath.PathLike, step: int | None) -> None:
    """The newest checkpoint is now that of `step`; None: a rollback left none.

    Raises:
      OSError: it could not be written.
    """
    if step == read_reached(workdir):
        return
    path = epath.Path(workdir) / REACHED_FILE
    if step is None:
        path.unlink(missing_ok=True)
        return
    write_file(path, f"{step}\n")
