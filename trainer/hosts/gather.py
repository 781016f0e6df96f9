"""Values of all hosts, exchanged through the store that they share."""

import json
from typing import Any

import jax

from trainer.hosts.key_value import shared_store


def gather(key: str, value: Any, timeout_seconds: float) -> list[Any]:
    """The JSON values that all hosts gave under `key`, which must be new, in the order of hosts.

    Raises:
      TimeoutError: a host did not come within `timeout_seconds`.
    """
    store = shared_store()
    if store is None:
        return [value]
    index, prefix = jax.process_index(), f"gather/{key}"
    store.put(f"{prefix}/{index}", json.dumps(value))
    waits_for = "host 0"
    try:
        if index == 0:
            values = []
            for host in range(jax.process_count()):
                waits_for = f"host {host}"
                values.append(json.loads(store.get(f"{prefix}/{host}", timeout_seconds)))
            store.put(f"{prefix}/all", json.dumps(values))
            return values
        return json.loads(store.get(f"{prefix}/all", timeout_seconds))
    except TimeoutError as error:
        raise TimeoutError(f"waited {timeout_seconds:.0f} s for {waits_for} ({key})") from error
