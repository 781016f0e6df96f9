"""What is said of numbers that differ by their seed."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np


@dataclasses.dataclass(frozen=True)
class Summary:
    """Of some values.

    Attributes:
      values: All of them.
      mean: Of them.
      sd: With n - 1; nan of one.
      low, high: The 95% interval of the mean by Student's t; nan of one.
    """

    values: tuple[float, ...]
    mean: float
    sd: float
    low: float
    high: float

    @property
    def below_zero(self) -> bool:
        """Whether the whole interval is; never of a single value."""
        return self.high < 0

    @property
    def above_zero(self) -> bool:
        return self.low > 0


def summary(values: Sequence[float]) -> Summary:
    """Of at least one value, each of its own seed."""
    from scipy.stats import t  # seconds

    count, mean = len(values), float(np.mean(values))
    if count < 2:
        return Summary(tuple(values), mean, math.nan, math.nan, math.nan)
    sd = float(np.std(values, ddof=1))
    half = float(t.ppf(0.975, count - 1)) * sd / math.sqrt(count)
    return Summary(tuple(values), mean, sd, mean - half, mean + half)


def factor_summary(values: Sequence[float]) -> Summary:
    """Of factors, which multiply: the geometric mean and its interval; `sd` is that of their logarithms."""
    of = summary([math.log(value) for value in values])
    return Summary(tuple(values), math.exp(of.mean), of.sd, math.exp(of.low), math.exp(of.high))


def paired_windows(one: Sequence[float], other: Sequence[float]) -> tuple[float, float]:
    """The mean of `one` minus `other`, and its standard error, from pairs of windows of the same text."""
    differences = np.subtract(one, other)
    error = float(differences.std(ddof=1)) / math.sqrt(len(differences)) if len(differences) > 1 else math.nan
    return float(differences.mean()), error
