"""What the pages say of serving works as it is written, in an environment with what they say to install and no more."""

import os
import re
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from selective_attention import export_safetensors
from tests.support import ROOT
from tests.support.runs import TINY
from tests.support.small_model import LENGTH, make_model

pytestmark = pytest.mark.slow
LIBRARY = ROOT / "model" / "inference_budget" / "README.md"
FOLDERS = ("configs", "data", "launch", "model", "trainer")
FILES = ("constraints.txt", "pyproject.toml", "README.md")


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Variables of an empty virtual environment."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=True)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
    own = {"PATH": f"{folder}/bin:{os.environ['PATH']}", "XDG_CACHE_HOME": str(folder), "JAX_PLATFORMS": "cpu"}
    return kept | own | {"PIP_CONSTRAINT": str(ROOT / "constraints.txt"), "PIP_DISABLE_PIP_VERSION_CHECK": "1"}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repository, where pip may leave what it builds."""
    folder = tmp_path_factory.mktemp("sources")
    tracked = subprocess.run(
        ["git", "ls-files", *FOLDERS, *FILES], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in tracked.stdout.splitlines():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes((ROOT / name).read_bytes())
    return folder


def run(command: str, folder: Path, environment: dict[str, str]) -> str:
    """What the shell prints for it."""
    result = subprocess.run(["sh", "-ec", command], cwd=folder, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, f"{command}\n{result.stdout[-2000:]}\n{result.stderr[-4000:]}"
    return result.stdout


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)


def test_the_library_s_page_needs_no_more_than_it_installs(environment, sources, tmp_path):
    (install,) = re.findall(r"^ {4}(pip install .*)$", LIBRARY.read_text(), re.MULTILINE)
    run(install, sources, environment)
    export_safetensors(make_model(max_length=32), tmp_path / "export")
    policy = "from inference_budget import *\nfrom selective_attention import import_safetensors\n"
    policy += "model = import_safetensors('export')\n"
    policy += (
        f"save_budgets('budgets.json', model, Budgets((3, 9), {LENGTH}), POLICIES['selective'], checkpoint='export')"
    )
    (tmp_path / "first.py").write_text(policy)
    (tmp_path / "page.py").write_text("\n".join(blocks(LIBRARY, "python")))
    typed = "import inference_budget as b, selective_attention as s, pathlib as p\n"
    typed += "assert all((p.Path(x.__file__).parent / 'py.typed').exists() for x in (b, s))\n"
    typed += "assert 'site-packages' in b.__file__, b.__file__"
    (tmp_path / "typed.py").write_text(typed)
    run("python first.py && python page.py && python typed.py", tmp_path, environment)


def test_the_server_needs_no_more_than_its_extra(environment, sources):
    (block,) = (block for block in blocks(ROOT / "docs" / "serving.md", "sh") if "[serve]" in block)
    run(block.splitlines()[0], sources, environment)
    run("python -c 'import inference_budget.server.process'", sources, environment)


@pytest.fixture(scope="module")
def trained(dataset_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `runs/demo`: a dataset, a selective model, and a standard one that has learned less."""
    folder = tmp_path_factory.mktemp("trained")
    demo = folder / "runs" / "demo"
    demo.mkdir(parents=True)
    (demo / "data").symlink_to(dataset_path)
    for name, steps in (("selective", 30), ("standard", 5)):
        fields = TINY | {"data.path": dataset_path, "context_length": 64, "steps": steps, "eval.every_steps": 5}
        config = [f"--config.{field}={value}" for field, value in fields.items()]
        command = ["trainer", f"--config=configs/demo.py:{name}", f"--workdir={demo / name}", *config]
        subprocess.run([sys.executable, "-m", *command], cwd=ROOT, check=True, capture_output=True)
    return folder


def test_the_commands_of_the_serving_page_work_after_its_own_installation(environment, sources, trained):
    install, commands, *_ = blocks(ROOT / "docs" / "serving.md", "sh")
    run(install, sources, environment)
    shown = run(commands, trained, environment)
    assert "x fewer tokens, budgets [" in shown and "The function returns" in shown
    assert (trained / "budgets.html").exists()


def test_the_page_s_file_of_prompts_is_completed(trained):
    _, commands, *others = blocks(ROOT / "docs" / "serving.md", "sh")
    (generate,) = (block for block in others if "inference_budget generate" in block)
    here = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    if not (trained / "budgets.json").exists():
        run(commands.splitlines(keepends=True)[0] + commands.splitlines()[1], trained, here)
    assert "completions.jsonl: 2 prompts" in run(generate, trained, here)
    assert (trained / "completions.jsonl").read_text().count('"text": ') == 2


def test_the_page_s_folder_for_transformers_loads_and_generates(trained):
    pytest.importorskip("transformers")
    _, commands, *others = blocks(ROOT / "docs" / "serving.md", "sh")
    (export,) = (block for block in others if "--format=hf -o demo-hf" in block)
    here = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    if not (trained / "budgets.json").exists():
        run(commands.splitlines(keepends=True)[0] + commands.splitlines()[1], trained, here)
    (example,) = blocks(ROOT / "docs" / "serving.md", "python")
    (trained / "example.py").write_text(example)
    run(export, trained, here)
    shown = run("python example.py", trained, {**here, "HF_HUB_OFFLINE": "1", "HF_HOME": str(trained)})
    assert "The function returns" in shown


def test_the_readme_s_commands_are_those_of_the_serving_page():
    (section,) = re.findall(
        r"^## You serve a model$(.*?)^## ", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE
    )
    (commands,) = re.findall(r"^```sh\n(.*?)^```$", section, re.DOTALL | re.MULTILINE)
    assert set(commands.splitlines()) <= set(blocks(ROOT / "docs" / "serving.md", "sh")[1].splitlines())
