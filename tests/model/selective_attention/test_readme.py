"""The README's example runs as it is printed, and learns."""

import pathlib
import re

README = pathlib.Path(__file__).parents[3] / "model" / "selective_attention" / "README.md"


def test_the_example_runs_and_learns():
    (example,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    names: dict = {}
    exec(example, names)
    first = names["loss"](names["init"](names["jax"].random.key(0)), names["tokens"])
    assert names["value"] < first / 2
