"""One host of a pod: restores, in a thread as the trainer does, then saves the next step; prints one JSON line.

python restore_and_save.py HOST HOSTS PORT WORKDIR FAILING_HOST
"""

import json
import os
import sys
import threading
from unittest import mock

host, hosts, failing = int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[5])
os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={8 // hosts} --xla_backend_optimization_level=0"
os.environ["JAX_PLATFORMS"] = "cpu"

import jax  # noqa: E402

jax.config.update("jax_enable_preemption_service", False)
jax.distributed.initialize(f"127.0.0.1:{sys.argv[3]}", hosts, host)

from configs import demo  # noqa: E402
from trainer.checkpoints import manager as checkpoint  # noqa: E402
from trainer.checkpoints import saving  # noqa: E402
from trainer.checkpoints.digest import digest  # noqa: E402
from trainer.mesh import make_mesh  # noqa: E402
from trainer.settings import read_settings  # noqa: E402
from trainer.state import abstract_state, init_state  # noqa: E402

config = demo.get_config()
config.update_from_flattened_dict({"context_length": 32, "model.width": 2, "model.vocab_size": 304})
config.update_from_flattened_dict({"checkpoint.timeout_seconds": 60, "mesh.data": 2, "mesh.fsdp": 4})
settings = read_settings(config)
mesh = make_mesh(settings.mesh)
abstract = abstract_state(settings, mesh)
with jax.set_mesh(mesh):
    shardings = jax.tree.map(lambda x: x.sharding, abstract)
    state = jax.jit(lambda: init_state(settings), out_shardings=shardings)()
checkpoints = checkpoint.Checkpoints(sys.argv[4], settings, "fingerprint")
found: list[checkpoint.Restored | None] = []
thread = threading.Thread(target=lambda: found.append(checkpoints.restore(abstract)))
thread.start()
thread.join()
(restored,) = found
step = 0 if restored is None else restored.step
state = state if restored is None else restored.state
if failing == host:  # this host cannot read back what was written, the others know nothing of it
    mock.patch.object(saving, "read_metadata", side_effect=OSError("the storage does not answer")).start()
saving.RETRY_SECONDS = 0.0
checkpoints.save(step + 1, state._replace(step=state.step * 0 + step + 1), {}, None)
checkpoints.wait()
result = {"restored": step, "poll": checkpoints.poll(), "saved": checkpoints.saved_step}
print(json.dumps(result | {"failure": checkpoints.failure, "digest": digest(state)}), flush=True)
checkpoints.close()
