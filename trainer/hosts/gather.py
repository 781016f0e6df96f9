"""Values of all hosts, exchanged through the store that they share: no device takes part, so any thread may."""

import json
from typing import Any

import jax

from trainer.hosts.key_value import key_value_store


class Gatherer:
    """Gathers one value of each host, again and again; all hosts must do so equally often, each in one thread."""

    def __init__(self, name: str, timeout_seconds: float) -> None:
        """`name` tells apart what gathers at the same time; hosts wait `timeout_seconds` for each other."""
        self._name, self._timeout, self._times = name, timeout_seconds, 0

    def gather(self, value: Any, extra_seconds: float = 0) -> list[Any]:
        """The JSON values that all hosts gave, in the order of hosts.

        Raises:
          TimeoutError: a host did not come within the time that hosts wait for each other and `extra_seconds`.
        """
        self._times += 1
        store = key_value_store()
        if store is None:
            return [value]
        key, timeout_seconds = f"{self._name}/{self._times}", self._timeout + extra_seconds
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

    def from_first_host(self, value: Any) -> Any:
        """Host 0's value, for all; what the others see of the same storage may be older."""
        return self.gather(value)[0]
