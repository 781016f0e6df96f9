"""Exported models come back the same, and another framework computes the same from them.

`read_with_torch` is independent of the package: it follows the documented names and the definition of the mask only.
"""

import json
import os
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from selective_attention import Transformer, TransformerConfig
from selective_attention.transformer.interchange import export_safetensors, import_safetensors

safetensors = pytest.importorskip("safetensors.flax")

VARIANTS = {
    "paper": {},
    "standard": {"selection": "off"},
    "grouped_own_head": {"selection": "own_head", "num_kv_heads": 2},
    "learned_untied_without_qk_norm": {"positions": "learned", "tied_embeddings": False, "qk_norm": False},
}
each_variant = pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())
TOKENS_BN = np.random.default_rng(0).integers(0, 40, (2, 12), dtype=np.int32)


def make_model(**changes):
    """Sizes that all differ, so that no transposed or swapped matrix fits; norm scales that are not one."""
    sizes = {"vocab_size": 40, "num_layers": 3, "num_heads": 4, "d_model": 20, "mlp_dim": 18, "head_dim": 6}
    config = TransformerConfig(
        **{**sizes, "max_length": 12, "dtype": "float32", "attention": "reference", "remat": "dots", **changes}
    )
    model = Transformer(config, rngs=nnx.Rngs(params=0))
    rng = np.random.default_rng(0)
    for path, parameter in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        if str(path[-1]).endswith("_norm"):
            parameter[...] = jnp.asarray(rng.uniform(1, 2, parameter.shape), jnp.float32)
    return model


def flat(model):
    return {path: np.asarray(p[...]) for path, p in nnx.to_flat_state(nnx.state(model, nnx.Param))}


def test_who_may_read_an_export_is_the_umask_s_choice(tmp_path):
    before = os.umask(0o027)
    try:
        export_safetensors(make_model(), tmp_path / "export")
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "export").iterdir()}
    assert modes == {"config.json": 0o640, "model.safetensors": 0o640}


@each_variant
def test_a_model_comes_back_as_it_was(changes, tmp_path):
    model = make_model(**changes)
    export_safetensors(model, tmp_path / "new" / "folder")
    again = import_safetensors(tmp_path / "new" / "folder", attention="reference", remat="dots")
    assert again.config == model.config
    before, after = flat(model), flat(again)
    assert before.keys() == after.keys()
    for path in before:
        np.testing.assert_array_equal(before[path], after[path])
    axes = [p.axes for _, p in nnx.to_flat_state(nnx.state(again, nnx.Param))]
    assert axes == [p.axes for _, p in nnx.to_flat_state(nnx.state(model, nnx.Param))]


def test_names_and_shapes_are_those_documented(tmp_path):
    export_safetensors(make_model(selection="own_head", num_kv_heads=2, num_layers=1), tmp_path)
    shapes = {name: tensor.shape for name, tensor in safetensors.load_file(tmp_path / "model.safetensors").items()}
    assert shapes == {
        "embedding.weight": (40, 20),
        "final_norm.weight": (20,),
        "layers.0.attention.norm.weight": (20,),
        "layers.0.attention.query.weight": (24, 20),
        "layers.0.attention.key.weight": (12, 20),
        "layers.0.attention.value.weight": (12, 20),
        "layers.0.attention.out.weight": (20, 24),
        "layers.0.attention.query_norm.weight": (6,),
        "layers.0.attention.key_norm.weight": (6,),
        "layers.0.attention.query_sel.weight": (6, 20),
        "layers.0.attention.key_sel.weight": (6, 20),
        "layers.0.attention.query_sel_norm.weight": (6,),
        "layers.0.attention.key_sel_norm.weight": (6,),
        "layers.0.mlp.norm.weight": (20,),
        "layers.0.mlp.gate.weight": (18, 20),
        "layers.0.mlp.up.weight": (18, 20),
        "layers.0.mlp.down.weight": (20, 18),
    }


def test_tensors_of_other_types_are_read_as_float32(tmp_path):
    model = make_model()
    export_safetensors(model, tmp_path)
    tensors = safetensors.load_file(tmp_path / "model.safetensors")
    safetensors.save_file({k: v.astype(jnp.bfloat16) for k, v in tensors.items()}, tmp_path / "model.safetensors")
    for path, value in flat(import_safetensors(tmp_path)).items():
        assert value.dtype == np.float32
        np.testing.assert_allclose(value, flat(model)[path], rtol=2**-8)


class TestRefuses:
    @pytest.fixture
    def folder(self, tmp_path):
        export_safetensors(make_model(), tmp_path)
        return tmp_path

    def edit(self, folder, **changes):
        fields = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(fields | changes))

    def test_a_folder_without_a_model(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"config\.json"):
            import_safetensors(tmp_path)

    def test_another_format(self, folder):
        self.edit(folder, format="llama")
        with pytest.raises(ValueError, match=r"config\.json does not say that its format is"):
            import_safetensors(folder)

    def test_unknown_fields(self, folder):
        self.edit(folder, sliding_window=3)
        with pytest.raises(ValueError, match="unknown fields: sliding_window"):
            import_safetensors(folder)

    @pytest.mark.parametrize("text", ["", "[]", '{"format": "selective_attention.Transformer/1", "num_layers": 2}'])
    def test_a_config_that_was_cut_off(self, folder, text):
        (folder / "config.json").write_text(text)
        with pytest.raises(ValueError, match=r"config\.json (is damaged .*; export the model again|does not say)"):
            import_safetensors(folder)

    @pytest.mark.parametrize("kept", [0, 100, 5000])
    def test_tensors_that_were_cut_off(self, folder, kept):
        os.truncate(folder / "model.safetensors", kept)
        with pytest.raises(ValueError, match=r"model\.safetensors is damaged .*; export the model again"):
            import_safetensors(folder)

    def test_missing_tensors(self, folder):
        self.edit(folder, num_layers=4)
        with pytest.raises(ValueError, match=r"missing: .*layers\.3\.mlp\.up\.weight.*unknown: \[\]"):
            import_safetensors(folder)

    def test_tensors_that_nobody_reads(self, folder):
        self.edit(folder, num_layers=2)
        with pytest.raises(ValueError, match=r"missing: \[\], unknown: .*layers\.2\.mlp\.up\.weight"):
            import_safetensors(folder)

    def test_other_shapes(self, folder):
        self.edit(folder, mlp_dim=19)
        with pytest.raises(ValueError, match=r"is \(\d+, \d+\), but must be \((19, 20|20, 19)\)"):
            import_safetensors(folder)


def test_the_package_can_be_used_without_safetensors(tmp_path):
    program = (
        "import sys; sys.modules['safetensors.flax'] = None\n"
        "from selective_attention.transformer.interchange import import_safetensors\n"
        "try: import_safetensors('.')\n"
        "except ImportError as error: print(error)"
    )
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300).stdout
    assert output == "safetensors is missing: pip install 'selective-attention[interchange]'\n"


def read_with_torch(folder, tokens_BN):
    """Logits [B, N, V] of an exported model in plain PyTorch, with the mask as the paper sketches it."""
    torch = pytest.importorskip("torch")
    linear, silu = torch.nn.functional.linear, torch.nn.functional.silu
    c = json.loads((folder / "config.json").read_text())
    w = pytest.importorskip("safetensors.torch").load_file(folder / "model.safetensors")
    tokens = torch.tensor(tokens_BN, dtype=torch.long)
    batch, length = tokens.shape
    position = torch.arange(length)

    def norm(x, name):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * w[f"{name}.weight"]

    def turn(x):
        angle = position[:, None] / c["rotary_base"] ** (torch.arange(0, c["head_dim"], 2) / c["head_dim"])
        x1, x2 = x.chunk(2, dim=-1)
        return torch.cat([x1 * angle.cos() - x2 * angle.sin(), x1 * angle.sin() + x2 * angle.cos()], dim=-1)

    def heads(h, name, key, turned=True):
        """[B, heads, N, D]"""
        x = linear(h, w[f"{name}.{key}.weight"]).view(batch, length, -1, c["head_dim"]).transpose(1, 2)
        if turned and c["qk_norm"]:
            x = norm(x, f"{name}.{key}_norm")
        return turn(x) if turned and c["positions"] == "rotary" else x

    x = w["embedding.weight"][tokens]
    if c["positions"] == "learned":
        x = x + w["position_embedding.weight"][:length]
    for layer in range(c["num_layers"]):
        name = f"layers.{layer}.attention"
        h = norm(x, f"{name}.norm")
        q, k, v = heads(h, name, "query"), heads(h, name, "key"), heads(h, name, "value", turned=False)
        group, scale = c["num_heads"] // c["num_kv_heads"], c["head_dim"] ** -0.5
        logits = q @ k.repeat_interleave(group, dim=1).transpose(-1, -2) * scale
        logits = logits.masked_fill(position > position[:, None], float("-inf"))
        if c["selection"] != "off":
            selecting = logits[:, 0]
            if c["selection"] == "own_head":
                selecting = (heads(h, name, "query_sel") @ heads(h, name, "key_sel").transpose(-1, -2))[:, 0] * scale
            s = torch.relu(selecting).tril(-1)  # neither the future nor oneself
            s[:, :, 0] = 0  # <BOS>
            f = torch.roll(s, 1, dims=1)  # a choice acts on strictly later queries
            f[:, 0] = 0
            logits = logits - f.cumsum(dim=1)[:, None]
        out = torch.softmax(logits, dim=-1) @ v.repeat_interleave(group, dim=1)
        x = x + linear(out.transpose(1, 2).reshape(batch, length, -1), w[f"{name}.out.weight"])
        name = f"layers.{layer}.mlp"
        h = norm(x, f"{name}.norm")
        gated = silu(linear(h, w[f"{name}.gate.weight"])) * linear(h, w[f"{name}.up.weight"])
        x = x + linear(gated, w[f"{name}.down.weight"])
    return linear(norm(x, "final_norm"), w["embedding.weight" if c["tied_embeddings"] else "output.weight"]).numpy()


@each_variant
def test_torch_computes_the_same_logits_from_the_files(changes, tmp_path):
    model = make_model(**changes)
    export_safetensors(model, tmp_path)
    expected_BNV = np.asarray(model(TOKENS_BN))
    actual_BNV = read_with_torch(tmp_path, TOKENS_BN)
    np.testing.assert_allclose(actual_BNV, expected_BNV, atol=2e-5 * np.abs(expected_BNV).max())
