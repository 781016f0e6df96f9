"""Validation loss, exactly once over every token of the batches asked for."""

import dataclasses
import math
from collections.abc import Callable

import jax
from flax import nnx
from jax import Array
from jax.sharding import NamedSharding

from trainer.batches import Rows, prefetch
from trainer.hosts.requests import Request
from trainer.step import EvalStep


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Mean over all tokens of the batches."""

    loss: float  # nats per token
    tokens: int
    bytes: int  # of text

    @property
    def bits_per_byte(self) -> float:
        """All bits of the loss over the bytes of the text: compares tokenizers. EOS costs bits and has no bytes."""
        return self.loss * self.tokens / (math.log(2) * self.bytes)

    @property
    def perplexity(self) -> float:
        """exp(loss); infinite where that is more than a float holds, at a loss above 709."""
        try:
            return math.exp(self.loss)
        except OverflowError:
            return math.inf


def evaluate(
    eval_step: EvalStep,
    params: nnx.State,
    source: Rows,
    num_batches: int,
    sharding: NamedSharding,
    requests: Callable[[], Array],
    progress: Callable[[], object] = lambda: None,
) -> Evaluation | None:
    """Mean loss over the first `num_batches` batches of `source`; None if a host was told to stop meanwhile.

    Sums are kept in float64 on the host, so that the result does not depend on the number of batches before it.
    `requests` gives the array of `trainer.hosts.requests`; `progress` is called after each batch.
    """
    nll, tokens, text_bytes = 0.0, 0, 0
    pending = None
    for batch, _ in prefetch(source, range(num_batches), sharding):
        dispatched = eval_step(params, batch, requests())
        if pending is not None:
            values = jax.device_get(pending)
            nll, tokens = nll + float(values["nll"]), tokens + int(values["tokens"])
            text_bytes += int(values["bytes"])
            progress()
            if values["requests"][Request.STOP]:
                return None
        pending = dispatched
    values = jax.device_get(pending)
    progress()
    if values["requests"][Request.STOP]:
        return None
    nll, tokens = nll + float(values["nll"]), tokens + int(values["tokens"])
    return Evaluation(nll / tokens, tokens, text_bytes + int(values["bytes"]))
