"""Compiles the step by which `inference_budget.Decoder` continues a batch, for a slice that is not here: a process of
its own, as launch/plan/compiler.py says.

    python -m launch.plan.decode.compiler REQUEST RESULT

What is compiled is the decoder's own loop, `inference_budget.generation.decode`, over the CHUNK tokens that it draws
between two looks of the host; a step is its share of that. Without tensor parallelism every chip holds the whole model
and decodes its rows of the batch for itself, by the program of a single chip.
"""

import contextlib
import dataclasses
import math
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, SingleDeviceSharding

from configs import base
from inference_budget import Budgets, find_policy, init_pruned_cache, policy_for_plan
from inference_budget.generation import CHUNK, Sampling, decode
from launch.plan import times
from launch.plan.collectives import Network
from launch.plan.compiler import answer, ask, collective_rows, read_oversized, shortage
from launch.plan.decode.caches import STANDARD, CacheChoice
from launch.plan.decode.parts import MEMORY, part_of
from launch.plan.decode.result import DecodeStep, Slice
from launch.plan.hlo import Program
from launch.plan.result import Json, OversizedStep
from launch.slices import find
from selective_attention import Cache, Selection, Transformer, TransformerConfig, init_cache, partition_spec
from selective_attention.quantised import SCALE_BYTES, check_cache_dtype, is_int8, selecting_dtype
from selective_attention.transformer.decoding import for_decoding
from trainer.mesh import make_mesh


def measure(choice: CacheChoice, batch: int, place: Slice) -> DecodeStep | OversizedStep:
    """What the compiler says of a step of `batch` rows over the slice, a multiple of `place.data`.

    Raises:
      RuntimeError: compiling failed for another reason than memory.
    """
    request = {"choice": dataclasses.asdict(choice), "batch": batch, **dataclasses.asdict(place)}
    result = ask("launch.plan.decode.compiler", request)
    return DecodeStep(**result["step"]) if "step" in result else read_oversized(result["oversized"])


class Arguments(NamedTuple):
    """Of the program, in its order, as shapes on the chips."""

    parameters: Any
    logits: Any
    cache: Cache
    key: Any
    temperature: Any


def _compile(request: Json) -> DecodeStep | OversizedStep:
    choice = _choice(request["choice"])
    place = Slice(request["topology"], request["chips"], request["tensor"])
    topology = find(place.topology)
    mesh = _mesh(topology.describe(1).devices, place)
    with jax.set_mesh(mesh) if place.tensor > 1 else contextlib.nullcontext():
        arguments, steps = _program(choice, request["batch"], place, mesh)
        weights, cache = _bytes(arguments.parameters), _cache_bytes(choice, request["batch"], place, arguments.cache)
        try:
            compiled = jax.jit(steps, donate_argnums=(1, 2)).lower(*arguments).compile()
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            held = {"weights": weights, "cache": cache}
            return OversizedStep(dict(mesh.shape), held, weights, shortage(str(error)))
    memory, text = compiled.memory_analysis(), compiled.as_text()
    if memory is None or text is None:
        raise RuntimeError("the compiler gives no account of its program; is this the libtpu that jax[tpu] pins?")
    formats = Arguments(*compiled.input_formats[0])
    padded_weights = _padded(arguments.parameters, formats.parameters)
    padded_cache = _padded(arguments.cache.layers, formats.cache.layers)
    beside = memory.argument_size_in_bytes - padded_weights - padded_cache
    hbm_bytes = {
        "weights": padded_weights,
        "cache": padded_cache,
        "logits and tokens": beside + memory.output_size_in_bytes - memory.alias_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "program": memory.generated_code_size_in_bytes,
    }
    program = Program(text)
    operations = [dataclasses.replace(o, times=o.times / CHUNK) for o in program.operations()]
    network = Network(dict(mesh.shape), mesh.devices, topology, 1)
    estimate = times.step_times(program, operations, network, Path(request["dump"]), part_of)
    # Of arrays that the compiler copies nearer beforehand, beside other work, it gives no cycles.
    at_least = 1e3 * (weights + cache) / topology.chip.hbm_bandwidth
    waiting = max(0.0, at_least - sum(estimate.milliseconds.values()))
    return DecodeStep(
        hbm_bytes=hbm_bytes,
        weight_bytes=weights,
        cache_bytes=cache,
        needed_bytes=weights + cache,
        step_ms_by_part={**estimate.milliseconds, MEMORY: waiting},
        hidden_collectives_ms=estimate.hidden,
        collectives=collective_rows(estimate.collectives),
    )


def _choice(values: Json) -> CacheChoice:
    """The cache of a request, for a TPU."""
    config = TransformerConfig(**values["config"] | {"attention": "pallas"})  # what None is on a TPU
    return CacheChoice(values["name"], config, Budgets(**values["budgets"]), values["policy"], values["dtype"])


def _mesh(devices: Any, place: Slice) -> Mesh:
    """The chips that a program is for: all of the slice, or the one that decodes for itself."""
    if place.tensor == 1:
        return Mesh(np.array(devices[:1]), ("data",), axis_types=(AxisType.Explicit,))
    return make_mesh(base.Mesh(data=place.data, fsdp=1, context=1, tensor=place.tensor), devices=list(devices))


def _program(choice: CacheChoice, batch: int, place: Slice, mesh: Mesh) -> tuple[Arguments, Any]:
    """The arguments of the decoder's loop, and the loop."""
    import jax

    config = choice.config
    rows = batch if place.tensor > 1 else batch // place.data

    def model() -> Transformer:
        return for_decoding(Transformer(config, rngs=nnx.Rngs(params=0)))

    def arguments() -> Arguments:
        shape = rows, config.vocab_size
        logits_BV = jnp.zeros(shape, jnp.float32, out_sharding=partition_spec(("batch", "vocab"), shape))
        parameters = nnx.split(model())[1]
        return Arguments(parameters, logits_BV, _empty(choice, rows, place), jax.random.key(0), jnp.float32(1.0))

    graph = nnx.split(nnx.eval_shape(model))[0]

    def on_chips(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        spec = jax.P() if x.sharding is None else x.sharding.spec
        sharding = jax.NamedSharding(mesh, spec) if place.tensor > 1 else SingleDeviceSharding(mesh.devices.item(0))
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    def steps(parameters, logits_BV, cache, key, temperature):
        return decode(graph, parameters, logits_BV, cache, key, 0, CHUNK, Sampling(temperature))

    return jax.tree.map(on_chips, jax.eval_shape(arguments)), steps


def _empty(choice: CacheChoice, rows: int, place: Slice) -> Cache:
    """The decoder's cache; of the standard model, where no mesh is needed, the plain one, which asks nobody who is to
    leave a full layer.
    """
    if choice.name == STANDARD and place.tensor == 1:
        return init_cache(choice.config, rows, choice.budgets.context_length, choice.dtype)
    policy = policy_for_plan(find_policy(choice.policy))
    return init_pruned_cache(choice.config, rows, choice.budgets, policy, choice.dtype)


def _bytes(tree: Any) -> int:
    """Of all arrays on one chip, without the padding of tiles."""
    return sum(x.dtype.itemsize * math.prod(x.sharding.shard_shape(x.shape)) for x in jax.tree.leaves(tree))


def _cache_bytes(choice: CacheChoice, batch: int, place: Slice, cache: Cache) -> int:
    """Of the tokens on one chip, whatever the slots' layout adds to them."""
    state = [x for x in jax.tree.leaves(cache.layers) if x.ndim < 4]  # F, positions, scores
    tokens = batch // place.data * choice.budgets.total
    return tokens * token_bytes(choice, place.tensor) + _bytes(state)


def token_bytes(choice: CacheChoice, tensor: int = 1) -> int:
    """Of the keys and values of a token in a layer, on one of so many chips that split the heads."""
    c, dtype = choice.config, check_cache_dtype(choice.dtype, choice.config.dtype)
    of_head = c.head_dim * dtype.itemsize + (SCALE_BYTES if is_int8(dtype) else 0)
    own = c.head_dim * selecting_dtype(dtype, c.dtype).itemsize if c.selection is Selection.OWN_HEAD else 0
    return 2 * c.num_kv_heads // tensor * of_head + own


def _padded(tree: Any, formats: Any) -> int:
    """Bytes of all arrays on one chip in the program's layouts, whose tiles are filled up."""
    total = 0
    for x, form in zip(jax.tree.leaves(tree), jax.tree.leaves(formats), strict=True):
        shape = x.sharding.shard_shape(x.shape)
        sizes = [shape[dimension] for dimension in form.layout.major_to_minor]
        tile = form.layout.tiling[0] if form.layout.tiling else ()
        sizes = [1] * (len(tile) - len(sizes)) + sizes
        for n, side in enumerate(reversed(tile), 1):
            sizes[-n] = -(-sizes[-n] // side) * side
        total += x.dtype.itemsize * math.prod(sizes)
    return total


def weight_bytes(choice: CacheChoice) -> int:
    """Of the whole model in the dtype that it computes in, as the decoder holds it; about, for a first guess."""
    return jnp.dtype(choice.config.dtype).itemsize * choice.config.parameter_counts()["total"]


def row_bytes(choice: CacheChoice) -> int:
    """Of one row's keys, values, positions and logits, about, for a first guess."""
    return choice.budgets.total * (token_bytes(choice) + 8) + 8 * choice.config.vocab_size


if __name__ == "__main__":
    answer(_compile)
