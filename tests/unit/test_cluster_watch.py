"""A cluster that was joined and dies ends the command with one line, in place of what Ray's native code prints a minute later."""

import socket
import subprocess
import sys
import threading
from pathlib import Path

from jobs import endings

ROOT = Path(__file__).parents[2]
JOINED = """
import socket, sys, time
from jobs import app, endings
endings.CONNECT_EVERY_S, endings.CLUSTER_IS_DEAD_AFTER_S = 0.05, 0.3
server = socket.create_server(("127.0.0.1", 0))
address = f"127.0.0.1:{server.getsockname()[1]}"

def call():
    with endings.native_prints_logged() as log, endings.current().cluster_watched(address, log):
        print(address, flush=True)
        server.close()
        time.sleep(60)  # as native code that waits for the cluster

endings.keep_stderr()
endings.ended(app._guarded(call))
"""


def test_a_cluster_that_no_longer_answers_ends_the_command():
    done = subprocess.run([sys.executable, "-c", JOINED], capture_output=True, text=True, cwd=ROOT, timeout=240)
    line = f"error: the cluster at {done.stdout.strip()} no longer answers; the same command continues\n"
    assert (done.returncode, done.stderr) == (1, line)


def test_one_that_answers_again_in_time_does_not(monkeypatch):
    """And nobody looks any more once the command has left it."""
    monkeypatch.setattr(endings, "CONNECT_EVERY_S", 0.01)
    monkeypatch.setattr(endings, "CLUSTER_IS_DEAD_AFTER_S", 60.0)
    asked, enough = [], threading.Event()

    def answers(address):
        asked.append(address)
        if len(asked) > 5:
            enough.set()
        return len(asked) % 2 == 0

    monkeypatch.setattr(endings, "_answers", answers)
    monkeypatch.setattr(endings.Signals, "end_now", lambda *_: enough.clear())
    signals = endings.Signals()
    with signals.cluster_watched("somewhere:1", None):
        assert enough.wait(240)
        (thread,) = [thread for thread in threading.enumerate() if thread.name == "cluster"]
    thread.join(30)
    assert not thread.is_alive() and enough.is_set() and set(asked) == {"somewhere:1"}


def test_what_counts_as_an_answer():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert endings._answers(f"127.0.0.1:{port}")
    assert not endings._answers(f"127.0.0.1:{port}")
