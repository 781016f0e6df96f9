"""Values of all hosts, exchanged through JAX's coordination service: no device takes part, any thread may ask."""

import json
from typing import Any

import jax
from jax._src import distributed  # the service has no public interface for keys and values


def gather(key: str, value: Any, timeout_seconds: float) -> list[Any]:
    """The JSON values that all hosts gave under `key`, which must be new, in the order of hosts.

    Raises:
      TimeoutError: a host did not come within `timeout_seconds`.
    """
    count, index, client = jax.process_count(), jax.process_index(), distributed.global_state.client
    if count == 1 or client is None:
        return [value]
    prefix, milliseconds = f"gather/{key}", int(timeout_seconds * 1000)
    client.key_value_set(f"{prefix}/{index}", json.dumps(value))
    waits_for = "the others"
    try:
        if index == 0:
            values = []
            for host in range(count):
                waits_for = f"host {host}"
                values.append(json.loads(client.blocking_key_value_get(f"{prefix}/{host}", milliseconds)))
            client.key_value_set(f"{prefix}/all", json.dumps(values))
        waits_for = "host 0"
        return json.loads(client.blocking_key_value_get(f"{prefix}/all", milliseconds))
    except jax.errors.JaxRuntimeError as error:
        if "DEADLINE_EXCEEDED" not in str(error):
            raise
        raise TimeoutError(f"waited {timeout_seconds:.0f} s for {waits_for} ({key})") from error
