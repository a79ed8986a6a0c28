"""How the whole suite runs: three processes beside each other, for a Ray test waits for processes most of its time."""

from __future__ import annotations

import os
from pathlib import Path

# Before torch is imported. Several processes share the cores, and the models are small: a second thread would mostly spin.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest  # noqa: E402
from warm_python import WarmPython  # noqa: E402

TESTS = Path(__file__).parent
GROUPS = {  # of tests/ray; a group runs in one process, one Ray after another
    "test_cluster.py": "nodes",  # all that have several nodes, so that none comes after one of another group that shares `local_ray`
    "test_leaving.py": "nodes",
    "test_nodes.py": "nodes",
    "test_preflight.py": "nodes",
    "test_target.py": "nodes",
    "test_tokenisers.py": "nodes",
    "test_jobs.py": "nodes",  # the longest of those that share `local_ray`, so apart from the others
    "test_autoscaling.py": "own",  # from here on: each starts the Rays that it needs
    "test_endings.py": "own",
    "test_job_submit.py": "own",
    "test_two_runs_on_ray.py": "own",
}


@pytest.fixture(scope="session")
def warm_python():
    """One for all tests of this process, started when the first of them asks for it."""
    with WarmPython() as python:
        yield python


def pytest_xdist_auto_num_workers(config) -> int:
    """Three where the unit tests are run as a whole. A few files, or the Ray tests alone, are done sooner in this process."""
    chosen = [Path(config.invocation_params.dir, argument.partition("::")[0]).resolve() for argument in config.args]
    unit = TESTS / "unit"
    return 3 if any(path in (unit, *unit.parents) for path in chosen) else 0


def pytest_xdist_make_scheduler(config, log):
    """A file's tests run in one process, for they share its fixtures; the Ray tests run in three groups, handed out first."""
    from xdist.scheduler import LoadScopeScheduling

    class Grouped(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            if file.startswith(("tests/gpu/", "tests/ray/")):
                return GROUPS.get(Path(file).name, "ray")
            return file

    config.option.loadscopereorder = False  # as collected: tests/gpu and tests/ray are before tests/unit
    return Grouped(config, log)
