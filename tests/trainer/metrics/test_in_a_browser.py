"""A real TensorBoard on a run, as a person sees it."""

import re
import subprocess
import sys

import pytest

from tests.support.browser import open_browser
from trainer.loop import train
from trainer.settings import read_settings

pytestmark = [pytest.mark.browser, pytest.mark.slow]


@pytest.fixture
def tensorboard(tiny_config, tmp_path):
    """The address of a server that shows one finished run."""
    tiny_config.eval.pictures = True
    assert train(read_settings(tiny_config), str(tmp_path / "run")) == 0
    command = [sys.executable, "-m", "tensorboard.main", f"--logdir={tmp_path}/run/tensorboard", "--port=0"]
    server = subprocess.Popen([*command, "--host=127.0.0.1"], stderr=subprocess.PIPE, text=True)
    said = []
    for line in server.stderr:
        said.append(line)
        if found := re.search(r"http://127\.0\.0\.1:\d+/", line):
            break
    else:
        pytest.fail("".join(said))
    yield found[0]
    server.terminate()
    server.wait(30)


def test_tensorboard_opens_on_the_run_and_shows_all_of_it_without_an_error(tensorboard, tmp_path):
    with open_browser() as page:
        for tab, texts in {
            "timeseries": ["run 12 cards", "/loss", "/bits_per_byte", "selection_mean_f"],
            "scalars": ["run", "selection_mean_f", "weights"],
            "images": ["selection/layers", "selection/text"],
            "text": ["Fields that are not at their defaults are bold", "memory_loss.epsilon", "fingerprint"],
            "hparams": ["optimizer.peak_lr", "run/validation_bits_per_byte"],
            "custom_scalars": ["The run", "loss, nats per token", "norm of the gradient"],
        }.items():
            page.open(f"{tensorboard}?{tab}#{tab}")  # the query makes it another page
            text = page.wait_for(*texts)
            page.screenshot(tmp_path / f"{tab}.png")
            if tab == "timeseries":
                assert text.index("/loss") < text.index("selection_mean_f"), "the run comes first"
        assert page.errors == []
