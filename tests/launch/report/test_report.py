"""The page about several runs, finished and not, and what its numbers are held against: the files themselves."""

import gzip
import json
import re
import shutil
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from data import open_dataset, prepare
from data.tokenizer import legible
from launch.report import __main__ as report
from launch.report.masks import SentenceMasks
from launch.report.run import ReportError, read_run
from launch.report.samples import Sample, choose_sentence, read_samples
from launch.report.tables import differing_fields
from tests.launch.report.conftest import NAMES
from tests.support.runs import points
from trainer.export import load_model


@pytest.fixture(scope="module")
def samples(runs, report_dataset) -> list[Sample]:
    """Of both finished runs."""
    return read_samples([read_run(name, str(path)) for name, path in runs.items()], report_dataset)


@pytest.fixture(scope="module")
def written(runs, report_dataset, samples, tmp_path_factory) -> str:
    """The page of both, with samples."""
    output = tmp_path_factory.mktemp("report") / "new" / "folder"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "read_samples", lambda *_: samples)
        report.write_report(runs, output, dataset_path=report_dataset)
    return (output / "index.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def all_runs(runs, killed, resumed, stopped, diverged) -> dict[str, Path]:
    """One of each kind."""
    others = {"killed": killed, "resumed": resumed, "stopped": stopped, "diverged": diverged}
    return dict(zip(("selective", "standard"), runs.values(), strict=True)) | others


@pytest.fixture(scope="module")
def page_of_all(all_runs, tmp_path_factory) -> str:
    """The page of all of them, without a dataset, against the standard one."""
    folder = tmp_path_factory.mktemp("report_of_all")
    report.write_report(all_runs, folder)
    return (folder / "index.html").read_text(encoding="utf-8")


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


def section(source: str, heading: str) -> str:
    return re.search(rf"<section><h2>{re.escape(heading)}.*?</section>", source, re.DOTALL)[0]


def row(text: str, name: str) -> list[str]:
    """The cells of a run's row in a table."""
    (cells,) = re.findall(rf"<tr><th scope=row><i [^>]*></i>{name}(<td.*?)(?=<tr>|</table>)", text)
    return re.findall(r"<td[^>]*>([^<]*)", cells)


def plots(text: str) -> dict[str, dict]:
    """What the read-outs of a section's charts have, by axis."""
    found = [json.loads(unescape(data)) for data in re.findall(r"data-plot='([^']*)'", text)]
    return {plot["axis"]: {one["name"]: one for one in plot["series"]} | {"last": plot["last"]} for plot in found}


def test_the_result_of_a_finished_run_is_its_files(page_of_all, all_runs):
    for name in ("selective", "standard", "resumed"):
        result = json.loads((all_runs[name] / "result.json").read_text())
        goodput = json.loads((all_runs[name] / "goodput.json").read_text())
        state, loss, perplexity, bits, steps, tokens, _, mfu, good, parameters = row(
            section(page_of_all, "Result"), name
        )
        assert (state, steps, tokens, mfu) == ("finished", "6", f"{6 * 8 * 128:,}", "n/a")
        assert loss == f"{result['loss']:.4f}"
        assert perplexity == f"{result['perplexity']:.2f}" and bits == f"{result['bits_per_byte']:.4f}"
        assert good == f"{goodput['seconds']['steps'] / sum(goodput['seconds'].values()):.1%}"
        assert int(parameters.replace(",", "")) == load_model(str(all_runs[name]))[0].config.parameter_counts()["total"]


def test_runs_that_did_not_finish_say_where_they_are_and_why(page_of_all, all_runs):
    text = section(page_of_all, "Result")
    for name, state in {"killed": "crashed", "stopped": "stopped", "diverged": "crashed"}.items():
        steps, validations = points(all_runs[name], "run/loss"), points(all_runs[name], "run/validation_loss")
        cells = row(text, name)
        assert (cells[0], cells[4]) == (state, f"{max(steps)} of 6")
        assert cells[1] == (f"{validations[max(validations)]:.4f}*" if validations else "")
    shown = Page(page_of_all).text
    assert "killed crashed: ended without a word after step 4: killed, or its machine" in shown
    assert "stopped stopped: interrupted and saved at step 3" in shown
    assert "diverged crashed: DivergedError: loss or gradient was bad in steps" in shown


def test_the_curves_are_the_losses_against_steps_tokens_and_hours(page_of_all, all_runs):
    charts = plots(section(page_of_all, "Loss"))
    assert list(charts) == ["steps", "tokens", "hours"]
    for name, workdir in all_runs.items():
        losses = points(workdir, "run/loss")
        assert charts["steps"][name]["x"] == list(losses)
        assert charts["tokens"][name]["x"] == [step * 8 * 128 for step in losses]
        values = list(losses.values())
        means = [np.mean(values[max(0, i - 1) : i + 2]) if i else values[0] for i in range(len(values))]
        np.testing.assert_allclose(charts["steps"][name]["values"], means, atol=5.1e-5)
        first = json.loads((workdir / "goodput.json").read_text())["first_started_at"]
        hours = [(time - first) / 3600 for time in points(workdir, "run/loss", "time").values()]
        assert charts["hours"][name]["x"] == pytest.approx(hours, abs=1e-4)
    resumed = charts["hours"]["resumed"]["x"]
    assert resumed[3 - 1] - resumed[2 - 1] > 1 / 3600, "the pause between the two processes is seen"


def test_the_difference_is_taken_at_the_same_tokens(page_of_all, all_runs):
    text = section(page_of_all, "Difference to standard")
    theirs, validation = (points(all_runs["standard"], name) for name in ("run/loss", "run/validation_loss"))
    assert not re.search(r"<th scope=row><i [^>]*></i>standard", text)
    for name in ("selective", "killed", "resumed", "stopped", "diverged"):
        differences = [value - theirs[step] for step, value in points(all_runs[name], "run/loss").items()]
        last = [v - validation[step] for step, v in points(all_runs[name], "run/validation_loss").items()]
        cells = row(text, name)
        assert cells[0] == f"{differences[-1]:+.4f}"
        assert cells[1] == (f"{last[-1]:+.4f}" if last else "none")
    assert "resumed has another seed, so it saw other batches" in text and "stopped has another" not in text


def test_a_restart_and_alarms_are_marked_on_the_curve_and_listed(page_of_all):
    loss = section(page_of_all, "Loss")
    assert loss.count("<title>resumed was started again at step 3</title>") == 3, "once for each axis"
    assert loss.count("<title>diverged, steps 2 to 3: 2 updates skipped: loss or gradient was bad</title>") == 3
    assert "Started again at step 3." in section(page_of_all, "Where the time went")
    alarms = section(page_of_all, "Alarms")
    for words in ("rolled back, after too many bad updates in a row", "2 updates skipped: loss or gradient was bad"):
        assert re.search(rf"</i>diverged<td>steps? [\d to]+<td class=words>{words}", alarms)
    assert alarms.count("<tr>") == 3, "two and the headings"


def test_the_bars_are_the_seconds_by_cause(page_of_all, all_runs):
    bars = re.findall(r"<div class=bar>(.*?)</div>", section(page_of_all, "Where the time went"))
    for bar, workdir in zip(bars, all_runs.values(), strict=True):
        seconds = json.loads((workdir / "goodput.json").read_text())["seconds"]
        shown = {title: float(width) for width, title in re.findall(r"width:([\d.]+)%' title='([a-z ]+):", bar)}
        total = sum(seconds.values())
        assert shown == {
            c.replace("_", " "): pytest.approx(100 * s / total, abs=0.006) for c, s in seconds.items() if s
        }


def test_only_the_fields_that_differ_are_shown(page_of_all, all_runs):
    rows = re.findall(r"<tr[^>]*><th scope=row>([\w.]+)", section(page_of_all, "What differs in the configs"))
    assert rows == ["seed", "model.selective", "faults.max_bad_steps", "faults.spike_factor"]
    shown = differing_fields([read_run(name, str(path)) for name, path in all_runs.items()])
    assert shown["model.selective"] == [True, False, True, True, True, True]
    assert shown["seed"] == [0, 0, 1, 1, 0, 0]


def test_what_is_masked_is_shown_for_the_runs_that_select(page_of_all, all_runs):
    text = section(page_of_all, "What is masked, by layer")
    assert re.findall(r"<h3><i [^>]*></i>(\w+)</h3>", text) == ["selective", "killed", "resumed", "diverged"]
    last = re.findall(r"<text x=344 y=[\d.]+>([\d.]+)</text>", text)
    values = [points(all_runs["selective"], f"selection_{name}/layer_00") for name in ("forgotten_fraction", "mean_f")]
    assert last[:2] == [f"{value[6]:.2f}" for value in values]


def test_a_run_alone_has_no_comparison(runs, tmp_path):
    report.write_report({"mine": next(iter(runs.values()))}, tmp_path)
    source = (tmp_path / "index.html").read_text()
    assert "Difference to" not in source and "What differs" not in source
    assert row(section(source, "Result"), "mine")[0] == "finished"


def test_names_choose_the_baseline(all_runs, tmp_path):
    report.write_report(all_runs, tmp_path, baseline="resumed")
    assert "<h2>Difference to resumed" in (tmp_path / "index.html").read_text()
    with pytest.raises(ReportError, match=r"--baseline=mine is none of the runs: selective, standard, killed"):
        report.write_report(all_runs, tmp_path, baseline="mine")


def test_only_the_selective_run_has_masks(written, samples):
    page = Page(written)
    assert [one.masks is not None for one in samples] == [True, False]
    assert page.count("svg", "heat") == 1  # one layer
    assert page.count("span", "chip") == len(samples[0].masks.pieces)


def test_text_of_documents_and_names_is_escaped(written, samples):
    page = Page(written)
    assert "<script>alert" in samples[0].prompt, "the prompt must be hostile for this test to mean anything"
    assert "<script>alert" not in written
    assert "<i>selective" not in written
    assert samples[0].prompt in page.text
    for name in NAMES.values():
        assert name in page.text
    assert sum(tag == "script" for tag, _ in page.elements) == 3  # two of data, one of code


def test_the_page_needs_no_other_file(written, page_of_all):
    for source in (written, page_of_all):
        assert not re.search(r"https?:|@import|url\(|<link|<img|<image|\bsrc=|\bhref=", source)


def test_the_data_under_the_pointer_is_the_mask(written, samples):
    masks_LNN = samples[0].masks.masks
    (mask,) = re.findall(r'<script type="application/json" class=mask>(.*?)</script>', written)
    for i, values in enumerate(json.loads(mask)):
        np.testing.assert_allclose(values, masks_LNN[0, i, : i + 1], atol=0.00501)
    (labels,) = re.findall(r'<script type="application/json" class=tokens>(.*?)</script>', written)
    assert json.loads(labels) == [legible(piece) for piece in samples[0].masks.pieces]


def test_the_sentence_is_one_of_the_validation_text(report_dataset, runs):
    dataset = open_dataset(report_dataset)
    model, _, _ = load_model(str(runs[NAMES["selective"]]))
    tokens = choose_sentence(model, dataset, 128)
    assert tokens[0] == dataset.tokenizer().bos_id
    assert 40 <= len(tokens) - 1 <= 60
    text = dataset.tokenizer().decode(tokens.tolist())
    assert re.fullmatch(r"[A-Z].*\.", text)
    with gzip.open(report_dataset.parent / "c4-validation.json.gz", "rt") as stream:
        assert any(text in json.loads(line)["text"] for line in stream)


def test_a_short_context_shows_the_start_of_a_window(report_dataset, runs):
    dataset = open_dataset(report_dataset)
    model, _, _ = load_model(str(runs[NAMES["selective"]]))
    tokens = choose_sentence(model, dataset, 16)
    assert len(tokens) == 16
    assert tokens[0] == dataset.tokenizer().bos_id


def test_the_dataset_of_another_vocabulary_or_another_text_gives_no_sample(runs, report_dataset, tmp_path):
    folder = report_dataset.parent
    options = {"source": "c4", "record-length": 256, "workers": 1}
    texts = {"vocabulary": ("c4-*", 330), "text": ("c4-train*", 320)}
    shutil.copy(folder / "c4-train.json.gz", tmp_path / "c4-train.json.gz")
    shutil.copy(folder / "c4-train.json.gz", tmp_path / "c4-validation.json.gz")
    shown = [read_run(name, str(path)) for name, path in runs.items()]
    for name, (_, vocab_size) in texts.items():
        source = tmp_path if name == "text" else folder
        flags = options | {"output": tmp_path / name, "vocab-size": vocab_size}
        prepare.main(["--input", str(source / "c4-*.json.gz"), *[f"--{key}={value}" for key, value in flags.items()]])
        for one in read_samples(shown, tmp_path / name):
            expected = "it has 320 token ids, but the dataset .* has 330" if name == "vocabulary" else "another dataset"
            assert re.search(expected, one.trouble) and not one.prompt


def test_the_terminal_table_has_a_line_for_each_run(all_runs):
    lines = report.terminal_table([read_run(name, str(path)) for name, path in all_runs.items()]).splitlines()
    assert len(lines) == 7 and lines[0].startswith("run ")
    for line, (name, workdir) in zip(lines[1:3], all_runs.items(), strict=False):
        assert line.startswith(name)
        assert f"{json.loads((workdir / 'result.json').read_text())['perplexity']:.2f}" in line


def test_the_command_explains_itself_and_reports_mistakes(capsys, tmp_path):
    with pytest.raises(SystemExit) as ended:
        report.main(["--help"])
    assert ended.value.code == 0 and "NAME=WORKDIR" in capsys.readouterr().out
    assert report.main([f"mine={tmp_path}/none", "-o", f"{tmp_path}/page"]) == 2
    said = capsys.readouterr().err
    assert said == f"error: run 'mine': {tmp_path}/none is no workdir of `python -m trainer`: it is not there; " \
        "correct the path\n"  # fmt: skip
    assert not (tmp_path / "page").exists()


def test_pieces_are_legible():
    shown = {"<s>": "[bos]", "</s>": "[eos]", "<0x0A>": "↵", "<0xE2>": "[E2]", "▁the": "·the", "▁▁": "··", "a": "a"}
    assert {piece: legible(piece) for piece in shown} == shown


def test_a_token_is_forgotten_at_the_first_query_over_one():
    mask_NN = np.zeros((4, 4))
    mask_NN[2:, 1] = [1.0, 1.5]  # exactly 1 is not yet forgotten
    mask_NN[2:, 0] = [1.1, 9.0]
    assert SentenceMasks(list("abcd"), mask_NN[None]).forgotten_at(0) == [2, 3, None, None]
