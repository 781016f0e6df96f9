"""A small model that selects strongly, and an oracle of eviction in plain Python."""

import math

import jax.numpy as jnp
import numpy as np
from flax import nnx

from inference_budget import Forgotten, Selective
from selective_attention import Selection, Transformer, TransformerConfig

VOCAB, LENGTH = 40, 24


def make_model(seed=0, **changes):
    sizes = {"vocab_size": VOCAB, "num_layers": 2, "num_heads": 4, "d_model": 32, "mlp_dim": 48, "head_dim": 8}
    choices = {"max_length": LENGTH, "dtype": "float32", "attention": "reference"}  # which compiles fastest
    model = Transformer(TransformerConfig(**{**sizes, **choices, **changes}), rngs=nnx.Rngs(params=seed))
    model.blocks.query_norm[...] *= 3
    return model


def make_tokens(seed=0, batch=3, length=LENGTH):
    tokens_BN = np.random.default_rng(seed).integers(3, VOCAB, (batch, length), dtype=np.int32)
    tokens_BN[:, 0] = 2
    return tokens_BN


def oracle_layer(policy, budget, q, k, v, *, selective, layer=0):
    """One sequence, one token at a time, in plain Python: (outputs [N][H][D], {token: query that evicted it}).

    q [N][H][D]; k, v [N][K][D]; what is held is a list of positions, and nothing is masked: what left is not there.
    """
    length, num_heads, width = len(q), len(q[0]), len(q[0][0])
    group = num_heads // len(k[0])

    def dot(a, b):
        return sum(float(x) * float(y) for x, y in zip(a, b, strict=True)) / math.sqrt(width)

    held, gone, outputs = [], {}, []
    forgotten, summed, last = [0.0] * length, [0.0] * length, [0.0] * length
    for i in range(length):
        if isinstance(policy, Forgotten):
            for j in [j for j in held if j and forgotten[j] > policy.above[layer]]:
                held.remove(j)
                gone[j] = i
        if len(held) == budget:
            if isinstance(policy, Selective):
                leaving = {j: forgotten[j] for j in held}
            elif policy.name == "h2o":
                leaving = {j: -summed[j] for j in held if j <= i - max(1, budget // 2)}
            elif policy.name == "tova":
                leaving = {j: -last[j] for j in held}
            elif policy.name == "sinks":
                leaving = {j: -j for j in held if j >= min(4, budget - 1)}
            elif policy.name == "oldest":
                leaving = {j: -j for j in held}
            leaving.pop(0, None)
            most = max(leaving.values())
            who = min(j for j, value in leaving.items() if value == most)
            held.remove(who)
            gone[who] = i
        held.append(i)
        total = dict.fromkeys(held, 0.0)
        output = []
        for h in range(num_heads):
            logits = {j: dot(q[i][h], k[j][h // group]) - (forgotten[j] if selective else 0.0) for j in held}
            top = max(logits.values())
            weights = {j: math.exp(value - top) for j, value in logits.items()}
            norm = sum(weights.values())
            output.append([sum(weights[j] * float(v[j][h // group][d]) for j in held) / norm for d in range(width)])
            for j in held:
                total[j] += weights[j] / norm / num_heads
        outputs.append(output)
        last = [total.get(j, 0.0) for j in range(length)]
        for j in held:
            summed[j] += total[j]
            if 0 < j < i and selective:
                forgotten[j] += max(dot(q[i][0], k[j][0]), 0.0)
    return np.array(outputs), gone


def as_int8_holds(x):
    """Keys or values [..., D] as an int8 cache gives them back, in plain numpy: (their numbers, scales [..., 1])."""
    largest = np.abs(x).max(axis=-1, keepdims=True).astype(np.float32)
    scale = (largest / np.float32(127)).astype(jnp.bfloat16).astype(np.float32)
    return np.clip(np.rint(x / scale), -127, 127).astype(np.float64) * scale, scale


STANDARD = {"selection": Selection.OFF}
