"""Processes take turns on cores, and those that die do not keep theirs."""

import fcntl
import signal
import subprocess
import sys
import uuid
from pathlib import Path

import pytest
from waiting import until

from actors.turns import Turns

HOLDER = """
import sys, time
from actors.turns import Turns
turns = Turns(sys.argv[1], int(sys.argv[2]), 4)
print("asks", flush=True)
with turns.turn():
    print("held", flush=True)
    sys.stdin.readline()
print("given back", flush=True)
time.sleep(60)
"""


@pytest.fixture
def holders():
    """Starts processes that hold a turn of so many threads on four cores until they are told; none is left."""
    started = []

    def start(run, num_threads):
        words = [sys.executable, "-c", HOLDER, run, str(num_threads)]
        started.append(subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
        assert started[-1].stdout.readline() == "asks\n"
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()


def free(run, num_threads):
    """Whether a turn can be had at once."""
    turns = Turns(run, num_threads, 4)
    for place in turns.places:
        try:
            fcntl.lockf(turns.file, fcntl.LOCK_EX | fcntl.LOCK_NB, turns.width, place)
        except BlockingIOError:
            continue
        fcntl.lockf(turns.file, fcntl.LOCK_UN, turns.width, place)
        return True
    return False


def test_as_many_threads_hold_cores_as_there_are_and_the_dead_hold_none(holders):
    run = uuid.uuid4().hex
    two, one = holders(run, 2), holders(run, 1)
    assert two.stdout.readline() == one.stdout.readline() == "held\n"
    assert free(run, 1) and not free(run, 2) and not free(run, 9)
    assert free(uuid.uuid4().hex, 9), "another run has its own turns"
    last = holders(run, 1)
    assert last.stdout.readline() == "held\n" and not free(run, 1)
    two.stdin.write("\n")
    two.stdin.flush()
    assert two.stdout.readline() == "given back\n" and free(run, 2)
    for process in (one, last):
        process.send_signal(signal.SIGKILL)
        process.wait()
    until(lambda: free(run, 9), "what the dead held is free")


def locks(process):
    """The kernel's own list of what a process holds, and, behind an arrow, waits for."""
    return [line for line in Path("/proc/locks").read_text().splitlines() if str(process.pid) in line.split()]


def sleeps(process):
    return any("->" in line for line in locks(process))


@pytest.mark.skipif(not Path("/proc/locks").is_file(), reason="the kernel does not tell who waits")
def test_one_looks_for_a_core_and_the_others_sleep_until_it_has_one_or_dies(holders):
    run = uuid.uuid4().hex
    everything = holders(run, 9)
    assert everything.stdout.readline() == "held\n"
    looking = holders(run, 1)
    until(lambda: locks(looking), "the first looks for a core")
    asleep = [holders(run, 1) for _ in range(2)]
    for process in asleep:
        until(lambda process=process: sleeps(process), "who comes later sleeps")
    assert not sleeps(looking)
    looking.send_signal(signal.SIGKILL)
    looking.wait()
    until(lambda: [sleeps(process) for process in asleep].count(False) == 1, "one of them looks for a core instead")
    everything.stdin.write("\n")
    everything.stdin.flush()
    assert [process.stdout.readline() for process in asleep] == ["held\n"] * 2
