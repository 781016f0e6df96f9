"""What a model's sizes and parameters are called there: as Llama's, whose code most programs know."""

import dataclasses
import re

from selective_attention import TransformerConfig

# As `selective_attention.transformer.interchange` calls parameters, and as Llama does.
_PARTS = {
    "embedding": "model.embed_tokens",
    "position_embedding": "model.embed_positions",
    "final_norm": "model.norm",
    "output": "lm_head",
    "attention.norm": "input_layernorm",
    "attention.query": "self_attn.q_proj",
    "attention.key": "self_attn.k_proj",
    "attention.value": "self_attn.v_proj",
    "attention.out": "self_attn.o_proj",
    "attention.query_norm": "self_attn.q_norm",
    "attention.key_norm": "self_attn.k_norm",
    "attention.query_sel": "self_attn.q_sel_proj",
    "attention.key_sel": "self_attn.k_sel_proj",
    "attention.query_sel_norm": "self_attn.q_sel_norm",
    "attention.key_sel_norm": "self_attn.k_sel_norm",
    "mlp.norm": "post_attention_layernorm",
    "mlp.gate": "mlp.gate_proj",
    "mlp.up": "mlp.up_proj",
    "mlp.down": "mlp.down_proj",
}
_OURS = {theirs: ours for ours, theirs in _PARTS.items()}
# Fields of TransformerConfig, and of Llama's config or, where it has none, of our own there.
FIELDS = {
    "vocab_size": "vocab_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "d_model": "hidden_size",
    "mlp_dim": "intermediate_size",
    "head_dim": "head_dim",
    "max_length": "max_position_embeddings",
    "tied_embeddings": "tie_word_embeddings",
    "selection": "selection",
    "positions": "positions",
    "rotary_base": "rotary_base",
    "qk_norm": "qk_norm",
    "norm_epsilon": "rms_norm_eps",
}


def theirs(name: str) -> str:
    """Llama's name of a parameter."""
    layer, part = re.fullmatch(r"(layers\.\d+\.)?(.+)\.weight", name).groups()  # type: ignore[union-attr]
    return f"{'model.' + layer if layer else ''}{_PARTS[part]}.weight"


def ours(name: str) -> str:
    """The name of one of Llama's parameters here; one that is unknown stays as it is."""
    layer, part = re.fullmatch(r"(?:model\.(layers\.\d+\.))?(.+?)(?:\.weight)?", name).groups()  # type: ignore[union-attr]
    return f"{layer or ''}{_OURS[part]}.weight" if part in _OURS and name.endswith(".weight") else name


def config_fields(config: TransformerConfig) -> dict[str, object]:
    """The fields of `config.json` that say what the model computes."""
    scaling = config.rotary_scaling and dataclasses.asdict(config.rotary_scaling)
    return {theirs: getattr(config, ours) for ours, theirs in FIELDS.items()} | {"rotary_scaling": scaling}
