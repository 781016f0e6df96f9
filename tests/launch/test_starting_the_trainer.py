"""Nobody starts the trainer as a process of its own but those whose job it is."""

import re

from tests.support import ROOT

STARTERS = {"launch/emulate.py", "launch/demo.py", "launch/worker.sh"}
# A command line in a shell script, or a list of arguments in Python; text for people has no quotes around each word.
COMMAND = {".sh": r"-m trainer\b", ".py": r"""["']-m["'],\s*f?["']trainer\b|["']-m trainer\b"""}


def starting(folder: str) -> set[str]:
    files = [path for path in (ROOT / folder).rglob("*") if path.suffix in COMMAND]
    return {str(path.relative_to(ROOT)) for path in files if re.search(COMMAND[path.suffix], path.read_text())}


def test_below_launch_only_the_pods_and_the_demo_start_the_trainer():
    assert {path for path in starting("launch") if not path.startswith("launch/pod/")} == STARTERS


def test_the_model_starts_neither_the_trainer_nor_anything_else():
    assert not starting("model")
    for path in (ROOT / "model").rglob("*.py"):
        assert not re.search(r"\bsubprocess\b|\bos\.(system|exec|spawn|popen)", path.read_text()), path
