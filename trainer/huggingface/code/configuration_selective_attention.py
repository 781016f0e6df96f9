"""The hyperparameters of a transformer with selective attention (arXiv 2410.02703)."""

from typing import Any

from transformers import PreTrainedConfig


class SelectiveAttentionConfig(PreTrainedConfig):
    """Sizes have Llama's names; what else there is:

    selection: "paper", "off" (standard attention), or an ablation: "unprotected_bos", "unprotected_self", "leaky",
      "own_head".
    positions: "rotary" or "learned".
    rotary_base: wavelength base of rotary positions.
    rotary_scaling: None, or how rotary frequencies are stretched: {"kind": "linear", "factor": 2.0} or Llama 3's
      {"kind": "llama3", "factor", "low_frequency_factor", "high_frequency_factor", "original_length"}.
    qk_norm: whether queries and keys are RMS-normalised.
    fingerprint: of the model, which budgets name that were found for it.
    """

    model_type = "selective_attention"

    def __init__(
        self,
        vocab_size: int = 8192,
        hidden_size: int = 768,
        intermediate_size: int = 2048,
        num_hidden_layers: int = 12,
        num_attention_heads: int = 12,
        num_key_value_heads: int | None = None,
        head_dim: int = 64,
        max_position_embeddings: int = 512,
        selection: str = "paper",
        positions: str = "rotary",
        rotary_base: float = 10_000.0,
        rotary_scaling: dict[str, Any] | None = None,
        qk_norm: bool = True,
        rms_norm_eps: float = 1e-6,
        tie_word_embeddings: bool = True,
        initializer_range: float = 0.02,
        use_cache: bool = True,
        fingerprint: str | None = None,
        **kwargs: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads or num_attention_heads
        self.head_dim = head_dim
        self.max_position_embeddings = max_position_embeddings
        self.selection = selection
        self.positions = positions
        self.rotary_base = rotary_base
        self.rotary_scaling = rotary_scaling
        self.qk_norm = qk_norm
        self.rms_norm_eps = rms_norm_eps
        self.initializer_range = initializer_range
        self.use_cache = use_cache
        self.fingerprint = fingerprint
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)
