"""Decoding with a cache of so many tokens a layer.

    python examples/decode_with_budgets.py

The model is untrained, which is enough to see the cache. `selective_attention.import_safetensors(FOLDER)` gives a
trained one, from a folder that `python -m trainer.export` wrote; `python -m launch.budgets search` finds its budgets.
"""

from flax import nnx

from inference_budget import POLICIES, Budgets, Decoder, cache_bytes, init_pruned_cache, memory_factor
from selective_attention import Transformer, TransformerConfig

BOS, LENGTH, NEW_TOKENS = 0, 128, 32
config = TransformerConfig.from_width(2, vocab_size=256, max_length=LENGTH, dtype="float32")
model = Transformer(config, rngs=nnx.Rngs(params=0))
policy = POLICIES["selective"]
full = Budgets.full(config.num_layers, LENGTH)
small = Budgets((24, 16), LENGTH)  # tokens of each layer, <BOS> and the current one included

# Prompts may be longer than a budget, and differ in length.
prompts = [[BOS, *b"selective attention masks what is stale"], [BOS, *b"a shorter prompt"]]
for budgets in (full, small):
    cache = init_pruned_cache(config, len(prompts), budgets, policy)
    factor = memory_factor(cache, LENGTH)
    print(f"{budgets.tokens} tokens a layer: {cache_bytes(cache):,} bytes, {factor:.1f}x less than a full cache")
decoder = Decoder(model, small, policy, bos_id=BOS)
continuations = decoder.generate(prompts, NEW_TOKENS, temperature=0.8)
for prompt, tokens in zip(prompts, continuations, strict=True):
    print(f"after {len(prompt)} tokens: {bytes(tokens)}")
