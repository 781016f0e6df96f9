"""Which token leaves when a layer is full: selective attention's own rule, and what it is compared with.

One convention for all: a token arrives, a full layer evicts one of those it holds by what earlier queries made of
them, and only then does the token's query attend. So a query sees at most as many tokens as the budget says, itself
included. <BOS> and the current token never leave, ties go to the oldest. The published H2O, TOVA and StreamingLLM
attend before they evict (their queries see one more), and protect <BOS> only by chance or as a sink; here they all get
the same cache. `Forgotten` alone lets tokens leave a layer that is not full (`shrinks`).

Shape letters: README.md. A policy that evicts per head has a row for each key/value head of a sequence.
"""

import dataclasses
import hashlib
import importlib
import inspect
import math
import sys
from typing import ClassVar, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from selective_attention import Selection, Transformer, TransformerConfig, forgotten_above
from selective_attention.transformer.decoding import layers_of

from .budgets import BudgetsError


class Held(NamedTuple):
    """What one layer holds when a token arrives. Entries of free slots and of <BOS> are ignored."""

    position: Array  # int32 [B, M], of each slot's token
    f: Array | None  # float32 [B, M], F of the arriving token's query; None in a model without selection
    score: Array | None  # float32 [B, M], what `observe` made of the queries so far; None if the policy keeps none
    now: Array  # int32 [B, 1], position of the arriving token
    budget: Array | int  # int32 [B, 1] or one number, tokens that the layer may hold
    layer: Array | int  # its number


class EvictionPolicy(Protocol):
    """A frozen, hashable object: it is compiled into the programs that use it."""

    @property
    def name(self) -> str:
        """What people call it; `policy_name` is what the command line and files do."""
        ...

    @property
    def keeps_score(self) -> bool:
        """Whether slots carry a score, made from attention weights."""
        ...

    @property
    def per_head(self) -> bool:
        """Whether every key/value head evicts for itself."""
        ...

    @property
    def shrinks(self) -> bool:
        """Whether tokens leave a layer that is not full, as `forgets` says."""
        ...

    def priority(self, held: Held) -> Array:
        """Float32 [B, M]: of the tokens that are held, the one with the largest value leaves; -inf protects."""
        ...

    def forgets(self, held: Held) -> Array:
        """Bool [B, M]: who leaves, whether the layer is full or not; asked only of a policy that shrinks."""
        ...

    def observe(self, score_BM: Array, weights_BM: Array) -> Array:
        """The scores after a query whose attention weights, averaged over the heads, were `weights_BM`."""
        ...


class _StaysFull:
    shrinks: ClassVar[bool] = False

    def forgets(self, held: Held) -> Array:
        raise NotImplementedError("this policy never shrinks")


class _Unscored(_StaysFull):
    keeps_score: ClassVar[bool] = False
    per_head: ClassVar[bool] = False

    def observe(self, score_BM: Array, weights_BM: Array) -> Array:
        raise NotImplementedError("this policy keeps no score")


@dataclasses.dataclass(frozen=True)
class Selective(_Unscored):
    """The paper's rule (section 2): the largest F leaves."""

    name: ClassVar[str] = "selective"

    def priority(self, held: Held) -> Array:
        assert held.f is not None  # check_policy has refused such a model
        return held.f


@dataclasses.dataclass(frozen=True)
class Forgotten(Selective):
    """A cache of what is remembered: a token leaves as soon as its F exceeds a threshold, and F only grows.

    In a layer that is full nevertheless the largest F leaves, as by the paper's rule: the budget is a hard limit.

    Attributes:
      above: the threshold, in nats, of all layers or of each; None is the model's own, from its QK norm, beyond which
        float32 cannot see a token: `policy_for` puts it in its place.

    Raises:
      BudgetsError: a threshold that is negative or no number.
    """

    above: tuple[float, ...] | None = None
    shrinks: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for nats in self.above or ():
            if not 0 <= nats < math.inf:
                raise BudgetsError(f"a threshold of {nats}; F is forgotten above a number of nats, 0 or more")

    @property
    def name(self) -> str:  # type: ignore[override]
        numbers = (np.format_float_positional(nats, trim="-") for nats in self.above or ())
        return "-".join([_FORGOTTEN, *numbers])

    def forgets(self, held: Held) -> Array:
        if self.above is None:
            raise BudgetsError("policy 'forgotten' has no threshold yet; take policy_for(policy, model)")
        assert held.f is not None
        above_L = jnp.asarray(self.above, held.f.dtype)
        above = above_L[0] if len(self.above) == 1 else above_L[held.layer]
        return (held.f > above) & (held.position > 0)


@dataclasses.dataclass(frozen=True)
class H2O(_StaysFull):
    """Heavy hitters: the smallest sum of attention weights leaves, among those older than the recent half.

    `normalise` divides the sum by the number of queries that could see the token, which the original does not; its sums
    favour old tokens. In the original every head evicts for itself (`per_head`); in a selective model that is
    undefined, since all heads need F of the tokens that head 0 selects.
    """

    per_head: bool = False
    normalise: bool = False
    keeps_score: ClassVar[bool] = True

    @property
    def name(self) -> str:
        return "h2o" + "-per-head" * self.per_head + "-normalised" * self.normalise

    def priority(self, held: Held) -> Array:
        assert held.score is not None
        score_BM = held.score / (held.now - held.position) if self.normalise else held.score
        recent = jnp.maximum(held.budget // 2, 1)  # the current token is one of them
        return jnp.where(held.position <= held.now - recent, -score_BM, -jnp.inf)

    def observe(self, score_BM: Array, weights_BM: Array) -> Array:
        return score_BM + weights_BM


@dataclasses.dataclass(frozen=True)
class TOVA(_StaysFull):
    """The smallest weight in the last query's attention, averaged over all heads, leaves."""

    name: ClassVar[str] = "tova"
    keeps_score: ClassVar[bool] = True
    per_head: ClassVar[bool] = False

    def priority(self, held: Held) -> Array:
        assert held.score is not None
        return -held.score

    def observe(self, score_BM: Array, weights_BM: Array) -> Array:
        return weights_BM


@dataclasses.dataclass(frozen=True)
class SinksAndWindow(_Unscored):
    """StreamingLLM's choice: the first tokens and the most recent ones stay. Positions stay absolute here."""

    sinks: int = 4  # with smaller budgets, all but the current token

    name: ClassVar[str] = "sinks"

    def priority(self, held: Held) -> Array:
        sinks = jnp.minimum(self.sinks, jnp.asarray(held.budget) - 1)
        return jnp.where(held.position >= sinks, -held.position.astype(jnp.float32), -jnp.inf)


@dataclasses.dataclass(frozen=True)
class OldestFirst(_Unscored):
    """A sliding window, and <BOS>."""

    name: ClassVar[str] = "oldest"

    def priority(self, held: Held) -> Array:
        return -held.position.astype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class Random(_Unscored):
    """Every token has a fixed random priority, so that what is held is a uniform sample of the past."""

    seed: int = 0

    name: ClassVar[str] = "random"

    def priority(self, held: Held) -> Array:
        salt = jnp.asarray(held.layer, jnp.uint32) * jnp.uint32(0x9E3779B9) + jnp.uint32(self.seed)
        x = _mixed(held.position.astype(jnp.uint32) ^ _mixed(salt))
        return (x >> 8).astype(jnp.float32)  # 24 bits, which float32 holds exactly


_FORGOTTEN = "forgotten"
FIXED = (SinksAndWindow, OldestFirst, Random)  # what neither queries nor time change the order of


def _mixed(x: Array) -> Array:
    """A bijection of uint32 whose output bits each depend on all input bits (MurmurHash3's finalizer)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


_ALL: tuple[EvictionPolicy, ...] = (
    Selective(),
    H2O(),
    H2O(normalise=True),
    H2O(per_head=True),
    TOVA(),
    SinksAndWindow(),
    OldestFirst(),
    Random(),
    Forgotten(),
)
POLICIES = {policy.name: policy for policy in _ALL}
_MEMBERS = ("name", "keeps_score", "per_head", "shrinks", "priority", "forgets", "observe")  # of an EvictionPolicy


def find_policy(name: str) -> EvictionPolicy:
    """One of POLICIES, `forgotten-NATS` with a threshold (or one for each layer, with a - between them), or
    `module:Class`, a class of your own that is called without arguments.

    The module is imported, which runs its code.

    Raises:
      BudgetsError: there is no such policy, module or class, or it does not make an EvictionPolicy.
    """
    module, colon, attribute = name.partition(":")
    if not colon:
        if name.startswith(f"{_FORGOTTEN}-"):
            return Forgotten(_thresholds(name))
        if name not in POLICIES:
            raise BudgetsError(
                f"there is no policy {name!r}; take {', '.join(POLICIES)}, or a class of your own as module:Class"
            )
        return POLICIES[name]
    try:
        found = getattr(importlib.import_module(module), attribute, None)
    except (ImportError, ValueError) as error:  # ValueError: it has no name
        raise BudgetsError(
            f"policy {name!r}: {error}; run from the module's folder, or name that in PYTHONPATH"
        ) from error
    if not isinstance(found, type):
        raise BudgetsError(f"policy {name!r}: {module} has no class {attribute!r}; name one as module:Class")
    if missing := [member for member in _MEMBERS if not hasattr(found, member)]:
        raise BudgetsError(
            f"policy {name!r} is no EvictionPolicy: it lacks {', '.join(missing)}; add them to the class"
        )
    try:
        hash(policy := found())
    except TypeError as error:
        raise BudgetsError(
            f"policy {name!r}: {error}; write a frozen dataclass whose fields all have defaults"
        ) from error
    return policy


def _thresholds(name: str) -> tuple[float, ...]:
    try:
        return tuple(map(float, name.split("-")[1:]))
    except ValueError:
        raise BudgetsError(f"policy {name!r}: a threshold is a number of nats, such as in {_FORGOTTEN}-16") from None


def policy_name(policy: EvictionPolicy) -> str:
    """The name that `find_policy` finds this very policy by.

    Raises:
      BudgetsError: there is none, since the policy has other fields than its class gives it by default.
    """
    if _has_name(policy):
        return policy.name
    name = f"{type(policy).__module__}:{type(policy).__name__}"
    if name.startswith("__main__:") or find_policy(name) != policy:  # __main__ is another module the next time
        raise BudgetsError(
            f"no name stands for {policy!r} in a file; make it what a class in a module of yours defaults to"
        )
    return name


def policy_source(policy: EvictionPolicy) -> str | None:
    """The SHA-256 of the source of the module that a policy of one's own is in; None for one of POLICIES, or where
    there is no source.
    """
    if _has_name(policy):
        return None
    try:
        source = inspect.getsource(sys.modules[type(policy).__module__])
    except (OSError, TypeError):  # of a compiled module
        return None
    return hashlib.sha256(source.encode()).hexdigest()


def _has_name(policy: EvictionPolicy) -> bool:
    """Whether it is not of one's own."""
    return type(policy) is Forgotten or POLICIES.get(policy.name) == policy


def policy_for(policy: EvictionPolicy, model: Transformer) -> EvictionPolicy:
    """The policy with all that it takes from the model, whose parameters are at hand (and not traced).

    Raises:
      BudgetsError: as `check_policy`.
    """
    check_policy(policy, model.config)
    if not isinstance(policy, Forgotten) or policy.above is not None:
        return policy
    return dataclasses.replace(policy, above=tuple(map(float, _exact_thresholds(model))))


def policy_for_plan(policy: EvictionPolicy) -> EvictionPolicy:
    """A policy of the same cost that takes nothing from a model's parameters, where there are none."""
    return Forgotten((0.0,)) if isinstance(policy, Forgotten) else policy


@jax.jit
def _exact_thresholds(model: Transformer) -> list[Array]:
    bounds = (block.logit_bound for block in layers_of(model))
    return [forgotten_above(bound, model.config.max_length) for bound in bounds if bound is not None]


def check_policy(policy: EvictionPolicy, config: TransformerConfig) -> None:
    """Raises BudgetsError where the policy is not defined on the model, or is none."""
    if not hasattr(policy, "priority"):
        raise BudgetsError(f"{policy!r} is no eviction policy; take POLICIES[name], with one of {', '.join(POLICIES)}")
    if isinstance(policy, Selective) and config.selection is Selection.OFF:
        raise BudgetsError(
            f"policy {policy.name!r} needs a selective model; this one has no F, and all its tokens would tie"
        )
    if isinstance(policy, Forgotten):
        _check_thresholds(policy, config)
    if policy.per_head and config.selection is not Selection.OFF:
        raise BudgetsError(
            f"policy {policy.name!r} is not defined on a selective model: all heads need head 0's keys, which head 0 "
            "may have evicted while others hold the token; take 'h2o'"
        )


def _check_thresholds(policy: Forgotten, config: TransformerConfig) -> None:
    if policy.above is None and (not config.qk_norm or config.selection is Selection.LEAKY):
        why = "no QK norm bounds this model's logits" if not config.qk_norm else "F may fall again in this model"
        raise BudgetsError(f"policy {policy.name!r}: {why}; give a threshold in nats, such as {_FORGOTTEN}-16")
    if policy.above is not None and len(policy.above) not in (1, config.num_layers):
        raise BudgetsError(
            f"policy {policy.name!r} has {len(policy.above)} thresholds; give one, or one for each of the model's "
            f"{config.num_layers} layers"
        )
