"""Options of the TPU compiler for the train step, which JAX hands over with the program: no environment variables.

An option is here only if the compiled program shows what it does, as `python -m launch.plan --hlo=FILE` writes it.
Kinds of devices that are not here are compiled as the compiler does by default.
"""

OPTIONS: dict[str, dict[str, str | bool]] = {
    # By default all-gathers of parameters are synchronous; with these, matmuls stand between their start and their end.
    "TPU v4": {
        "xla_tpu_enable_latency_hiding_scheduler": True,
        "xla_enable_async_all_gather": True,
        "xla_enable_async_collective_permute": True,
    }
}
