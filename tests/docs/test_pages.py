"""What the project's Markdown says is there: links, paths, commands with their targets, modules, flags and fields."""

import importlib
import json
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from configs import base
from tests.support import ROOT

PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")), *sorted(ROOT.glob("model/*/README.md"))]
FENCE = re.compile(r"^ *```(\w*)\n(.*?)^ *```$", re.DOTALL | re.MULTILINE)
INDENTED = re.compile(r"(?<=\n\n)((?: {4}.*\n)+)")
COMMANDS = ("python ", "make ", "launch/", "pip install ", "pytest ", ".ci/")
FULL_HELP = {"trainer", "launch.plan"}  # --help of absl has the main module's flags alone
# Prints what each program of standard input says for --help; what is slow to import is imported once for all of them.
HELP = """
import contextlib, json, os, runpy, sys, tempfile
import flax, jax, ml_collections, optax, tensorboard
from orbax.checkpoint import v1
helps = {}
for command in json.load(sys.stdin):
    program, *arguments = command.split()
    with tempfile.TemporaryFile("w+") as file:
        child = os.fork()
        if not child:
            os.dup2(file.fileno(), 1), os.dup2(file.fileno(), 2)
            sys.argv = [program, *arguments]
            run = runpy.run_path if program.endswith(".py") else runpy.run_module
            with contextlib.suppress(SystemExit):
                run(program, run_name="__main__")
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(0)
        os.waitpid(child, 0)
        file.seek(0)
        helps[command] = file.read()
json.dump(helps, sys.stdout)
"""


@pytest.fixture(params=PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def page(request) -> Path:
    return request.param


def _prose(page: Path) -> str:
    """The page without its blocks of code."""
    return INDENTED.sub("", FENCE.sub("", page.read_text()))


def _spans(page: Path) -> list[str]:
    """Code within the prose."""
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", _prose(page))]


def _anchors(page: Path) -> set[str]:
    """Of the headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", _prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def _links(page: Path) -> list[tuple[Path, str]]:
    """Files and anchors of the links within the repository; a folder is its README.md."""
    found = [link.partition("#") for link in re.findall(r"\]\(([^)\s]+)\)", _prose(page)) if "://" not in link]
    paths = [(page.parent / path).resolve() if path else page for path, _, _ in found]
    paths = [path / "README.md" if (path / "README.md").exists() else path for path in paths]
    return [(path, anchor) for path, (_, _, anchor) in zip(paths, found, strict=True)]


def _commands(page: Path) -> Iterator[list[str]]:
    """The words of each command, in blocks and in prose; brackets around what may be left out are taken off."""
    text = page.read_text()
    shell = [body for language, body in FENCE.findall(text) if language == "sh"]
    shell += INDENTED.findall(FENCE.sub("", text))
    lines = [line for block in shell for line in block.replace("\\\n", " ").splitlines()] + _spans(page)
    for command in (part.strip() for line in lines for part in re.split(r" \| | && | > ", line)):
        if command.startswith(COMMANDS):
            yield [word.strip("[]") for word in shlex.split(command, comments=True)]


def _program(words: list[str]) -> str | None:
    """Module or file of a command of Python, with its subcommand."""
    if words[0] != "python" or words[1:2] == ["-c"]:
        return None
    program, *arguments = words[2:] if words[1] == "-m" else words[1:]
    subcommand = arguments[:1] if arguments and re.fullmatch("[a-z]+", arguments[0]) else []
    return " ".join([program, *subcommand])


@pytest.fixture(scope="module")
def helps() -> dict[str, str]:
    """What each program in the pages prints for --help."""
    programs = {program for page in PAGES for words in _commands(page) if (program := _program(words))} | FULL_HELP
    options = {name: "--helpfull" if name in FULL_HELP else "--help" for name in programs if _source(name).exists()}
    asked = json.dumps([f"{name} {option}" for name, option in options.items()])
    result = subprocess.run([sys.executable, "-c", HELP], input=asked, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    return {name.rpartition(" ")[0]: text.replace("--[no]", "--") for name, text in json.loads(result.stdout).items()}


def _source(program: str) -> Path:
    """The file that a command of Python runs."""
    name = program.split()[0]
    if name.endswith(".py"):
        return ROOT / name
    path = ROOT / name.replace(".", "/")
    path = path if path.exists() or path.with_suffix(".py").exists() else ROOT / "model" / name
    return path / "__main__.py" if path.is_dir() else path.with_suffix(".py")


def _fields(config: ConfigDict, prefix: str = "") -> set[str]:
    """Names of all fields and of all groups."""
    names = set()
    for name, value in config.items():
        names.add(f"{prefix}{name}")
        if isinstance(value, ConfigDict):
            names |= _fields(value, f"{prefix}{name}.")
    return names


def _check_flags(flags: list[str], help_text: str, described: str) -> None:
    for flag in (word.split("=")[0] for word in flags if re.match("--?[a-z]", word)):
        if not flag.startswith("--config."):  # which have a test of their own
            assert re.search(rf"(?<![\w-]){flag}(?![\w-])", help_text), f"{described} has no flag {flag}"


def _check_config(words: list[str]) -> None:
    for word in words:
        if word.startswith("--config=") and "..." not in word:
            path, _, variant = word.removeprefix("--config=").partition(":")
            assert (ROOT / path).is_file(), f"{word}: there is no such file"
            module = importlib.import_module(path.removesuffix(".py").replace("/", "."))
            if path != "configs/uptrain.py":  # whose variant is a folder that the reader has
                module.get_config(*[variant] if variant else [])


def test_links_lead_somewhere(page):
    for path, anchor in _links(page):
        assert path.exists(), f"there is no {path}"
        assert not anchor or anchor in _anchors(path), f"{path.name} has no heading #{anchor}"


def test_every_page_can_be_reached_from_the_readme():
    reached, new = set(), {PAGES[0]}
    while new:
        reached |= new
        new = {path for page in new for path, _ in _links(page) if path.suffix == ".md"} - reached
    assert set(PAGES) <= reached


def test_paths_are_in_the_repository(page):
    folders = {path.name for path in ROOT.iterdir() if path.is_dir()} - {"runs", "report"}
    for span in _spans(page):
        path = span.split(":")[0]
        if path.split("/")[0] in folders and re.fullmatch(r"[\w./-]+", path):
            assert (ROOT / path).exists(), f"there is no {path}"


def test_commands_name_what_there_is(page, helps):
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    pod_help = subprocess.run([ROOT / "launch/tpu_pod.sh", "help"], capture_output=True, text=True, check=True).stdout
    for words in _commands(page):
        described, (own, passed_on) = " ".join(words), _parted(words)
        if words[0] == "make":
            assert {word for word in words[1:] if "=" not in word} <= set(targets), described
        elif words[0] == "launch/tpu_pod.sh":
            assert words[1:2] in ([], ["help"]) or re.search(rf"[ |]{words[1]}\b", pod_help), described
            _check_flags(own, pod_help, described)
        elif program := _program(words):
            assert _source(program).exists(), f"{described}: there is no such program"
            assert "Traceback" not in helps[program], helps[program]
            _check_flags(own[2:], helps[program], described)
        else:
            for word in words[1:]:
                path = word.partition("[")[0]  # pip's extras follow the path
                assert not re.match(r"\./|tests/", path) or (ROOT / path).exists(), f"{described}: there is no {path}"
        if any(word.startswith("--config=") for word in words):
            _check_flags(passed_on, helps["trainer"], described)
            _check_config(words)


def _parted(words: list[str]) -> tuple[list[str], list[str]]:
    """Words before and after `--`."""
    at = words.index("--") if "--" in words else len(words)
    return words[:at], words[at + 1 :]


def test_config_fields_exist(page):
    fields = _fields(base.get_config())
    groups = {name for name in fields if isinstance(base.get_config().get(name), ConfigDict)}
    named = re.findall(r"--(?:config\.|override-resume=)([a-z_.]*[a-z_])", page.read_text())
    named += [span for span in _spans(page) if re.fullmatch(rf"(?:{'|'.join(groups)})\.[a-z_]+", span)]
    for name in named:
        assert name in fields or name == "key" or _source(name).exists(), f"the config has no field {name}"


def test_blocks_of_python_run(page):
    if page.parent.parent.name == "model":
        pytest.skip("a test of the package's own runs it, and looks at the result")
    for language, body in FENCE.findall(page.read_text()):
        if language == "python" and "from transformers import" not in body:  # test_serving.py runs that
            exec(body, {})


def test_figures_name_commits_of_this_history(page):
    git = subprocess.run(["git", "rev-list", "HEAD"], capture_output=True, text=True, cwd=ROOT)
    shallow = subprocess.run(["git", "rev-parse", "--is-shallow-repository"], capture_output=True, text=True, cwd=ROOT)
    if git.returncode or shallow.stdout.strip() == "true":
        pytest.skip("without the whole history")
    for commit in re.findall(r"commit\s+`([0-9a-f]+)`", page.read_text()):
        assert any(line.startswith(commit) for line in git.stdout.split()), f"there is no commit {commit}"


def test_tables_that_are_made_again_are_in_a_page():
    tables = runpy.run_path(str(ROOT / "docs/tables.py"))
    for command in tables["TABLES"]:
        assert any(tables["find"](command, page.read_text()) for page in PAGES), command


def test_the_readme_is_short():
    assert len(PAGES[0].read_text().splitlines()) <= 120
