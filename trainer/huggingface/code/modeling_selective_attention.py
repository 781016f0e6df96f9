"""A transformer with selective attention in PyTorch: "Selective Attention Improves Transformer" (arXiv 2410.02703).

What one token has masked, no later token attends to: `L - F` takes the place of the logits L, where F sums up what head
0 of earlier queries has selected. In decoding F is one number for each token held, and what has the largest F can be
evicted: `SelectiveCache("budgets.json")` holds no more tokens in each layer than that file says.

Shapes: B batch, T new tokens, M columns (held and new tokens), H query heads, K key/value heads, D head width.
"""

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from transformers import Cache, DynamicLayer, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration_selective_attention import SelectiveAttentionConfig

CHUNK = 256  # tokens that a pruned cache takes in at a time: bounds the memory of a long prompt
_CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"


class Columns(NamedTuple):
    """Tokens that a layer attends to, oldest first."""

    keys: Tensor  # [B, K, M, D], rotated at their positions
    values: Tensor  # [B, K, M, D]
    selecting: Tensor  # [B, 1, M, D], keys of the selecting head
    position: Tensor  # int64 [B, M]; -1 for padding
    f: Tensor  # float32 [B, M], F of the next query

    def map(self, function: Any) -> "Columns":
        return Columns(*map(function, self))

    def before(self, new: "Columns") -> "Columns":
        """These columns, then the new ones."""
        axes = (2, 2, 2, 1, 1)
        return Columns(*(torch.cat(pair, axis) for *pair, axis in zip(self, new, axes, strict=True)))

    def newest(self, kept: Tensor, budget: int) -> "Columns":
        """The `kept` [B, M] columns, at most `budget`, in so many slots."""
        position = torch.where(kept, self.position, -1)
        order = position.argsort(dim=1)[:, -budget:]
        slots = order[:, None, :, None]
        heads = (x.gather(2, slots.expand(-1, x.shape[1], -1, x.shape[3])) for x in self[:3])
        return Columns(*heads, position.gather(1, order), self.f.gather(1, order))


class SelectiveLayer(DynamicLayer):
    """What one layer holds: all tokens, or at most `budget`, the current one among them."""

    is_croppable = False

    def __init__(self, budget: int | None = None, policy: str = "selective") -> None:
        super().__init__()
        self.budget, self.policy = budget, policy
        self.columns: Columns | None = None
        self.seen = 0  # columns that came, padding and evicted ones among them

    def hold(self, columns: Columns, num_new: int) -> None:
        self.columns, self.keys, self.values = columns, columns.keys, columns.values
        self.is_initialized = True
        self.seen += num_new

    def get_seq_length(self) -> int:
        return self.seen

    def reset(self) -> None:
        self.columns = self.keys = self.values = None
        self.is_initialized, self.seen = False, 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        self._map(lambda x: x.index_select(0, indices.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map(lambda x: x.repeat_interleave(repeats, dim=0))

    def crop(self, *args: Any) -> None:
        raise NotImplementedError("what a query has selected cannot be taken back: this cache cannot be cropped")

    def offload(self) -> None:
        raise NotImplementedError("this cache is not offloaded; it may be pruned: SelectiveCache('budgets.json')")

    def _map(self, function: Any) -> None:
        if self.columns is not None:
            self.hold(self.columns.map(function), 0)


class SelectiveCache(Cache):
    """Keys, values and F of what each layer holds, at most as many tokens as its budget; made anew for each sequence.

    Args:
      budgets: None for everything; the path of a file of `python -m launch.budgets search`; or tokens per layer.
      policy: who leaves a full layer, "selective" (the largest F), "oldest" or "sinks" (oldest but for the first 4);
        a file says it itself.

    A full layer evicts first and attends then; the first token of a sequence and the current one never leave.
    """

    def __init__(self, budgets: str | Path | list[int] | None = None, policy: str = "selective") -> None:
        self.fingerprint = None
        if isinstance(budgets, str | Path):
            content = json.loads(Path(budgets).read_text())
            if not isinstance(content, dict) or content.get("format") != "inference_budget.Budgets/1":
                raise ValueError(f"{budgets} is no file of `python -m launch.budgets search`")
            self.fingerprint = content["checkpoint"]["fingerprint"]
            budgets, policy = content["budgets"], content["policy"]
        if policy not in ("selective", "oldest", "sinks"):
            raise ValueError(f"policy {policy!r} is not in this file; take selective, oldest or sinks")
        for layer, budget in enumerate(budgets or ()):
            if budget < 2:
                raise ValueError(f"the budget of layer {layer} is {budget}; it must be at least 2")
        self.budgets, self.policy = budgets, policy
        super().__init__(layers=[SelectiveLayer(budget, policy) for budget in budgets or ()])

    def for_model(self, config: SelectiveAttentionConfig) -> "SelectiveCache":
        """This cache, if it is one for the model; an unpruned one then has its layers."""
        if self.fingerprint not in (None, config.fingerprint):
            raise ValueError("these budgets were found for another model; search again for this one")
        if self.budgets is None and not self.layers:
            self.layers = [SelectiveLayer() for _ in range(config.num_hidden_layers)]
        if len(self.layers) != config.num_hidden_layers:
            raise ValueError(f"there are {len(self.layers)} budgets, the model has {config.num_hidden_layers} layers")
        if self.budgets is not None and self.policy == "selective" and config.selection == "off":
            raise ValueError("policy 'selective' needs a selective model; for this one take 'oldest' or 'sinks'")
        return self


def selected(q: Tensor, k: Tensor, position_q: Tensor, position_k: Tensor, selection: str) -> Tensor:
    """S [B, T, M] float32: how much each query [B, T, D] masks each key [B, M, D] for later queries."""
    logits = q.float() @ k.float().transpose(1, 2) * q.shape[-1] ** -0.5
    s = F.leaky_relu(logits, 0.01) if selection == "leaky" else F.relu(logits)
    earlier = position_k <= position_q if selection == "unprotected_self" else position_k < position_q
    first = 0 if selection == "unprotected_bos" else 1
    return torch.where(earlier & (position_k >= first), s, 0.0)


def evicted_at(f: Tensor, position: Tensor, budget: int, policy: str) -> Tensor:
    """int64 [B, M]: the first of the T new queries that no longer sees a column; T if all do. `f` [B, T, M]."""
    batch, num_new, num_columns = f.shape
    index = torch.arange(num_columns, device=f.device)
    rows, gone = torch.arange(batch, device=f.device), torch.full_like(position, num_new)
    for t in range(num_new):
        column = num_columns - num_new + t
        held = (gone == num_new) & (position >= 0) & (index < column)
        may_leave = held & (position >= (min(4, budget - 1) if policy == "sinks" else 1))
        priority = f[:, t] if policy == "selective" else -position.float()
        priority = priority.masked_fill(~may_leave, -math.inf)
        largest = priority == priority.amax(1, keepdim=True)
        oldest = position.masked_fill(~(largest & may_leave), torch.iinfo(position.dtype).max).argmin(1)
        leaves = (held.sum(1) >= budget) & (position[:, column] >= 0)
        gone[rows, oldest] = torch.where(leaves, t, gone[rows, oldest])
    return gone


def attend(
    q: Tensor, q_selecting: Tensor, new: Columns, layer: SelectiveLayer | None, selection: str
) -> tuple[Tensor, Columns]:
    """Attention of T new tokens, q [B, H, T, D] and q_selecting [B, 1, T, D], to themselves and what the layer holds:
    (out [B, H, T, D], what it holds after them).
    """
    columns = new if layer is None or layer.columns is None else layer.columns.before(new)
    num_new, num_columns = q.shape[2], columns.position.shape[1]
    position_q, position_k = new.position[:, :, None], columns.position[:, None]
    visible = (position_k >= 0) & (position_k <= position_q)
    f, after = columns.f[:, None].expand(-1, num_new, -1), columns
    if selection != "off":
        s = selected(q_selecting[:, 0], columns.selecting[:, 0], position_q, position_k, selection)
        f = f + s.cumsum(1) - s  # a choice acts on strictly later queries
        after = columns._replace(f=columns.f + s.sum(1))
    if layer is not None and layer.budget is not None and num_columns > layer.budget:
        gone = evicted_at(f.detach(), columns.position, layer.budget, layer.policy)
        visible = visible & (torch.arange(num_new, device=q.device)[:, None] < gone[:, None])
        after = after.newest(gone == num_new, layer.budget)
    bias = (-f).masked_fill(~visible, torch.finfo(q.dtype).min).to(q.dtype)[:, None]
    return F.scaled_dot_product_attention(q, columns.keys, columns.values, bias, enable_gqa=True), after


def rotated(x: Tensor, angles: Tensor | None) -> Tensor:
    """x [B, heads, T, D] with the pairs (d, d + D / 2) turned by angles [B, T, D / 2]."""
    if angles is None:
        return x
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    x1, x2 = x.float().chunk(2, dim=-1)
    return torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], dim=-1).to(x.dtype)


def rotary_frequencies(config: SelectiveAttentionConfig, device: torch.device) -> Tensor:
    """Radians per position, float32 [D / 2]."""
    half, scaling = config.head_dim // 2, config.rotary_scaling
    frequency = config.rotary_base ** (-torch.arange(half, dtype=torch.float32, device=device) / half)
    if scaling is None:
        return frequency
    if scaling["kind"] == "linear":
        return frequency / scaling["factor"]
    low, high = scaling["low_frequency_factor"], scaling["high_frequency_factor"]
    turns = scaling["original_length"] * frequency / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0, 1)  # Llama 3: what turns often stays, what hardly turns is stretched
    return frequency * (kept + (1 - kept) / scaling["factor"])


class Attention(nn.Module):
    def __init__(self, config: SelectiveAttentionConfig, index: int) -> None:
        super().__init__()
        c, self.index, self.selection, self.width = config, index, config.selection, config.head_dim
        query, key_value = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        self.q_proj = nn.Linear(c.hidden_size, query, bias=False)
        self.k_proj = nn.Linear(c.hidden_size, key_value, bias=False)
        self.v_proj = nn.Linear(c.hidden_size, key_value, bias=False)
        self.o_proj = nn.Linear(query, c.hidden_size, bias=False)
        normed = ["q", "k"]
        if c.selection == "own_head":
            self.q_sel_proj = nn.Linear(c.hidden_size, c.head_dim, bias=False)
            self.k_sel_proj = nn.Linear(c.hidden_size, c.head_dim, bias=False)
            normed += ["q_sel", "k_sel"]
        for name in normed:
            self.add_module(f"{name}_norm", nn.RMSNorm(c.head_dim, c.rms_norm_eps) if c.qk_norm else nn.Identity())

    def project(self, x: Tensor, name: str) -> Tensor:
        return getattr(self, f"{name}_proj")(x).unflatten(-1, (-1, self.width)).transpose(1, 2)

    def forward(self, x: Tensor, position: Tensor, angles: Tensor | None, layer: SelectiveLayer | None) -> Tensor:
        q, k = (rotated(getattr(self, f"{n}_norm")(self.project(x, n)), angles) for n in ("q", "k"))
        q_sel, k_sel = q[:, :1], k[:, :1]
        if self.selection == "own_head":
            q_sel, k_sel = (rotated(getattr(self, f"{n}_norm")(self.project(x, n)), angles) for n in ("q_sel", "k_sel"))
        new = Columns(k, self.project(x, "v"), k_sel, position, torch.zeros_like(position, dtype=torch.float32))
        size = CHUNK if layer is not None and layer.budget is not None else x.shape[1]
        outs = []
        for start in range(0, x.shape[1], size):
            part = slice(start, start + size)
            some = Columns(*(t[:, :, part] for t in new[:3]), *(t[:, part] for t in new[3:]))
            out, columns = attend(q[:, :, part], q_sel[:, :, part], some, layer, self.selection)
            outs.append(out)
            if layer is not None:
                layer.hold(columns, some.position.shape[1])
        return self.o_proj(torch.cat(outs, 2).transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, config: SelectiveAttentionConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, config: SelectiveAttentionConfig, index: int) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, index)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, position: Tensor, angles: Tensor | None, layer: SelectiveLayer | None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), position, angles, layer)
        return x + self.mlp(self.post_attention_layernorm(x))


class SelectiveAttentionPreTrainedModel(PreTrainedModel):
    config_class = SelectiveAttentionConfig
    base_model_prefix = "model"
    _no_split_modules = ["Layer"]  # noqa: RUF012
    _supports_sdpa = True


class SelectiveAttentionModel(SelectiveAttentionPreTrainedModel):
    """Tokens to final hidden states."""

    def __init__(self, config: SelectiveAttentionConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        if config.positions == "learned":
            self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.layers = nn.ModuleList([Layer(config, index) for index in range(config.num_hidden_layers)])
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_init()

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, cache: SelectiveCache | None = None
    ) -> Tensor:
        """[B, T, hidden_size]; `attention_mask` [B, T], or of all tokens so far, is 0 for padding."""
        config, num_new = self.config, input_ids.shape[1]
        if attention_mask is not None and attention_mask.ndim != 2:
            raise ValueError("attention_mask must be [batch, tokens]: masks of pairs are made here, with F")
        real = torch.ones_like(input_ids) if attention_mask is None else attention_mask[:, -num_new:].long()
        held = None if cache is None else cache.layers[0].columns
        start = 0 if held is None else held.position.amax(1, keepdim=True) + 1
        position = torch.where(real > 0, start + real.cumsum(1) - 1, -1)
        x, angles = self.embed_tokens(input_ids), None
        if config.positions == "learned":
            if int(position.max()) >= config.max_position_embeddings:
                raise ValueError(f"this model has positions for {config.max_position_embeddings} tokens, no more")
            x = x + self.embed_positions(position.clamp(min=0))
        else:
            angles = position[:, :, None].float() * rotary_frequencies(config, x.device)
        for index, layer in enumerate(self.layers):
            x = layer(x, position, angles, None if cache is None else cache.layers[index])
        return self.norm(x)


class SelectiveAttentionForCausalLM(SelectiveAttentionPreTrainedModel, GenerationMixin):
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012
    SelectiveCache = SelectiveCache

    def __init__(self, config: SelectiveAttentionConfig) -> None:
        super().__init__(config)
        self.model = SelectiveAttentionModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        cache: Cache | None = None,
        past_key_values: Cache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits [B, T, V] float32. `cache` (or `past_key_values`, its older name) is a SelectiveCache; what else is
        given goes to the loss.
        """
        if kwargs.pop("position_ids", None) is not None:
            raise ValueError("positions are counted from attention_mask; leave position_ids out")
        cache = past_key_values if cache is None else cache
        use_cache = (self.config.use_cache and not self.training) if use_cache is None else use_cache
        if use_cache or cache is not None:
            if not isinstance(cache, SelectiveCache):
                if cache is not None and cache.get_seq_length():
                    raise ValueError(f"{type(cache).__name__} has no F; give a SelectiveCache")
                cache = SelectiveCache()  # `generate` begins with an empty cache of its own
            cache = cache.for_model(self.config)
        hidden = self.model(input_ids, attention_mask, cache)
        logits = self.lm_head(hidden[:, -logits_to_keep:] if logits_to_keep else hidden).float()
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(loss=loss, logits=logits, **{_CACHE: cache})
