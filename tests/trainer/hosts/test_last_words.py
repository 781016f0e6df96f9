"""A process that ends itself does so, whatever fails on the way."""

import subprocess
import sys

import pytest

from tests.support import ROOT
from trainer.errors import EXIT_PEER_LOST, EXIT_PREEMPTED

NO_FILES = """
import resource
from trainer.hosts import last_words
resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))
last_words.say("something was wrong", stacks=True)
"""
NO_THREADS = """
import threading
from trainer.hosts import last_words
def start(thread): raise RuntimeError("can't start new thread")
threading.Thread.start = start
last_words.say("something was wrong")
"""
FAIL = """
import time
def fail(*_): raise RuntimeError("can't start new thread")
"""
WATCHDOG = """
from trainer.hosts.watchdog import Watchdog
with Watchdog(0.1, 1.0, 0.1, fail).watch("a step"):
    time.sleep(5)
"""
INTERRUPT = """
import os, signal
from trainer.hosts.interrupt import Interrupt
interrupt = Interrupt()
interrupt.on_exit = fail
interrupt.install()
os.kill(os.getpid(), signal.SIGTERM)
time.sleep(5)
"""
PEERS = """
from trainer.hosts import compilation_cache
from trainer.hosts.peers import Peers
compilation_cache.part = fail
Peers(None, 1, 2, "host:1", "name")._exit("the other one is gone", 70)
"""


def run(program: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)


def test_words_are_said_where_no_file_can_be_opened():
    done = run(NO_FILES)
    assert (done.returncode, done.stderr) == (0, "something was wrong\n")


def test_words_that_cannot_be_said_raise_nothing():
    assert run(NO_THREADS).returncode == 0


@pytest.mark.parametrize(
    ("program", "code"), [(WATCHDOG, EXIT_PEER_LOST), (INTERRUPT, EXIT_PREEMPTED), (PEERS, EXIT_PEER_LOST)]
)
def test_a_process_ends_with_its_code_though_its_parting_fails(program, code):
    done = run(FAIL + program)
    assert done.returncode == code, done.stderr
