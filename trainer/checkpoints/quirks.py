"""What Orbax and TensorStore do that a long run cannot live with, put right in one place."""

import copy
import functools
import logging
from typing import Any

from orbax.checkpoint._src.serialization import tensorstore_utils

from trainer.checkpoints.disk import of_storage


@functools.cache
def put_right() -> None:
    """For this process, from the next save on."""
    logging.getLogger("absl").addFilter(_says_more_than_ours)
    # TensorStore (0.1.86) never frees the JSON that it makes Python objects of. Orbax asks for some with every array
    # that it writes, the same for all of a folder, and for more with every save, to log its statistics: 45 kB a save.
    build = tensorstore_utils.build_kvstore_tspec
    cached = functools.lru_cache(maxsize=16)(build)

    def build_once(
        directory: str, name: str | None = None, *, use_ocdbt: bool = True, **options: Any
    ) -> dict[str, Any]:
        if not use_ocdbt:
            return build(directory, name, use_ocdbt=False, **options)
        spec = copy.deepcopy(cached(directory, **options))
        return spec if name is None else spec | {"path": name}

    tensorstore_utils.build_kvstore_tspec = build_once
    tensorstore_utils.get_tensorstore_raw_bytes = lambda direction=None: 0


def _says_more_than_ours(record: logging.LogRecord) -> bool:
    """False for Orbax's tracebacks of what storage refused: a dozen for one failure, which has a line of ours."""
    error = record.exc_info[1] if record.exc_info else None
    return not ("orbax" in record.pathname and error is not None and of_storage(error))
