"""The model's hyperparameters."""

import dataclasses
from typing import Any

import jax.numpy as jnp

from ..implementations import implementation_name
from ..implementations.tpu.rotary import EPSILON
from ..selection import Selection

MACHINE = {"machine": True}  # marks a field


@dataclasses.dataclass(frozen=True)
class RotaryScaling:
    """How rotary frequencies are slowed down, for contexts longer than a model was first trained on.

    "linear" divides all by `factor`. "llama3" leaves those that turn at least `high_frequency_factor` times within
    `original_length` tokens, divides by `factor` those that turn less than `low_frequency_factor` times, and goes
    linearly from one to the other.
    """

    kind: str  # "linear" or "llama3"
    factor: float
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    original_length: int = 8192  # tokens

    def __post_init__(self) -> None:
        if self.kind not in ("linear", "llama3"):
            raise ValueError(f"rotary_scaling.kind must be linear or llama3, got {self.kind!r}")
        if not self.factor > 0 or not self.low_frequency_factor < self.high_frequency_factor:
            raise ValueError(f"rotary_scaling needs a positive factor and low below high frequencies, got {self}")


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """Sizes and choices of a decoder-only transformer; `from_width` gives the paper's ladder.

    Fields marked [open] are not stated by the paper as far as is known; their defaults are this project's choice.
    """

    vocab_size: int  # token ids, 0 .. vocab_size - 1
    num_layers: int
    num_heads: int  # query heads
    d_model: int  # width of the residual stream
    mlp_dim: int  # hidden width of SwiGLU
    max_length: int  # longest context, tokens
    head_dim: int = 64
    num_kv_heads: int = 0  # key/value heads; 0 means as many as query heads
    selection: Selection = Selection.PAPER  # Selection.OFF is the standard transformer
    positions: str = "rotary"  # "rotary" or "learned" [open]
    rotary_base: float = 10_000.0  # wavelength base of rotary positions [open]
    rotary_scaling: RotaryScaling | None = None  # of the frequencies; a dict of its fields becomes one
    norm_epsilon: float = EPSILON  # added to the mean square that RMSNorm divides by
    qk_norm: bool = True  # RMS-normalise queries and keys before the logits
    tied_embeddings: bool = True  # one matrix embeds tokens and gives logits [open]
    dtype: str = "bfloat16"  # of activations and matmuls: "bfloat16" or "float32"; parameters are float32
    # How a machine computes, not what: see `machine_fields`.
    # What the backward pass recomputes: "none", "dots" (all but matmuls) or "block" (whole layers).
    remat: str = dataclasses.field(default="none", metadata=MACHINE)
    # False compiles every layer apart: slower to compile, but a gradient saves the copies into a scan's stacks.
    scan_layers: bool = dataclasses.field(default=True, metadata=MACHINE)
    # Implementation of attention, None for the platform's best.
    attention: str | None = dataclasses.field(default=None, metadata=MACHINE)

    def __post_init__(self) -> None:
        if self.selection not in list(Selection):
            raise ValueError(f"{self.selection!r} is not a valid Selection; choose one of {', '.join(Selection)}")
        object.__setattr__(self, "selection", Selection(self.selection))
        if self.attention is not None:
            implementation_name(self.attention)  # raises, with the names there are
        if isinstance(self.rotary_scaling, dict):
            object.__setattr__(self, "rotary_scaling", RotaryScaling(**self.rotary_scaling))
        object.__setattr__(self, "num_kv_heads", self.num_kv_heads or self.num_heads)
        for field in ("vocab_size", "num_layers", "num_heads", "d_model", "mlp_dim", "max_length", "head_dim"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} must be at least 1, got {getattr(self, field)}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_kv_heads={self.num_kv_heads} must divide num_heads={self.num_heads}")
        choices = {
            "positions": ("rotary", "learned"),
            "dtype": ("bfloat16", "float32", "float64"),
            "remat": ("none", "dots", "block"),
        }
        for field, allowed in choices.items():
            if getattr(self, field) not in allowed:
                raise ValueError(f"{field} must be one of {', '.join(allowed)}; got {getattr(self, field)!r}")
        if not self.norm_epsilon > 0:
            raise ValueError(f"norm_epsilon must be positive, got {self.norm_epsilon}")
        if self.positions == "rotary" and self.head_dim % 2:
            raise ValueError(f"rotary positions need an even head_dim, got {self.head_dim}")

    @classmethod
    def from_width(cls, d: int, *, vocab_size: int, max_length: int, **overrides: Any) -> "TransformerConfig":
        """The paper's ladder (section 4): d layers, d heads of width 64, d_model = 64 d, SwiGLU of 8/3 d_model.

        Args:
          d: the one size parameter; 12 is the paper's 100M model.
          vocab_size, max_length: see the fields.
          **overrides: any other field, or one of those set by d.
        """
        d_model = 64 * d
        mlp_dim = -(-8 * d_model // 3 // 128) * 128 if d_model >= 128 else 128
        sizes: dict[str, Any] = {"num_layers": d, "num_heads": d, "d_model": d_model, "mlp_dim": mlp_dim}
        return cls(vocab_size=vocab_size, max_length=max_length, **{**sizes, **overrides})

    @classmethod
    def machine_fields(cls) -> set[str]:
        """The fields that say how a machine computes, not what: exports and fingerprints leave them out."""
        return {field.name for field in dataclasses.fields(cls) if field.metadata == MACHINE}

    @property
    def fuses_norm_rotary(self) -> bool:
        """Whether QK normalisation and rotary positions are one TPU kernel, as attention is."""
        applies = self.qk_norm and self.positions == "rotary" and self.head_dim % 32 == 0
        return applies and self.norm_epsilon == EPSILON and implementation_name(self.attention) == "pallas"

    @property
    def fuses_swiglu(self) -> bool:
        """Whether TPU kernels do what stands between SwiGLU's matmuls, where their shapes allow it."""
        return self.dtype != "float64" and implementation_name(self.attention) == "pallas"

    def fuses_decoding(self, dtype: Any) -> bool:
        """Whether a TPU kernel decodes, with keys and values of this dtype in the cache."""
        exact = self.dtype != "float64" and jnp.dtype(dtype) in (jnp.int8, jnp.bfloat16, jnp.float32)
        return exact and implementation_name(self.attention) == "pallas"

    def parameter_counts(self) -> dict[str, int]:
        """Parameters by part: embedding, attention, mlp, norms, output (0 if tied), and their total."""
        layer_attention = self.d_model * self.head_dim * (2 * self.num_heads + 2 * self.num_kv_heads)
        if self.selection is Selection.OWN_HEAD:
            layer_attention += 2 * self.d_model * self.head_dim
        layer_norms = 2 * self.d_model + (2 * self.head_dim if self.qk_norm else 0)
        if self.selection is Selection.OWN_HEAD and self.qk_norm:
            layer_norms += 2 * self.head_dim
        counts = {
            "embedding": self.vocab_size * self.d_model
            + (self.max_length * self.d_model if self.positions == "learned" else 0),
            "attention": self.num_layers * layer_attention,
            "mlp": self.num_layers * 3 * self.d_model * self.mlp_dim,
            "norms": self.num_layers * layer_norms + self.d_model,
            "output": 0 if self.tied_embeddings else self.vocab_size * self.d_model,
        }
        return counts | {"total": sum(counts.values())}
