"""Models of every kind, each beside the folder that `transformers` loads."""

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from selective_attention import Transformer, TransformerConfig
from trainer.huggingface.export import write_folder

os.environ["HF_HUB_OFFLINE"] = "1"
_modules = tempfile.TemporaryDirectory(prefix="hf_modules-")  # to which transformers copies a folder's code
os.environ.setdefault("HF_MODULES_CACHE", _modules.name)

SPECIAL_IDS = {"pad_token_id": 0, "bos_token_id": 2}  # no EOS: generation goes on to the end


class Exported(NamedTuple):
    """A model here and there."""

    ours: Transformer
    theirs: Any
    folder: Path


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Exported]:
    """Makes a model with these fields, or the one that was made before, and loads its export."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torch").set_num_threads(1)
    made: dict[str, Exported] = {}

    def export(**changes: Any) -> Exported:
        key = json.dumps(changes, sort_keys=True)
        if key not in made:
            folder, model = tmp_path_factory.mktemp("export") / "folder", make_model(**changes)
            write_folder(model, folder, {"generation_config.json": json.dumps(SPECIAL_IDS).encode()})
            loaded = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
            made[key] = Exported(model, loaded.eval(), folder)
        return made[key]

    return export


def make_model(**changes: Any) -> Transformer:
    """Sizes that all differ; norm scales that are not one, and large enough that attention is uneven."""
    sizes = {"vocab_size": 47, "num_layers": 2, "num_heads": 4, "d_model": 20, "mlp_dim": 18, "head_dim": 6}
    choices = {"max_length": 96, "dtype": "float32", "attention": "reference"}
    model = Transformer(TransformerConfig(**{**sizes, **choices, **changes}), rngs=nnx.Rngs(params=0))
    generator = np.random.default_rng(0)
    for path, parameter in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        if str(path[-1]).endswith("_norm"):
            parameter[...] = jnp.asarray(generator.uniform(1, 2, parameter.shape), jnp.float32)
    return model
