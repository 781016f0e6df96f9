"""What is measured of a model is what a direct computation says."""

import jax
import numpy as np
import pytest
from flax import nnx

from data import open_dataset
from launch.budgets.inputs import read_windows
from launch.study.kinds import KINDS, kinds_of
from launch.study.measure import FORGOTTEN, LATER, measure
from launch.study.text import by_module
from selective_attention import Transformer, TransformerConfig


@pytest.fixture(scope="module")
def dataset(dataset_path):
    return open_dataset(dataset_path)


@pytest.fixture(scope="module")
def model(dataset):
    sizes = {"num_layers": 2, "num_heads": 2, "d_model": 32, "head_dim": 16, "vocab_size": 300, "max_length": 32}
    config = TransformerConfig.from_width(1, **sizes, dtype="float32")
    model = Transformer(config, rngs=nnx.Rngs(params=0))
    model.blocks = jax.tree.map(lambda p: 3 * p, model.blocks)  # so that F is above 1 somewhere
    return model


def _nll(model, inputs, targets):
    log_WNV = np.asarray(jax.nn.log_softmax(model(inputs)), np.float64)
    return -np.take_along_axis(log_WNV, targets[..., None], axis=-1)[..., 0]


def test_losses_by_window_and_position_and_without_half_of_the_context(model, dataset):
    found, windows = measure(model, dataset, 5), read_windows(dataset, "validation", 32, 5)
    nll_WN = _nll(model, windows.inputs, windows.targets)
    np.testing.assert_allclose(found["windows"], nll_WN.mean(axis=1), rtol=1e-5)
    np.testing.assert_allclose(found["by_position"], nll_WN.mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(found["last_quarter"], nll_WN[:, 24:].mean(axis=1), rtol=1e-5)
    second = np.concatenate([windows.inputs[:, :1], windows.inputs[:, 17:]], axis=1)
    nll = _nll(model, second, windows.targets[:, 16:])[:, 8:].mean(axis=1)
    np.testing.assert_allclose(found["half_context"], nll, rtol=1e-5)


def test_shares_of_what_is_forgotten_by_distance_and_kind(model, dataset):
    found, tokens_WN = measure(model, dataset, 3)["forgetting"], read_windows(dataset, "validation", 32, 3).inputs
    masked_LWNN = np.asarray(model.selection_masks(tokens_WN)) > FORGOTTEN
    assert 0 < masked_LWNN.mean() < 1
    for place, low in enumerate(found["distances"]):
        high = [*found["distances"], 32][place + 1]
        pairs = [(i, j) for j in range(1, 32) for i in range(32) if low <= i - j < high]
        for layer in range(2):
            share = np.mean([masked_LWNN[layer][:, i, j] for i, j in pairs])
            assert found["by_distance"][layer][place] == pytest.approx(share)
    kinds = [kinds_of(dataset.tokenizer(), row) for row in tokens_WN]
    for number, kind in enumerate(KINDS):
        of_kind = [(w, j) for w in range(3) for j in range(1, 32 - LATER) if kinds[w][j] == number]
        assert found["kinds"][kind] == len(of_kind)
        if of_kind:
            shares = [np.mean([masked_LWNN[layer][w, j + LATER, j] for w, j in of_kind]) for layer in range(2)]
            assert found["by_kind"][kind] == pytest.approx(shares)


class _Pieces:
    """A tokenizer whose tokens are the places of its pieces."""

    def __init__(self, text):
        self.pieces = text.split("|")

    def piece(self, token):
        return self.pieces[token]


def test_kinds_of_words():
    tokenizer = _Pieces("<s>|▁The|▁mod|el|▁of|▁Ada|▁is|▁42|,|▁model|.|▁Then|▁Ada|▁Lo|ve|lace|▁x_y|\n|▁Cats|▁model")
    kinds = kinds_of(tokenizer, np.arange(len(tokenizer.pieces)))
    first, again = "other word, for the first time", "other word, repeated"
    name, known = "name, for the first time", "name, repeated"
    assert [KINDS[kind] if kind >= 0 else "" for kind in kinds] == [
        "", "function word", first, first, "function word", name, "function word", "number", "punctuation", again,
        "punctuation", "function word", known, name, name, name, name, "", first, again,
    ]  # fmt: skip


def test_a_module_s_documents_in_a_row_become_one():
    names = ["pydoc:a.b", "pydoc:a.b.f", "pydoc:a.b.C", "pydoc:a.c.g", "pydoc:a.c.h", "pydoc:types", "pydoc:topic"]
    assert list(by_module((name, name[6:]) for name in names)) == [
        ("pydoc:a.b", "a.b\n\na.b.f\n\na.b.C"), ("pydoc:a.c.g", "a.c.g\n\na.c.h"),
        ("pydoc:types", "types"), ("pydoc:topic", "topic"),
    ]  # fmt: skip
