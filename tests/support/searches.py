"""The command that searches, at the sizes of tests/launch/budgets."""

from pathlib import Path


def search(folder: Path, *more: str) -> list[str]:
    paths = [f"--checkpoint={folder}/model", f"--data={folder}/data"]
    return ["search", *paths, "--step=7", "--windows=6", "--validation-windows=5", *more]
