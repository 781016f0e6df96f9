"""README.md of an exported folder: what the model is, how it was trained, what it reached, how to use it."""

import json
from collections.abc import Mapping
from pathlib import Path

from etils import epath

from selective_attention import TransformerConfig
from trainer.settings import Settings

_CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags:
- selective-attention
---

# {title}

A decoder-only transformer with {attention}
([Selective Attention Improves Transformer](https://arxiv.org/abs/2410.02703)), trained in JAX.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(FOLDER)
inputs = tokenizer("Once upon a time", return_tensors="pt")  # <BOS> comes first, as in training
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0], skip_special_tokens=True))
```
{pruned}
{facts}
"""
_PRUNED = """
With the budgets of a search, each layer holds no more tokens than they say:

```python
cache = model.SelectiveCache("budgets.json")  # a new one for each call
model.generate(**inputs, past_key_values=cache, max_new_tokens=50)
```
"""


def model_card(title: str, config: TransformerConfig, facts: Mapping[str, Mapping[str, object]]) -> str:
    """The card's text; `facts` are tables by their headings."""
    attention = "standard attention" if config.selection == "off" else f"selective attention (`{config.selection}`)"
    counts = config.parameter_counts()
    model = {
        "parameters": f"{counts['total']:,}, of which {counts['embedding'] + counts['output']:,} embed tokens",
        "layers, heads, width": f"{config.num_layers}, {config.num_heads}, {config.d_model}",
        "key/value heads, head width": f"{config.num_kv_heads}, {config.head_dim}",
        "context": f"{config.max_length} tokens",
        "vocabulary": f"{config.vocab_size:,} ids",
    }
    tables = [_table(heading, rows) for heading, rows in {"Model": model, **facts}.items() if rows]
    pruned = "" if config.selection == "off" else _PRUNED
    return _CARD.format(title=title, attention=attention, pruned=pruned, facts="\n".join(tables))


def run_facts(workdir: str, settings: Settings, step: int, fingerprint: str) -> dict[str, dict[str, object]]:
    """What a run's config and its `result.json` say, if that is about the step that is exported."""
    optimizer = settings.optimizer
    training = {
        "updates": f"{step:,} of {settings.steps:,}",
        "tokens": f"{step * settings.batch_size * settings.context_length:,}",
        "batch": f"{settings.batch_size} sequences of {settings.context_length} tokens",
        "AdamW": f"peak rate {optimizer.peak_lr}, {optimizer.warmup_steps} warm-up updates, then a cosine",
        "memory loss": settings.memory_loss.epsilon or "none",
        "seed": settings.seed,
        "dataset": f"fingerprint `{fingerprint}`",
    }
    try:
        result = json.loads(epath.Path(workdir, "result.json").read_text())
    except (OSError, ValueError):  # the run is not finished
        result = {}
    results = {} if result.get("steps") != step else {f"validation {name}": result[name] for name in result}
    results.pop("validation steps", None)
    return {"Training": training, "Results": results}


def _table(heading: str, rows: Mapping[str, object]) -> str:
    lines = [f"| {name} | {value} |" for name, value in rows.items()]
    return "\n".join([f"## {heading}\n", "| | |", "|---|---|", *lines, ""])


def title_of(folder: str) -> str:
    """A name for the model that came from this folder."""
    return Path(folder.rstrip("/")).resolve().name or "model"
