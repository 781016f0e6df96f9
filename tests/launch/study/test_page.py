"""The page says what a direct computation from the runs' files says, and what is missing."""

import html as html_module
import json
import math
import re
import statistics
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from scipy.stats import t

from launch.study import __main__ as study
from launch.study.cells import PRESETS, paper_runs
from launch.study.claims import NOT_SHOWN, NOT_TESTABLE, SHOWN, verdicts
from launch.study.losses import context_blocks, loss_blocks
from launch.study.measure import write_json
from launch.study.memory import memory_blocks
from launch.study.page import Figure, Table
from launch.study.record import collect
from launch.study.write import page_blocks
from tests.launch.study.conftest import write_run, write_search


def _record(folder, expected=()):
    return collect([str(folder)], expected, "python -m launch.study", [])


def _rows(blocks):
    return {row[0]: row[1:] for block in blocks if isinstance(block, Table) for row in block.rows}


def _numbers(text):
    return [float(number) for number in re.findall(r"[+-]?\d+\.\d+", text)]


def test_differences_are_paired_by_seed_with_student_s_interval(written, tmp_path):
    rows = _rows(loss_blocks(_record(tmp_path / "runs"))[2:])
    tables = [block for block in loss_blocks(_record(tmp_path / "runs")) if isinstance(block, Table)]
    assert _numbers(rows["standard"][2])[0] == pytest.approx(_mean_of(written, "standard"), abs=5e-5)
    of = {row[0]: row[1:] for row in tables[1].rows}
    for variant, title in (("selective", "selective"), ("memory", "selective + memory loss")):
        ours = [written[variant][s]["result"]["loss"] - written["standard"][s]["result"]["loss"] for s in (1, 2)]
        mean, sd = statistics.mean(ours), statistics.stdev(ours)
        half = t.ppf(0.975, 1) * sd / math.sqrt(2)
        each, said_mean, said_sd, interval, bits, windows = of[title]
        assert _numbers(each) == pytest.approx(ours, abs=5e-5)
        assert float(said_mean) == pytest.approx(mean, abs=5e-5) and float(said_sd) == pytest.approx(sd, abs=5e-5)
        assert _numbers(interval) == pytest.approx([mean - half, mean + half], abs=5e-5)
        assert float(bits) == pytest.approx(mean / 2, abs=5e-5)
        pairs = np.subtract(*(written[v][1]["measured"]["windows"] for v in (variant, "standard")))
        expected = [pairs.mean(), pairs.std(ddof=1) / math.sqrt(len(pairs))]
        assert _numbers(windows) == pytest.approx(expected, abs=5e-5)


def _mean_of(written, variant):
    return statistics.mean(run["result"]["loss"] for run in written[variant].values())


def test_what_context_is_worth_is_the_loss_without_it_minus_the_loss_with_it(written, tmp_path):
    rows = _rows(context_blocks(_record(tmp_path / "runs")))
    name = next(name for name in rows if name.startswith("standard, N"))
    ours = [written["standard"][s]["measured"] for s in (1, 2)]
    expected = [statistics.mean(m["half_context"]) - statistics.mean(m["last_quarter"]) for m in ours]
    assert _numbers(rows[name][2]) == pytest.approx(expected, abs=5e-5)
    quarters = np.mean([m["by_position"] for m in ours], axis=0).reshape(4, -1).mean(axis=1)
    assert [float(cell) for cell in rows[name][:2]] == pytest.approx(quarters[2:].tolist(), abs=5e-5)


def test_memory_factors_are_those_of_the_searches_and_1_where_the_target_is_out_of_reach(written, tmp_path):
    workdir = written["memory"][2]["workdir"] / "study"
    (workdir / "budgets-selective.json").unlink()
    (workdir / "budgets-selective.json.unreached").write_text("the target is out of reach\n")
    rows = _rows(memory_blocks(_record(tmp_path / "runs")))
    assert rows["selective"][:2] == ["8.00, 16.00", "11.31"]  # the root of 128
    half = t.ppf(0.975, 1) * math.log(2) / 2
    assert _numbers(rows["selective"][2]) == pytest.approx(
        [11.3137 / math.exp(half), 11.3137 * math.exp(half)], abs=0.01
    )
    assert rows["selective + memory loss"][0] == "16.00, 1.00"
    assert rows["standard: window"][0] == "2.00, 4.00"
    assert rows["selective"][3] == "-0.0100 ± 0.0010, -0.0200 ± 0.0010"


def _write_longer_and_with_memory_loss(folder):
    """Models at twice the context whose factor is larger, of a standard one that looks back or not as the first does,
    and one with the memory loss.
    """
    write_search(write_run(folder, "memory", "toy,memory", 1)["workdir"], "selective", 16.0, 0.0)
    write_search(write_run(folder, "n1024-selective", "toy,n1024", 1)["workdir"], "selective", 32.0, 0.0)
    write_run(folder, "n1024-standard", "toy,standard,n1024", 1)


def test_verdicts_follow_from_the_numbers(tmp_path):
    runs = {name: [write_run(tmp_path, name, f"toy{',standard' * (name == 'standard')}", seed) for seed in (1, 2)]
            for name in ("standard", "selective")}  # fmt: skip

    def set_losses(name, *values):
        for run, value in zip(runs[name], values, strict=True):
            result = run["workdir"] / "result.json"
            result.write_text(re.sub(r'"loss": [\d.]+', f'"loss": {value}', result.read_text()))

    def verdict(beginning):
        return next(v.verdict for v in verdicts(_record(tmp_path)) if v.claim.startswith(beginning))

    set_losses("standard", 4.0, 4.1)
    for losses, expected in (((3.9, 4.0001), SHOWN), ((3.9, 4.09), NOT_SHOWN), ((4.1, 4.2), NOT_SHOWN)):
        set_losses("selective", *losses)
        assert verdict("Selective attention has a lower loss") == expected
    memory = "At the standard model's perplexity it needs"
    about_memory = (memory, "With the memory loss the factor", "The factor grows with the context")
    assert verdict(memory) == NOT_TESTABLE
    _write_longer_and_with_memory_loss(tmp_path)
    standard = [*(run["workdir"] for run in runs["standard"]), tmp_path / "n1024-standard-1"]
    for ours, theirs, above, expected in ((8, 2, 0.0, SHOWN), (2, 8, 0.0, NOT_SHOWN), (8, 2, 0.01, NOT_SHOWN)):
        for workdir in standard:
            measured = json.loads((workdir / "study/measured.json").read_text())
            write_json(workdir / "study/measured.json", measured | {"half_context": [5.0], "last_quarter": [4.0]})
        write_search(runs["selective"][0]["workdir"], "selective", ours, above)
        write_search(runs["standard"][0]["workdir"], "tova", theirs, 0.0)
        assert verdict(memory) == expected
        assert [verdict(claim) for claim in about_memory[1:]] == [SHOWN] * 2
    for workdir in standard:
        write_json(workdir / "study/measured.json", measured | {"half_context": [3.0], "last_quarter": [4.0]})
    # A model that does not look back needs no memory: none of the verdicts about it can be had.
    assert [verdict(claim) for claim in about_memory] == [NOT_TESTABLE] * 3
    assert verdict("In parity") == NOT_TESTABLE


def test_the_page_is_made_from_any_subset_and_says_what_is_missing(tmp_path, capsys):
    write_run(tmp_path / "runs", "standard", "toy,standard", 1)
    write_run(tmp_path / "runs", "selective", "toy", 1, finished=False)
    with pytest.raises(SystemExit) as ended:
        study.main([f"--collect={tmp_path / 'runs'}", "--preset=toy", f"--report={tmp_path}", *_markdown(tmp_path)])
    assert ended.value.code == 0
    expected = [run for cell in PRESETS["toy"].cells for run in cell.runs]
    assert f"{len(expected) - 1} of {len(expected)} runs are missing" in capsys.readouterr().out
    for file in ("study.html", "study.md"):
        page = (tmp_path / file).read_text()
        assert "selective-1 (stopped at step 6)" in page and "memory-1" in page
        assert "No budgets have been searched for." in page


def _markdown(folder):
    return [f"--markdown={folder / 'study.md'}"]


def test_html_and_markdown_have_the_same_tables_and_figures(written, tmp_path):
    with pytest.raises(SystemExit):
        study.main([f"--collect={tmp_path / 'runs'}", f"--report={tmp_path}", *_markdown(tmp_path)])
    blocks = page_blocks(_record(tmp_path / "runs"))
    html, markdown = (tmp_path / "study.html").read_text(), (tmp_path / "study.md").read_text()
    figures = [block for block in blocks if isinstance(block, Figure)]
    assert len({figure.name for figure in figures}) == len(figures) > 4
    assert html.count("<svg") == len(figures)
    for figure in figures:
        assert f"(study/{figure.name}.svg)" in markdown
        ElementTree.parse(tmp_path / "study" / f"{figure.name}.svg")
    for cell in {cell for block in blocks if isinstance(block, Table) for row in block.rows for cell in row}:
        assert html_module.escape(cell) in html and cell.replace("<", "&lt;") in markdown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--collect=DIR/none"], "is no folder"),
        (["--collect=DIR"], "no folder in"),
        (["--preset=paper"], "is trained on slices"),
        (["--collect=DIR", "--workdir=DIR"], "--workdir is of runs to train"),
        (["--collect=DIR", "--jobs=2"], "--jobs is of runs to train"),
        (["--jobs=0"], "must be at least 1"),
        (["--markdown=DIR/none/study.md"], "there is no folder"),
        (["--preset=large"], "invalid choice"),
    ],
    ids=["no folder", "no runs", "paper", "both", "jobs", "no jobs", "markdown", "preset"],
)
def test_a_mistake_is_one_line_and_exit_code_2(arguments, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        study.main([argument.replace("DIR", str(tmp_path)) for argument in arguments])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1


def test_runs_of_the_paper_have_names_of_their_own():
    names = paper_runs()
    assert names["c4-d12-standard"] == "configs/c4.py:d12,standard"
    assert len(set(names.values())) == len(names)
