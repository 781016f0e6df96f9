"""The commands one after the other, as a person would run them, on a small model and a small dataset."""

import io
import re

import pytest

from data import Tokenizer
from inference_budget import Budgets, Found, Point
from inference_budget.interchange import read_budgets_file
from launch.budgets.__main__ import main
from launch.budgets.result import Journal, SearchFile
from tests.support.searches import search


def output_of(capsys, *arguments):
    main(list(arguments))
    return capsys.readouterr().out


def test_evaluate_gives_the_perplexities_of_the_search_on_the_same_windows(folder, capsys):
    content = read_budgets_file(folder / "budgets.json", SearchFile)
    for split, expected in (("train", content["found"]), ("validation", content["validation"]["pruned"])):
        shown = output_of(capsys, "evaluate", f"--budgets={folder}/budgets.json", f"--split={split}")
        pruned = float(re.search(r"selective, 8.00x fewer tokens: perplexity ([0-9.]+)", shown)[1])
        assert pruned == pytest.approx(expected["perplexity"], rel=1e-6)


def test_a_search_of_any_target_ends_at_the_smallest_budgets_and_resumes_to_the_same(folder, capsys, monkeypatch):
    again = folder / "again.json"
    command = search(folder, "--target-perplexity=1e9", "--output", str(again))
    with monkeypatch.context() as patch:
        patch.setattr(Journal, "remove", lambda journal: None)
        main(command)
    journal = folder / "again.json.journal"
    lines = journal.read_text().splitlines(keepends=True)
    journal.write_text("".join(lines[: len(lines) // 2]))  # as a search that was killed leaves it
    again.unlink()
    shown = output_of(capsys, *command)
    assert "selective: 8.00x fewer tokens, budgets [2, 2]" in shown
    assert again.read_text() == (folder / "budgets.json").read_text()
    assert not journal.exists() and not (folder / "budgets.json.journal").exists()


@pytest.mark.parametrize("command", ["search", "evaluate"])
def test_the_memory_that_is_printed_is_counted_in_bytes_of_the_cache(folder, capsys, command):
    commands = {
        "search": search(folder, "--target-perplexity=1e9", "--output", str(folder / "memory.json")),
        "evaluate": ["evaluate", f"--budgets={folder}/budgets.json"],
    }
    key_and_value, position, f = 2 * 4 * 8 * 4, 4, 4  # bytes of a slot
    held, full = (2 + 2) * (key_and_value + position + f), 2 * 16 * (key_and_value + f)
    line = f"cache of one sequence: {held:,} bytes, {full / held:.2f}x less than a full cache"
    assert line in output_of(capsys, *commands[command])


def test_generate_goes_on_from_the_prompt_and_from_standard_input_alike(folder, capsys, monkeypatch):
    common = ["generate", f"--budgets={folder}/budgets.json", "--tokens=5", "--seed=1"]
    shown = output_of(capsys, *common, "--prompt=the mask")
    monkeypatch.setattr("sys.stdin", io.StringIO("the mask"))
    assert output_of(capsys, *common) == shown
    assert shown.startswith("the mask") and len(shown) > len("the mask\n")


def test_generate_draws_what_the_context_leaves_where_nothing_else_is_said(folder, capsys):
    shown = output_of(capsys, "generate", f"--budgets={folder}/budgets.json", "--seed=1", "--prompt=the mask")
    assert shown.startswith("the mask") and len(shown) > len("the mask\n")


def test_generate_shows_the_half_of_a_character_that_it_ends_with(folder, capsys, monkeypatch):
    monkeypatch.setattr(Tokenizer, "continuation", lambda tokenizer, prompt, tokens: " fades\ufffd")
    shown = output_of(capsys, "generate", f"--budgets={folder}/budgets.json", "--tokens=2", "--prompt=the mask")
    assert shown == "the mask fades\ufffd\n"


def test_the_report_shows_every_search_and_the_survivors_of_the_first(folder, capsys):
    shown = output_of(capsys, "report", f"{folder}/budgets.json", f"--output={folder}/page.html")
    assert "model, selective | 8.00 |" in shown
    page = (folder / "page.html").read_text()
    assert "Which tokens survive: model, selective" in page and page.count("2 of 16") == 2


def test_a_policy_of_one_s_own_is_searched_with_and_found_again_by_its_file(folder, capsys, tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(
        "from inference_budget import OldestFirst\n"
        "class Newest(OldestFirst):\n"
        "    name = 'newest'\n"
        "    def priority(self, held):\n"
        "        return -super().priority(held)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    budgets = tmp_path / "budgets.json"
    shown = output_of(capsys, *search(folder, "--policy=mine:Newest", "--target-perplexity=1e9", f"--output={budgets}"))
    assert "mine:Newest: 8.00x fewer tokens, budgets [2, 2]" in shown
    found = read_budgets_file(budgets, SearchFile)["found"]["perplexity"]
    shown = output_of(capsys, "evaluate", f"--budgets={budgets}", "--split=train")
    assert float(re.search(r"mine:Newest.*: perplexity ([0-9.]+)", shown)[1]) == pytest.approx(found, rel=1e-6)
    assert output_of(capsys, "generate", f"--budgets={budgets}", "--prompt=the", "--tokens=3").startswith("the")
    assert "model, mine:Newest" in output_of(capsys, "report", str(budgets), f"--output={tmp_path}/page.html")


@pytest.mark.slow
def test_limits_of_a_cache_that_forgets_are_searched_for_and_their_use_is_shown(folder, capsys, tmp_path):
    budgets = tmp_path / "budgets.json"
    output_of(capsys, *search(folder, "--policy=forgotten-1", "--target-perplexity=1e9", f"--output={budgets}"))
    shown = output_of(capsys, "evaluate", f"--budgets={budgets}")
    held = re.findall(r"layer (\d) holds ([0-9.]+) tokens on average, at most (\d+) of (\d+)", shown)
    assert [layer for layer, *_ in held] == ["0", "1"]
    assert all(1 <= float(mean) <= int(most) <= int(limit) for _, mean, most, limit in held)


def test_a_search_does_not_go_on_with_the_losses_of_a_policy_s_code_that_was_changed(
    folder, capsys, tmp_path, monkeypatch
):
    code = "from inference_budget import OldestFirst\nclass Mine(OldestFirst): pass\n"
    (tmp_path / "edited.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    command = search(folder, "--policy=edited:Mine", "--target-perplexity=1e9", f"--output={tmp_path}/x.json")
    with monkeypatch.context() as patch:
        patch.setattr(Journal, "remove", lambda journal: None)
        main(command)
    (tmp_path / "edited.py").write_text(code + "# of another mind\n")
    with pytest.raises(SystemExit, match="2"):
        main(command)
    assert "is of another search, or of this policy before a change; remove it" in capsys.readouterr().err


def stops_at(*tokens):
    """A search that goes from full budgets to others at once, which it takes to cost a nat less than they do."""

    def search(evaluator, *, known, **options):
        budgets = [Budgets.full(2, 16), Budgets(tokens, 16)]
        for one, losses in zip(budgets, evaluator.losses(budgets), strict=True):
            known[one.tokens] = losses.mean - 1, float(losses.last_quarter.mean())
        return Found(tuple(Point(one, *known[one.tokens]) for one in budgets))

    return search


def test_an_exchange_is_resumed_to_the_same_file_which_counts_every_evaluation_once(
    folder, capsys, monkeypatch, tmp_path
):
    monkeypatch.setattr("launch.budgets.search.search", stops_at(4, 10))
    monkeypatch.setattr("launch.budgets.search.uniform", lambda *arguments, **options: ())
    output, journal = tmp_path / "x.json", tmp_path / "x.json.journal"
    command = search(folder, "--target-perplexity=1e9", "--exchange", f"--output={output}")
    with monkeypatch.context() as patch:
        patch.setattr(Journal, "remove", lambda journal: None)
        main(command)
    before, lines = output.read_text(), journal.read_text().splitlines(keepends=True)
    content = read_budgets_file(output, SearchFile)
    counts = content["evaluations"]
    assert (content["chosen"], content["budgets"]) == ("exchange", [2, 2])
    assert counts == {"greedy": 2, "uniform": 0, "exchange": len(lines) - 3 - counts["baselines"]} | counts
    journal.write_text("".join(lines[:5]))  # its first line says what it is about
    assert f"greedy 2, uniform 0, exchange {counts['exchange']}" in output_of(capsys, *command)
    assert output.read_text() == before


def test_the_better_of_greedy_and_uniform_budgets_is_kept_and_named(folder, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("launch.budgets.search.search", stops_at(16, 2))
    output_of(capsys, *search(folder, "--target-perplexity=1e9", f"--output={tmp_path}/x.json"))
    content = read_budgets_file(tmp_path / "x.json", SearchFile)
    assert (content["chosen"], content["budgets"]) == ("uniform", [2, 2])
