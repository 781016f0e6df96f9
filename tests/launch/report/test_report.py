"""The report of two tiny runs, trained here."""

import gzip
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from configs import demo
from data import open_dataset, prepare
from data.tokenizer import legible
from launch.report import __main__ as report
from launch.report.page import Curve, SentenceMasks
from tests.support import ROOT
from trainer.export import load_model
from trainer.loop import train
from trainer.metrics.tensorboard import TensorBoardWriter
from trainer.settings import read_settings

TEXT = "the mask of a token grows with every later query that finds it stale so old words fade from view"
HOSTILE = "<script>alert(1)</script> & <b>\"quoted\"</b> 'it' é"
NAMES = {"selective": "<i>selective</i>", "standard": "plain & standard"}


def sentence(generator: random.Random) -> str:
    return " ".join(generator.choices(TEXT.split(), k=generator.randrange(22, 30))).capitalize() + "."


@pytest.fixture(scope="module")
def dataset_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """English-like sentences in records of 64 tokens; the validation text begins with what HTML must escape."""
    folder, generator = tmp_path_factory.mktemp("report_data"), random.Random(0)
    for name, documents in (("train", 400), ("validation", 20)):
        with gzip.open(folder / f"c4-{name}.json.gz", "wt") as stream:
            for _ in range(documents):
                text = f"{HOSTILE}. {sentence(generator)} {sentence(generator)} The end."
                stream.write(json.dumps({"text": text, "timestamp": "", "url": ""}) + "\n")
    options = {"source": "c4", "output": folder / "prepared", "vocab-size": 320, "record-length": 256, "workers": 1}
    prepare.main(["--input", str(folder / "c4-*.json.gz"), *[f"--{name}={value}" for name, value in options.items()]])
    return folder / "prepared"


@pytest.fixture(scope="module")
def runs(dataset_path: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Workdirs of a selective and a standard run of 6 steps."""
    folder = tmp_path_factory.mktemp("runs")
    for variant in NAMES:
        config = demo.get_config(variant)
        config.update_from_flattened_dict(
            {
                "data.path": str(dataset_path),
                "context_length": 128,
                "batch_size": 8,
                "steps": 6,
                "model.width": 1,
                "model.vocab_size": 320,
                "mesh.data": -1,
                "mesh.fsdp": 1,
                "eval.every_steps": 3,
                "eval.batches": 1,
            }
        )
        assert train(read_settings(config), str(folder / variant)) == 0
    return {name: folder / variant for variant, name in NAMES.items()}


@pytest.fixture(scope="module")
def written(runs, dataset_path, tmp_path_factory) -> tuple[str, list[report.RunReport]]:
    """The page and what `write_report` returns."""
    output = tmp_path_factory.mktemp("report") / "new" / "folder"
    reports = report.write_report(runs, dataset_path, output)
    return (output / "index.html").read_text(encoding="utf-8"), reports


class Page(HTMLParser):
    """Elements with their attributes, and the text outside of scripts and styles."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._inside = ""
        self.feed(source)

    def handle_starttag(self, tag, attributes):
        self._inside = tag
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        self._inside = ""

    def handle_data(self, data):
        if self._inside not in ("script", "style"):
            self.text += data

    def count(self, tag: str, css: str) -> int:
        return sum(t == tag and css in (a.get("class") or "").split() for t, a in self.elements)


def test_the_page_tells_the_results_of_both_runs(written, runs):
    page, reports = Page(written[0]), written[1]
    for name, one in zip(runs, reports, strict=True):
        result = json.loads((runs[name] / "result.json").read_text())
        assert (one.name, one.steps, one.train_tokens) == (name, 6, 6 * 8 * 128)
        assert one.perplexity == result["perplexity"]
        for shown in (name, f"{result['perplexity']:.2f}", f"{result['loss']:.4f}", f"{one.parameters:,}"):
            assert shown in page.text


def test_both_runs_have_curves_and_only_the_selective_one_has_masks(written):
    page, reports = Page(written[0]), written[1]
    assert [one.masks is not None for one in reports] == [True, False]
    for one in reports:
        assert one.train_curve.steps == [1, 2, 3, 4, 5, 6]
        assert one.eval_curve.steps == [3, 6]
        assert one.eval_curve.values[-1] == pytest.approx(one.loss, rel=1e-6)
    assert page.count("g", "line") == 3  # a loss curve each, and their difference
    assert page.count("g", "mark") == 6
    assert page.count("svg", "heat") == 1  # one layer
    labels = [attributes["aria-label"] for tag, attributes in page.elements if tag == "svg"]
    assert labels[:2] == ["Loss over training steps", "Difference of the losses over training steps"]
    assert page.count("span", "chip") == len(reports[0].masks.pieces)


def test_text_of_documents_and_names_is_escaped(written):
    source, reports = written
    page = Page(source)
    assert "<script>alert" in reports[0].prompt, "the prompt must be hostile for this test to mean anything"
    assert "<script>alert" not in source
    assert "<i>selective" not in source
    assert reports[0].prompt in page.text
    assert sum(tag == "script" for tag, _ in page.elements) == 3  # two of data, one of code


def test_the_page_needs_no_other_file(written):
    source, _ = written
    assert not re.search(r"https?:|@import|url\(|<link|<img|\bsrc=|\bhref=", source)


def test_the_data_under_the_pointer_is_the_mask(written):
    source, reports = written
    masks_LNN = reports[0].masks.masks
    (mask,) = re.findall(r'<script type="application/json" class=mask>(.*?)</script>', source)
    for i, row in enumerate(json.loads(mask)):
        np.testing.assert_allclose(row, masks_LNN[0, i, : i + 1], atol=0.00501)
    (labels,) = re.findall(r'<script type="application/json" class=tokens>(.*?)</script>', source)
    assert json.loads(labels) == [legible(piece) for piece in reports[0].masks.pieces]


def test_the_sentence_is_one_of_the_validation_text(dataset_path, runs):
    dataset = open_dataset(dataset_path)
    model, _, _ = load_model(str(runs[NAMES["selective"]]))
    tokens = report.choose_sentence(model, dataset, 128)
    assert tokens[0] == dataset.tokenizer().bos_id
    assert 40 <= len(tokens) - 1 <= 60
    text = dataset.tokenizer().decode(tokens.tolist())
    assert re.fullmatch(r"[A-Z].*\.", text)
    with gzip.open(dataset_path.parent / "c4-validation.json.gz", "rt") as stream:
        assert any(text in json.loads(line)["text"] for line in stream)


def test_a_short_context_shows_the_start_of_a_window(dataset_path, runs):
    dataset = open_dataset(dataset_path)
    model, _, _ = load_model(str(runs[NAMES["selective"]]))
    tokens = report.choose_sentence(model, dataset, 16)
    assert len(tokens) == 16
    assert tokens[0] == dataset.tokenizer().bos_id


def test_the_terminal_table_has_a_line_for_each_run(written, runs):
    lines = report.terminal_table(written[1]).splitlines()
    assert len(lines) == 3
    for line, one in zip(lines[1:], written[1], strict=True):
        assert line.startswith(one.name)
        assert f"{one.perplexity:.2f}" in line


@pytest.mark.parametrize("first_step", [4, 1], ids=["from a checkpoint", "from the start"])
def test_a_restarted_run_shows_the_later_value_of_a_step(tmp_path, first_step):
    first = TensorBoardWriter(str(tmp_path / "tensorboard"), 1)
    for step in range(1, 6):
        first.write(step, {"run/loss": 10.0 + step})
    first.close()
    second = TensorBoardWriter(str(tmp_path / "tensorboard"), first_step)
    for step in range(first_step, 8):
        second.write(step, {"run/loss": 20.0 + step})
    second.close()
    curve = report.read_scalar(tmp_path, "run/loss")
    values = [(10 if step < first_step else 20) + step for step in range(1, 8)]
    assert curve == Curve([1, 2, 3, 4, 5, 6, 7], values)
    assert report.read_scalar(tmp_path, "no/such") == Curve([], [])


def test_an_unfinished_run_is_named(dataset_path, tmp_path):
    (tmp_path / "begun").mkdir()
    with pytest.raises(report.ReportError, match=r"run 'mine': no result.json in .*begun .*python -m trainer"):
        report.write_report({"mine": tmp_path / "begun"}, dataset_path, tmp_path / "report")
    assert not (tmp_path / "report").exists()


@pytest.mark.parametrize("written", ["null", "Infinity"])
def test_a_perplexity_beyond_all_numbers_is_read(tmp_path, written):
    (tmp_path / "result.json").write_text(f'{{"perplexity": {written}}}')
    assert report._read_result("mine", tmp_path)["perplexity"] == math.inf


def test_another_vocabulary_is_refused(runs, dataset_path, tmp_path):
    other = shutil.copytree(dataset_path.parent, tmp_path / "copy")
    options = {"source": "c4", "output": other / "other", "vocab-size": 310, "record-length": 256, "workers": 1}
    prepare.main(["--input", str(other / "c4-*.json.gz"), *[f"--{name}={value}" for name, value in options.items()]])
    with pytest.raises(report.ReportError, match=r"has 320 token ids, but the dataset .* has 310"):
        report.write_report(runs, other / "other", tmp_path / "report")


def test_the_command_explains_itself_and_reports_a_missing_workdir(dataset_path, tmp_path):
    def command(*arguments: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, "-m", "launch.report", *arguments],
            cwd=ROOT,
            env=os.environ,
            capture_output=True,
            text=True,
            timeout=300,
        )

    assert "NAME=WORKDIR" in command("--help").stdout
    failed = command(f"--data={dataset_path}", f"--output={tmp_path}", f"mine={tmp_path}/none")
    assert failed.returncode == 2
    assert failed.stderr.startswith("error: run 'mine': no result.json in")
    assert "Traceback" not in failed.stderr


def test_pieces_are_legible():
    shown = {"<s>": "[bos]", "</s>": "[eos]", "<0x0A>": "↵", "<0xE2>": "[E2]", "▁the": "·the", "▁▁": "··", "a": "a"}
    assert {piece: legible(piece) for piece in shown} == shown


def test_a_token_is_forgotten_at_the_first_query_over_one():
    mask_NN = np.zeros((4, 4))
    mask_NN[2:, 1] = [1.0, 1.5]  # exactly 1 is not yet forgotten
    mask_NN[2:, 0] = [1.1, 9.0]
    assert SentenceMasks(list("abcd"), mask_NN[None]).forgotten_at(0) == [2, 3, None, None]


def test_smoothing_is_a_centred_mean_that_narrows_at_the_ends():
    values = np.random.default_rng(0).normal(size=250)
    smoothed = Curve(list(range(250)), values.tolist()).smoothed().values
    for i in (0, 1, 4, 100, 249):
        reach = min(5, i, 249 - i)
        assert smoothed[i] == pytest.approx(values[i - reach : i + reach + 1].mean())


def test_thinning_keeps_the_last_point_and_enough_others():
    curve = Curve(list(range(10_001)), [0.0] * 10_001).thinned()
    assert curve.steps[-1] == 10_000
    assert 600 <= len(curve.steps) <= 700
    assert Curve([5], [1.0]).thinned() == Curve([5], [1.0])
    assert Curve([], []).thinned() == Curve([], [])
