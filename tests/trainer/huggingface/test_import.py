"""Models of Llama's family compute here what they compute in `transformers`, and go back as they came."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from selective_attention import import_safetensors
from trainer import import_hf
from trainer.errors import ConfigError
from trainer.huggingface.export import write_folder
from trainer.huggingface.llama import read_config
from trainer.import_hf import import_folder

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SIZES = {"vocab_size": 61, "hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 4}
SHAPES = {"num_key_value_heads": 2, "max_position_embeddings": 64}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
# Of base 1e4 and width 6 the wavelengths are 6, 135 and 2,916 tokens: of 256 the first turns often, the last hardly.
MODELS = {
    "llama2": ("Llama", {"num_key_value_heads": 4, "rms_norm_eps": 1e-5}),
    "llama3": ("Llama", {"rope_parameters": LLAMA3 | {"original_max_position_embeddings": 256}}),
    "smollm": ("Llama", {"tie_word_embeddings": True, "rms_norm_eps": 1e-5, "rope_parameters": {"rope_theta": 5e5}}),
    "wide_heads": ("Llama", {"head_dim": 10, "num_key_value_heads": 1, "rope_parameters": LINEAR}),
    "mistral": ("Mistral", {"sliding_window": None, "rope_parameters": {"rope_theta": 1e6}}),
    "qwen3": ("Qwen3", {"head_dim": 8, "tie_word_embeddings": True, "rms_norm_eps": 1e-6}),
}
TOKENS_BN = np.random.default_rng(0).integers(0, 61, (2, 48))


def make(name: str, folder: Path, **save):
    """A model with random weights, none of them what they are initialised to, saved in a folder."""
    family, changes = MODELS[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**{**SIZES, **SHAPES, **changes, "dtype": "float32"})
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(folder, **save)
    return model


def logits_of(model):
    with torch.no_grad():
        return model(torch.from_numpy(TOKENS_BN)).logits.numpy()


FAST = ("llama3", "qwen3")


@pytest.mark.parametrize("name", [x if x in FAST else pytest.param(x, marks=pytest.mark.slow) for x in MODELS])
def test_logits_are_those_of_transformers_and_weights_go_back_bit_for_bit(name, tmp_path):
    theirs = make(name, tmp_path / "theirs")
    import_folder(tmp_path / "theirs", tmp_path / "checkpoint")
    ours = import_safetensors(tmp_path / "checkpoint", attention="reference", dtype="float32")
    expected = logits_of(theirs)
    np.testing.assert_allclose(np.asarray(ours(jnp.asarray(TOKENS_BN))), expected, atol=1e-4)
    write_folder(ours, tmp_path / "back", {})
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back", trust_remote_code=True)
    np.testing.assert_allclose(logits_of(back), expected, atol=1e-4)
    before, after = theirs.state_dict(), back.state_dict()
    assert before.keys() == after.keys()
    for parameter in before:
        assert torch.equal(before[parameter], after[parameter]), parameter


def test_shards_in_bfloat16_are_read_to_the_bit(tmp_path):
    theirs = make("llama2", tmp_path / "float32").bfloat16()
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="5KB")
    assert (tmp_path / "theirs" / "model.safetensors.index.json").exists()
    import_folder(tmp_path / "theirs", tmp_path / "checkpoint")
    ours = import_safetensors(tmp_path / "checkpoint")
    assert ours.config.dtype == "bfloat16"
    write_folder(ours, tmp_path / "back", {}, dtype="bfloat16")
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back", trust_remote_code=True).state_dict()
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(back[name], tensor), name


LLAMA = {
    "model_type": "llama",
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "rope_theta": 1e4,
    **SIZES,
    **SHAPES,
    "bos_token_id": 1,
    "torch_dtype": "bfloat16",
    "pretraining_tp": 1,
    "rope_scaling": None,
}


def scaled(**more):
    return {"rope_scaling": {"type": "linear", "factor": 2.0, **more}}


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"model_type": "gemma3"}, "model_type"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"attention_dropout": 0.1}, "attention_dropout"),
        ({"pretraining_tp": 2}, "pretraining_tp"),
        ({"sliding_window": 4096}, "sliding_window"),
        ({"model_type": "mistral"}, "sliding_window"),  # whose default is 4096
        ({"model_type": "qwen3", "head_dim": 8, "use_sliding_window": True}, "use_sliding_window"),
        ({"model_type": "qwen3"}, "head_dim"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_interleaved": True}, "rope_interleaved"),
        ({"num_experts": 8}, "num_experts"),
        ({"logit_scale": 0.5}, "logit_scale"),
        ({"rms_norm_eps": None}, "rms_norm_eps"),
        ({"num_key_value_heads": 3}, "num_kv_heads"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_scaling.rope_type"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 4.0}}, "rope_parameters.rope_type"),
        (scaled(attention_factor=0.9), "rope_scaling.attention_factor"),
        (scaled(partial_rotary_factor=0.5), "rope_scaling.partial_rotary_factor"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_scaling lacks high_freq_factor"),
    ],
)
def test_what_cannot_be_represented_is_refused_by_its_field_s_name(changes, field):
    with pytest.raises(ConfigError, match=rf"config\.json.*\b{field}\b"):
        read_config(LLAMA | changes)


def test_configs_as_older_programs_wrote_them_are_read():
    config = read_config(LLAMA | scaled())
    assert (config.rotary_scaling.kind, config.rotary_scaling.factor, config.rotary_base) == ("linear", 2.0, 1e4)
    assert (config.dtype, config.selection, config.head_dim, config.tied_embeddings) == ("bfloat16", "off", 6, False)


def command(monkeypatch, *arguments: object) -> None:
    monkeypatch.setattr("sys.argv", ["import_hf", *map(str, arguments)])
    import_hf.main()


def test_the_command_takes_the_tokenizer_along_and_says_mistakes_in_one_line(monkeypatch, tmp_path, capsys):
    make("qwen3", tmp_path / "theirs")
    (tmp_path / "theirs" / "tokenizer.json").write_text("{}")
    command(monkeypatch, tmp_path / "theirs", "-o", tmp_path / "checkpoint")
    assert capsys.readouterr().out == f"{tmp_path}/checkpoint\n"
    assert (tmp_path / "checkpoint" / "tokenizer.json").read_text() == "{}"
    (tmp_path / "theirs" / "model.safetensors").rename(tmp_path / "theirs" / "pytorch_model.bin")
    config = json.loads((tmp_path / "theirs" / "config.json").read_text())
    (tmp_path / "empty").mkdir()
    for folder, output, said in [
        ("theirs", "checkpoint", "is there and not empty"),
        ("theirs", "new", "pytorch_model.bin is not read: save the model again as safetensors"),
        ("empty", "new", "config.json cannot be read"),
    ]:
        with pytest.raises(SystemExit, match="2"):
            command(monkeypatch, tmp_path / folder, "-o", tmp_path / output)
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1
    assert not (tmp_path / "new").exists() and config["model_type"] == "qwen3"


def test_tensors_that_do_not_fit_are_named(tmp_path):
    make("llama2", tmp_path / "theirs")
    path = tmp_path / "theirs" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"num_key_value_heads": 2}))
    with pytest.raises(ConfigError, match=r"layers\.0\.attention\.key\.weight in .* is \(24, 24\), but must be \(12"):
        import_folder(tmp_path / "theirs", tmp_path / "new")
    path.write_text(json.dumps(config | {"num_hidden_layers": 1}))
    with pytest.raises(ConfigError, match=r"unknown: \['layers\.1\."):
        import_folder(tmp_path / "theirs", tmp_path / "new")
