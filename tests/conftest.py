"""How the whole suite runs: two processes beside each other, one of which runs everything that shares the local Ray cluster."""

from __future__ import annotations

from pathlib import Path

TESTS = Path(__file__).parent
OWN_PROCESSES = (
    "test_autoscaling.py",
    "test_endings.py",
    "test_job_submit.py",
    "test_two_runs_on_ray.py",
)  # in tests/ray: each starts the Rays that it needs


def pytest_xdist_auto_num_workers(config) -> int:
    """Two where the unit tests are run as a whole. A few files, or the Ray tests alone, are done sooner in this process."""
    chosen = [Path(config.invocation_params.dir, argument.partition("::")[0]).resolve() for argument in config.args]
    unit = TESTS / "unit"
    return 2 if any(path in (unit, *unit.parents) for path in chosen) else 0


def pytest_xdist_make_scheduler(config, log):
    """A file's tests run in one process, for they share its fixtures; all tests that share a Ray cluster run in one.

    The Ray tests take longest, so they are handed out first.
    """
    from xdist.scheduler import LoadScopeScheduling

    class OneClusterScheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            shared = file.startswith(("tests/gpu/", "tests/ray/")) and not file.endswith(OWN_PROCESSES)
            return "ray" if shared else file

    config.option.loadscopereorder = False  # as collected: tests/gpu and tests/ray are before tests/unit
    return OneClusterScheduling(config, log)
