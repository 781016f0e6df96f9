"""The key-value store that all hosts share, JAX's coordination service: no device takes part, any thread may ask.

JAX has no public interface to it; this is the one place that knows the private one.
"""

from typing import Any

import jax
from jax._src import distributed


class KeyValueStore:
    """Strings under keys such as "peers/beat/3". Every call may raise JaxRuntimeError where the coordinator is gone."""

    def __init__(self, client: Any) -> None:
        self._client = client  # JAX's DistributedRuntimeClient

    def put(self, key: str, value: str) -> None:
        """Sets a key, which may be there already."""
        self._client.key_value_set(key, value, allow_overwrite=True)

    def get(self, key: str, timeout_seconds: float) -> str:
        """The value of a key, once it is there.

        Raises:
          TimeoutError: it did not come within `timeout_seconds`.
        """
        try:
            return self._client.blocking_key_value_get(key, int(timeout_seconds * 1000))
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise
            raise TimeoutError(f"{key} did not come within {timeout_seconds:.0f} s") from error

    def by_host(self, prefix: str) -> dict[int, str]:
        """The values of the keys `prefix` + number of a host."""
        return {int(key.rpartition("/")[2]): value for key, value in self._client.key_value_dir_get(prefix)}


def key_value_store() -> KeyValueStore | None:
    """The store that this process shares with the other hosts; None if the process is alone."""
    state = distributed.global_state
    return KeyValueStore(state.client) if state.client is not None and (state.num_processes or 1) > 1 else None
