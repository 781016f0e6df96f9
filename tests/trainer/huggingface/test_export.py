"""What `transformers` computes from an exported folder is what the model computes here, token by token."""

import itertools
import json

import jax.numpy as jnp
import numpy as np
import pytest

from inference_budget import POLICIES, Budgets, generate, save_budgets
from trainer.errors import ConfigError
from trainer.huggingface.export import write_folder

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

VARIANTS = {
    "paper": {},
    "standard": {"selection": "off"},
    "grouped_own_head": {"selection": "own_head", "num_kv_heads": 2},
    "learned_untied_without_qk_norm": {"positions": "learned", "tied_embeddings": False, "qk_norm": False},
    "unprotected_bos": {"selection": "unprotected_bos"},
    "unprotected_self": {"selection": "unprotected_self"},
    "leaky": {"selection": "leaky"},
}
ABLATIONS = ("unprotected_bos", "unprotected_self", "leaky")
each_variant = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in ABLATIONS else name for name in VARIANTS]
)
decoded_variants = pytest.mark.parametrize(
    "name", [name if name == "paper" else pytest.param(name, marks=pytest.mark.slow) for name in list(VARIANTS)[:4]]
)
PROMPTS = [[2, 17, 5, 40, 8, 30, 11, 29, 33, 6, 21, 9], [2, 9, 41, 13, 7]]
BUDGETS = (5, 24)


def logits_there(model, tokens_BN, **options):
    with torch.no_grad():
        return model(torch.from_numpy(np.asarray(tokens_BN, np.int64)), **options).logits.numpy()


def random_tokens(length=40):
    tokens_BN = np.random.default_rng(1).integers(3, 47, (2, length), dtype=np.int32)
    tokens_BN[:, 0] = 2
    return tokens_BN


def padded_left():
    length = max(map(len, PROMPTS))
    rows = [[0] * (length - len(prompt)) + prompt for prompt in PROMPTS]
    mask = [[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in PROMPTS]
    return {"input_ids": torch.tensor(rows), "attention_mask": torch.tensor(mask)}


@each_variant
def test_logits_are_those_of_the_model_here(exported, name):
    model, tokens_BN = exported(**VARIANTS[name]), random_tokens()
    expected = np.asarray(model.ours(jnp.asarray(tokens_BN)))
    np.testing.assert_allclose(logits_there(model.theirs, tokens_BN), expected, atol=1e-4)


@decoded_variants
def test_greedy_continuations_of_prompts_padded_on_the_left_are_those_of_the_model_here(exported, name):
    model = exported(**VARIANTS[name])
    policy = POLICIES["oldest" if name == "standard" else "selective"]
    expected = generate(model.ours, PROMPTS, Budgets.full(2, 96), policy, 64, temperature=0)
    output = model.theirs.generate(**padded_left(), max_new_tokens=64, do_sample=False)
    assert output[:, -64:].tolist() == expected


@decoded_variants
def test_greedy_continuations_with_budgets_are_those_of_the_model_here(exported, name, tmp_path):
    model = exported(**VARIANTS[name])
    budgets, policy = Budgets(BUDGETS, 96), POLICIES["oldest" if name == "standard" else "selective"]
    expected = generate(model.ours, PROMPTS, budgets, policy, 64, temperature=0)
    save_budgets(tmp_path / "budgets.json", model.ours, budgets, policy, checkpoint="here")
    cache = model.theirs.SelectiveCache(tmp_path / "budgets.json")
    output = model.theirs.generate(**padded_left(), past_key_values=cache, max_new_tokens=64, do_sample=False)
    assert output[:, -64:].tolist() == expected
    assert output.tolist() != model.theirs.generate(**padded_left(), max_new_tokens=64, do_sample=False).tolist()
    for layer, budget in zip(cache.layers, BUDGETS, strict=True):  # it holds no more than that
        columns, heads = layer.columns, model.ours.config.num_kv_heads
        assert columns.keys.shape == columns.values.shape == (2, heads, budget, 6)
        assert columns.position.shape == columns.f.shape == (2, budget)
        assert columns.keys.untyped_storage().nbytes() == 2 * heads * budget * 6 * 4


def test_a_prompt_in_parts_with_a_pruned_cache_gives_the_logits_of_one_pass(exported):
    model, tokens_BN = exported(), random_tokens()
    whole = model.theirs.SelectiveCache(list(BUDGETS))
    expected = logits_there(model.theirs, tokens_BN, past_key_values=whole)
    cache = model.theirs.SelectiveCache(list(BUDGETS))
    cuts = [0, 1, 2, 13, 14, 30, 40]
    parts = [logits_there(model.theirs, tokens_BN[:, i:j], past_key_values=cache) for i, j in itertools.pairwise(cuts)]
    np.testing.assert_allclose(np.concatenate(parts, 1), expected, atol=1e-5)


@pytest.mark.slow
def test_sinks_decode_as_they_do_here(exported):
    model = exported(selection="off")
    expected = generate(model.ours, PROMPTS, Budgets(BUDGETS, 96), POLICIES["sinks"], 32, temperature=0)
    cache = model.theirs.SelectiveCache(list(BUDGETS), policy="sinks")
    output = model.theirs.generate(**padded_left(), past_key_values=cache, max_new_tokens=32, do_sample=False)
    assert output[:, -32:].tolist() == expected


def test_beams_keep_their_own_masks(exported):
    model = exported()
    options = {"num_beams": 3, "max_new_tokens": 12, "do_sample": False}
    with_cache = model.theirs.generate(**padded_left(), **options)
    assert with_cache.tolist() == model.theirs.generate(**padded_left(), use_cache=False, **options).tolist()


def test_the_loss_s_gradient_reaches_every_parameter_and_goes_through_the_mask(exported):
    model = exported(selection="own_head", num_kv_heads=2).theirs
    tokens = torch.from_numpy(random_tokens().astype(np.int64))
    model.train()
    try:
        model(tokens, labels=tokens).loss.backward()
        without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum()]
        assert not without  # q_sel_proj acts through F alone
    finally:
        model.zero_grad()
        model.eval()


def test_weights_in_shards_and_in_bfloat16_load(exported, tmp_path):
    model = exported()
    write_folder(model.ours, tmp_path / "new", {}, dtype="bfloat16", shard_bytes=4000)
    assert len(list((tmp_path / "new").glob("model-*.safetensors"))) > 3
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "new", trust_remote_code=True)
    assert loaded.dtype == torch.bfloat16
    for name, parameter in model.theirs.named_parameters():
        assert torch.equal(loaded.get_parameter(name), parameter.bfloat16()), name


def test_a_folder_saved_by_transformers_loads_again(exported, tmp_path):
    model = exported()
    model.theirs.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)
    np.testing.assert_array_equal(logits_there(again, random_tokens()), logits_there(model.theirs, random_tokens()))


def test_a_folder_that_is_not_empty_is_left_alone(exported):
    folder = exported().folder
    before = sorted(folder.iterdir())
    with pytest.raises(ConfigError, match="is there and not empty"):
        write_folder(exported().ours, folder, {})
    assert sorted(folder.iterdir()) == before


def test_caches_that_do_not_fit_are_refused(exported, tmp_path):
    model, standard = exported(), exported(selection="off")
    tokens = torch.tensor(PROMPTS[:1])
    cache_class = model.theirs.SelectiveCache
    save_budgets(
        tmp_path / "other.json", standard.ours, Budgets(BUDGETS, 96), POLICIES["oldest"], checkpoint="standard"
    )
    with pytest.raises(ValueError, match="found for another model"):
        model.theirs(tokens, past_key_values=cache_class(tmp_path / "other.json"))
    with pytest.raises(ValueError, match="there are 3 budgets, the model has 2 layers"):
        model.theirs(tokens, past_key_values=cache_class([4, 4, 4]))
    with pytest.raises(ValueError, match="policy 'tova' is not in this file"):
        cache_class([4, 4], policy="tova")
    with pytest.raises(ValueError, match="budget of layer 1 is 1"):
        cache_class([4, 1])
    with pytest.raises(ValueError, match="needs a selective model"):
        standard.theirs(tokens, past_key_values=standard.theirs.SelectiveCache([4, 4]))
    (tmp_path / "none.json").write_text(json.dumps({"budgets": [4, 4]}))
    with pytest.raises(ValueError, match="is no file of"):
        cache_class(tmp_path / "none.json")
    with pytest.raises(ValueError, match="leave position_ids out"):
        model.theirs(tokens, position_ids=torch.arange(12)[None])
