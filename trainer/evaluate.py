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
from trainer.step import EvalStep, Metrics


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Mean over all tokens of the batches."""

    loss: float  # nats per token
    tokens: int
    bytes: int  # of text; 0 where there is none
    correct: int | None = None  # tokens that were the model's first choice, where that was counted

    def figures(self) -> dict[str, float]:
        """All that there is, by the names of the metrics."""
        figures = {"loss": self.loss, "perplexity": self.perplexity}
        if self.bytes:
            figures["bits_per_byte"] = self.bits_per_byte
        if self.correct is not None:
            figures["accuracy"] = self.correct / self.tokens
        return figures

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
    sums = {"nll": 0.0, "tokens": 0.0, "bytes": 0.0}
    pending: list[Metrics] = []  # of the batch before

    def read() -> bool:
        """Adds what is pending; whether a host was told to stop."""
        for dispatched in pending:
            values = jax.device_get(dispatched)
            progress()
            for name in values.keys() - {"requests"}:
                sums[name] = sums.get(name, 0.0) + float(values[name])
            if values["requests"][Request.STOP]:
                return True
        return False

    for batch, _ in prefetch(source, range(num_batches), sharding):
        dispatched = eval_step(params, batch, requests())
        if read():
            return None
        pending = [dispatched]
    if read():
        return None
    tokens = int(sums["tokens"])
    correct = int(sums["correct"]) if "correct" in sums else None
    return Evaluation(sums["nll"] / tokens, tokens, int(sums["bytes"]), correct)
