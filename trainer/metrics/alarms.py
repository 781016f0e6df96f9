"""What a person would want to be told of: one line in the log when it begins, and a scalar while it lasts."""

import json
import logging
import math
import statistics
from collections.abc import Mapping

import jax

from trainer.goodput import Goodput
from trainer.hosts.key_value import key_value_store
from trainer.metrics.writer import MetricsWriter

logger = logging.getLogger("trainer")
SPIKE_Z = 6.0  # standard deviations of the loss above its running mean
DATA_BOUND = 0.1  # share of steps' time that waits for data
SLOW_HOST = 2.0  # times the median host's own time, and
SLOW_HOST_SHARE = 0.1  # of steps' time
LOW_GOODPUT = 0.7  # from
_GOODPUT_FROM_SECONDS = 3_600.0  # of the run on; before, starting takes its share
_MEMORY = 0.99  # how much of the loss' running mean and variance a step keeps
_LEARNING_STEPS = 100  # before a spike is called one
_HOSTS = "steps/own_seconds/"


class Alarms:
    """Of one process. Its idea of a usual loss is its own: it begins anew with each start."""

    def __init__(self, writer: MetricsWriter) -> None:
        self._writer = writer
        self._lasting: set[str] = set()
        self._mean = self._variance = 0.0
        self._steps = self._skipped = 0

    def after_step(self, step: int, metrics: Mapping[str, float]) -> bool:
        """Whether the step was trouble: a loss that is a spike, or an update that was skipped."""
        loss, is_skipped = metrics["loss"], metrics["bad_steps"] > 0
        if is_skipped:
            self._skipped += 1
            self._writer.write(step, {"warning/skipped_updates": self._skipped})
            logger.warning("step %d: skipped, with loss %.4g and gradient norm %.4g", step, loss, metrics["grad_norm"])
        z = self._z(loss)
        is_spike = z > SPIKE_Z
        if is_spike:
            self._writer.write(step, {"warning/loss_spike_z": z})
            logger.warning("step %d: the loss %.4f is %.1f deviations above its mean, %.4f", step, loss, z, self._mean)
        self._learn(loss)
        return is_skipped or is_spike

    def tell_own_time(self, own_seconds: float) -> None:
        """Tells the first host what a step takes this one itself, without waiting for the devices and so for others."""
        store = key_value_store()
        if store is not None:
            store.put(f"{_HOSTS}{jax.process_index()}", json.dumps(own_seconds))

    def look(self, step: int, wait_seconds: float, step_seconds: float, goodput: Goodput) -> None:
        """Every so often, on the first host: means of recent steps."""
        share = wait_seconds / step_seconds
        self._alarm(
            *(step, "data_bound", share, share > DATA_BOUND),
            f"{share:.0%} of a step is waiting for data: read from faster storage, or give the hosts more cores",
        )
        fraction = goodput.fraction()
        is_low = fraction < LOW_GOODPUT and sum(goodput.seconds().values()) > _GOODPUT_FROM_SECONDS
        self._alarm(step, "low_goodput", fraction, is_low, goodput.summary())
        store = key_value_store()
        if store is not None:
            self._compare_hosts(step, {host: json.loads(x) for host, x in store.by_host(_HOSTS).items()}, step_seconds)

    def _compare_hosts(self, step: int, own_seconds: Mapping[int, float], step_seconds: float) -> None:
        host, most = max(own_seconds.items(), key=lambda item: item[1], default=(0, 0.0))
        usual = statistics.median(own_seconds.values()) if own_seconds else 0.0
        self._writer.write(step, {"system/slowest_host_seconds": most, "system/median_host_seconds": usual})
        is_slow = most > SLOW_HOST * usual and most > SLOW_HOST_SHARE * step_seconds
        message = f"host {host} itself takes {most:.3f} s of a step of {step_seconds:.3f} s, the others {usual:.3f} s"
        self._alarm(step, "slow_host", float(host), is_slow, message)

    def _alarm(self, step: int, kind: str, value: float, is_wrong: bool, message: str) -> None:
        if is_wrong:
            self._writer.write(step, {f"warning/{kind}": value})
            if kind not in self._lasting:
                logger.warning("step %d: %s", step, message)
            self._lasting.add(kind)
        else:
            self._lasting.discard(kind)

    def _z(self, loss: float) -> float:
        if self._steps < _LEARNING_STEPS or not math.isfinite(loss):
            return 0.0
        return (loss - self._mean) / max(math.sqrt(self._variance), 1e-6)

    def _learn(self, loss: float) -> None:
        if not math.isfinite(loss):
            return
        weight = max(1 - _MEMORY, 1 / (self._steps + 1))  # a plain mean at first
        difference = loss - self._mean
        self._mean += weight * difference
        self._variance = (1 - weight) * (self._variance + weight * difference**2)
        self._steps += 1
