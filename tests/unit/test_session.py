"""What a Ray of our own is told to leave out is there in the Ray that is installed."""

import importlib.util
import mmap
import os
from pathlib import Path

from jobs.session import QUIET

READ_BY = {
    "RAY_task_events_report_interval_ms": "_raylet.so",
    "REPORTER_UPDATE_INTERVAL_MS": "dashboard/modules/reporter/reporter_consts.py",
    "RAY_LOG_MONITOR_MANY_FILES_THRESHOLD": "_private/log_monitor.py",
    "LOG_NAME_UPDATE_INTERVAL_S": "_private/log_monitor.py",
}


def test_the_installed_ray_knows_what_it_is_told():
    assert READ_BY.keys() == QUIET.keys()
    (folder,) = importlib.util.find_spec("ray").submodule_search_locations
    for name, file in READ_BY.items():
        word = name.removeprefix("RAY_") if file.endswith(".so") else f'"{name}"'  # Ray's own settings are RAY_ and their name
        with Path(folder, file).open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as content:
            assert content.find(word.encode()) >= 0, f"{name} is not read by {file}"


def test_a_later_cluster_is_told_nothing(monkeypatch):
    import ray

    from jobs.session import start_here

    given = {}
    monkeypatch.setattr(ray, "init", lambda **_: given.update(os.environ))
    monkeypatch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    monkeypatch.setenv("REPORTER_UPDATE_INTERVAL_MS", "777")
    start_here(1, 256 << 20)
    assert {name: given[name] for name in QUIET} == {**QUIET, "REPORTER_UPDATE_INTERVAL_MS": "777"}
    assert {name: os.environ.get(name) for name in QUIET} == {name: None for name in QUIET} | {
        "REPORTER_UPDATE_INTERVAL_MS": "777"
    }
