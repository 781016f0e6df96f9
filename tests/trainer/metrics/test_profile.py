"""Traces: of steps named by the flag, and of a run that is asked while it trains; they name the parts of the model."""

import time

import jax
import pytest

from trainer.errors import ConfigError
from trainer.loop import train
from trainer.metrics.profile import PROFILE_FILE, parse_steps
from trainer.metrics.writer import MetricsWriter
from trainer.settings import read_settings

PARTS = [b"layer/attention", b"layer/mlp", b"loss", b"optimizer"]


def traces(workdir):
    return {path.parent.name: path for path in workdir.glob("tensorboard/plugins/profile/*/*.xplane.pb")}


@pytest.mark.slow
def test_the_trace_of_named_steps_names_layers_attention_mlp_loss_and_optimizer(tiny_config, tmp_path):
    tiny_config.steps = 8
    assert train(read_settings(tiny_config), str(tmp_path), profile_steps=parse_steps("4:6")) == 0
    found = traces(tmp_path)
    assert list(found) == ["step_4"]
    content = found["step_4"].read_bytes()
    assert [part for part in PARTS if part not in content] == []
    planes = jax.profiler.ProfileData.from_file(str(found["step_4"])).planes
    assert any(event.name for plane in planes for line in plane.lines for event in line.events)
    assert len(list(found["step_4"].parent.glob("*.trace.json.gz"))) == 1  # for Perfetto


class Asker(MetricsWriter):
    """Makes the file at the third step, and holds the run until it is seen."""

    def __init__(self, workdir):
        self._file = workdir / PROFILE_FILE

    def write(self, step, scalars):
        if step == 3 and "run/loss" in scalars:
            self._file.touch()
        if step >= 3 and self._file.exists():
            time.sleep(0.3)


@pytest.mark.slow
def test_a_file_in_the_workdir_asks_a_running_run_for_a_trace_once(tiny_config, tmp_path):
    assert train(read_settings(tiny_config), str(tmp_path), writers=[Asker(tmp_path)]) == 0
    (name,) = traces(tmp_path)
    assert 3 < int(name.removeprefix("step_")) < 30
    assert not (tmp_path / PROFILE_FILE).exists()


@pytest.mark.parametrize("text", ["5", "5:5", "0:3", "a:b", "5:", ":5", "7:5"])
def test_steps_that_are_none_are_refused(text):
    with pytest.raises(ConfigError, match="must be FIRST:STOP"):
        parse_steps(text)


def test_no_flag_is_no_step():
    assert not parse_steps("") and list(parse_steps("100:102")) == [100, 101]
