"""A run that is ended says one line and leaves nothing behind, and the same command goes on. On a Ray of the run's own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from pickles import pickles_in
from safetensors import safe_open
from small_runs import save_parent_with_text
from waiting import until

ROOT = Path(__file__).parents[2]
SETTINGS = (
    *("space.attention=[parent,'gqa:1',noop]", "space.ffn=[parent,'ffn:24',noop]", "data.sequence_length=16"),
    *("profile.scenario.input_tokens=16", "profile.scenario.output_tokens=4"),
    *("library.tokens=153600", "library.micro_batch_tokens=512", "library.checkpoint_every=2"),
    *("library.calibration_tokens=512", "library.validation_tokens=512", "cluster.num_shards=1"),
)
INTERRUPTED = "interrupted; the same command continues"


class Building:
    """`build-library` in a process of its own, its Ray with it, in the middle of its library."""

    def __init__(self, folder: Path, here: Path) -> None:
        parent, text = folder / "parent", folder / "parent" / "text.txt"
        self.store, self.said = here / "store", here / "stderr.txt"
        words = ["--parent", str(parent), "--data", str(text), "--store", str(self.store)]
        words += [word for setting in SETTINGS for word in ("--set", setting)]
        began = time.time()
        with self.said.open("w") as stderr:
            command = [sys.executable, "-m", "jobs.app", "build-library", *words]
            self.process = subprocess.Popen(
                command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=stderr, start_new_session=True, env=environment()
            )
        self.began = began

    def __enter__(self) -> Building:
        until(lambda: self.checkpoints() or self.process.poll() is not None, "the library is in training", 240)
        self.processes = psutil.Process(self.process.pid).children(recursive=True)
        assert {"gcs_server", "raylet"} <= {process.name() for process in self.processes}
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(30)

    def checkpoints(self) -> list[Path]:
        found = self.store.glob("library-*/checkpoints/layer_*.safetensors")  # else it is being written
        return [path for path in found if path.stat().st_mtime > self.began]

    def positions(self) -> dict[str, int]:
        """How many micro-batches the variants' checkpoints of this run know."""
        found = {}
        for path in self.checkpoints():
            with safe_open(path, "pt") as file:
                found[path.stem] = int(file.metadata()["position"])
        return found

    def kill(self, name: str) -> int:
        process = next(process for process in self.processes if process.name() == name)
        process.kill()
        return process.pid

    def end(self, within_s: float) -> list[str]:
        """What it said last, once it and all its processes are gone."""
        self.process.wait(within_s)
        until(lambda: not [p for p in self.processes if is_running(p)], "no process of its Ray is left", 5)
        hidden = [str(path) for path in self.store.rglob(".*") if path.name not in (".tokens.published", ".written")]
        # a worker that is killed at writing leaves what it wrote under another name; the next run clears it away
        assert not [path for path in hidden if "~" not in path], "no lease is left"
        assert not pickles_in(self.store)
        said = self.said.read_text()
        assert not any(word in said for word in ("Traceback", "Stack trace", "*** ", "core_worker", "\x1b[33m(raylet)"))
        return [line for line in said.splitlines() if not line.startswith(("[", "  ", "Writing"))]


def environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", "PUZZLE_RAY_DEBUG")}


def is_running(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    found = tmp_path_factory.mktemp("endings")
    (found / "parent").mkdir()
    save_parent_with_text(found / "parent")
    return found


def test_ctrl_c_reaches_the_whole_group_and_sigterm_the_driver_alone_and_the_same_command_goes_on(folder, tmp_path):
    """It goes on after the first: from its checkpoint to a later one. That it gets to the same end is shown with fewer processes."""
    with Building(folder, tmp_path) as building:
        until(
            lambda: len(building.positions()) == 3 * 4 and min(building.positions().values()) >= 8,
            "every variant is well begun",
            120,
        )
        os.killpg(building.process.pid, signal.SIGINT)
        assert building.end(within_s=15) == [INTERRUPTED] and building.process.returncode == 130
        reached = building.positions()
    with Building(folder, tmp_path) as building:
        assert "[tokens] already there" in building.said.read_text()
        assert all(position >= reached[layer] for layer, position in building.positions().items()), "not begun again"
        os.kill(building.process.pid, signal.SIGTERM)
        assert building.end(within_s=15) == [INTERRUPTED] and building.process.returncode == 143


@pytest.mark.wide  # the run goes on to its end
def test_after_ctrl_c_the_same_command_ends_well(folder, tmp_path):
    with Building(folder, tmp_path) as building:
        os.killpg(building.process.pid, signal.SIGINT)
        assert building.end(within_s=15) == [INTERRUPTED] and building.process.returncode == 130
    with Building(folder, tmp_path) as building:
        assert building.process.wait(240) == 0, building.said.read_text()
        assert list(building.store.glob("library-*/artifact.json"))


@pytest.mark.wide
def test_a_second_ctrl_c_ends_at_once(folder, tmp_path):
    with Building(folder, tmp_path) as building:
        os.kill(building.process.pid, signal.SIGINT)
        time.sleep(0.2)
        os.kill(building.process.pid, signal.SIGINT)
        assert building.end(within_s=15) == [INTERRUPTED] and building.process.returncode == 130


@pytest.mark.parametrize("name", ["gcs_server", pytest.param("raylet", marks=pytest.mark.wide)])
def test_the_death_of_ray_itself(folder, tmp_path, name):
    with Building(folder, tmp_path) as building:
        pid = building.kill(name)
        (line,) = building.end(within_s=30)
        assert line.startswith(f"error: {name} of this run's own Ray (process {pid}) died; the same command continues")
        assert building.process.returncode == 1
