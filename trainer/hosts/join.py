"""Joins the processes of a run: on TPU slices by what the platform says, elsewhere by three environment variables."""

import glob
import logging
import os
import socket
from typing import Any

import jax
from jax._src import distributed

from configs import base
from trainer.errors import ConfigError
from trainer.hosts.key_value import key_value_store
from trainer.hosts.peers import Peers

# Set for every process alike, but PROCESS_ID. `launch/emulate.py` sets them.
VARIABLES = ("COORDINATOR_ADDRESS", "NUM_PROCESSES", "PROCESS_ID")
logger = logging.getLogger("trainer")


def initialize(faults: base.Faults) -> Peers | None:
    """Joins this process to the others, and starts watching them; None if it is alone.

    With COORDINATOR_ADDRESS (host:port of process 0), NUM_PROCESSES and PROCESS_ID in the environment it is one of
    those processes. Otherwise, where there are TPUs, JAX asks the platform (Cloud TPU metadata, or GKE's variables).

    Raises:
      ConfigError: some of the variables are missing, or not numbers.
    """
    given = {name: os.environ[name] for name in VARIABLES if os.environ.get(name)}
    arguments: dict[str, Any] = {}
    if given:
        if missing := [name for name in VARIABLES if name not in given]:
            raise ConfigError(f"{', '.join(given)} in the environment, but not {', '.join(missing)}; set all or none")
        for name in VARIABLES[1:]:
            if not given[name].isdecimal():
                raise ConfigError(f"{name}={given[name]!r} in the environment must be a number")
        address, number, index = given["COORDINATOR_ADDRESS"], int(given["NUM_PROCESSES"]), int(given["PROCESS_ID"])
        if index >= number or ":" not in address:
            raise ConfigError(
                f"COORDINATOR_ADDRESS={address}, NUM_PROCESSES={number}, PROCESS_ID={index}: the address is host:port, "
                "the id less than the number"
            )
        if number == 1:
            return None
        arguments = {"coordinator_address": address, "num_processes": number, "process_id": index}
        # Nobody else is on these devices: skip the search for a cluster.
        arguments["cluster_detection_method"] = "deactivate"
    elif not _has_tpus():
        return None
    # Signals are `trainer.hosts.interrupt`'s; JAX's service would take SIGTERM over.
    jax.config.update("jax_enable_preemption_service", False)
    jax.distributed.initialize(
        **arguments,
        initialization_timeout=faults.start_timeout_seconds,
        # The last resort: `Peers` is quicker, and says who is missing.
        heartbeat_timeout_seconds=2 * faults.peer_timeout_seconds,
        shutdown_timeout_seconds=faults.peer_timeout_seconds,
    )
    state = distributed.global_state
    store = key_value_store()
    if store is None:
        return None
    assert state.coordinator_address is not None
    peers = Peers(store, state.process_id, state.num_processes, state.coordinator_address, socket.gethostname())
    peers.watch(faults.peer_timeout_seconds)
    logger.info("process %d of %d, coordinator %s", state.process_id, state.num_processes, state.coordinator_address)
    return peers


def _has_tpus() -> bool:
    wanted = os.environ.get("JAX_PLATFORMS", "tpu").split(",")
    devices = glob.glob("/dev/accel[0-9]*") + glob.glob("/dev/vfio/[0-9]*")
    return "tpu" in wanted and bool(devices)
