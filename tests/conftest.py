"""Every test sees eight emulated CPU devices. The variables must be set before JAX is imported."""

import os

# Tests spend most of their time in XLA's compiler, which is quicker where it does not optimise machine code.
FLAGS = {"xla_force_host_platform_device_count": 8, "xla_backend_optimization_level": 0}

given = os.environ.get("XLA_FLAGS", "")
os.environ["XLA_FLAGS"] = " ".join([given, *(f"--{k}={v}" for k, v in FLAGS.items() if k not in given)]).strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")
