"""Hugging Face transformers' decoding with a static cache, timed; `benchmarks/decode.py --peer PYTHON` runs it.

    pip install torch transformers        # in an environment of its own
    python benchmarks/peers/transformers_decode.py --batch 32

A Llama of the size of our d = 12, eager, float32, N = 2,048. Prints a JSON object: the median seconds a step.
"""

import argparse
import json
import statistics
import time

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

LENGTH = 2_048

parser = argparse.ArgumentParser()
parser.add_argument("--batch", type=int, required=True)
parser.add_argument("--layers", type=int, default=12)
parser.add_argument("--steps", type=int, default=24, help="steps that are timed")
options = parser.parse_args()
config = LlamaConfig(
    vocab_size=8_192,
    hidden_size=768,
    intermediate_size=2_048,
    num_hidden_layers=options.layers,
    num_attention_heads=12,
    max_position_embeddings=LENGTH,
    tie_word_embeddings=True,
)
model = LlamaForCausalLM(config).eval()
cache = StaticCache(config=config, max_cache_len=LENGTH)
tokens = torch.full((options.batch, 1), 5)
times = []
with torch.no_grad():
    for n in range(options.steps + 2):
        start = time.perf_counter()
        position = torch.tensor([LENGTH // 2 + n])
        logits = model(
            tokens, past_key_values=cache, position_ids=position[None].expand(options.batch, 1), cache_position=position
        ).logits
        tokens = logits[:, -1].argmax(-1, keepdim=True)
        times.append(time.perf_counter() - start)
size = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
print(json.dumps({"version": transformers.__version__, "seconds": statistics.median(times[2:]), "bytes": size}))
