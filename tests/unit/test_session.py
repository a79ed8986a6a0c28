"""A Ray of our own is nobody else's; a cluster that is joined is told what its processes need, once."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from jobs.session import ENVIRONMENT, SUBMITTED, job_environment, start_here

ROOT = Path(__file__).parents[2]
LISTENING = """
import json, sys
from jobs import session
assert "ray" not in sys.modules
session.start_here(1, 80 << 20)
import os, psutil, ray

@ray.remote
def environment():
    return dict(os.environ)

there = ray.get(environment.remote(), timeout=240)
processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
sockets = [c.laddr.ip for p in processes for c in p.net_connections("inet") if c.status == psutil.CONN_LISTEN]
print(json.dumps([sockets, there, dict(os.environ)]))
ray.shutdown()
"""


@pytest.fixture
def unset(monkeypatch):
    for name in (*ENVIRONMENT, SUBMITTED):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_a_ray_of_our_own_listens_on_loopback_alone_and_its_processes_have_the_jobs_environment(unset):
    unset.setenv("OMP_NUM_THREADS", "3")
    unset.delenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", raising=False)
    done = subprocess.run([sys.executable, "-c", LISTENING], capture_output=True, text=True, cwd=ROOT, timeout=240)
    assert done.returncode == 0, done.stderr
    addresses, there, here = json.loads(done.stdout.splitlines()[-1])
    assert len(addresses) > 5 and {address.removeprefix("::ffff:") for address in addresses} == {"127.0.0.1"}
    assert {name: there.get(name) for name in ENVIRONMENT} == {**ENVIRONMENT, "OMP_NUM_THREADS": "3"}
    assert {name: here.get(name) for name in ENVIRONMENT} == dict.fromkeys(ENVIRONMENT) | {"OMP_NUM_THREADS": "3"}


def test_where_ray_was_imported_before_it_is_said_that_it_listens_everywhere(unset, capsys):
    import ray

    unset.setattr(ray, "init", lambda **_: None)
    unset.delenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", raising=False)
    start_here(1, 256 << 20)
    assert "listen on every interface" in capsys.readouterr().err
    assert not ENVIRONMENT.keys() & os.environ.keys()


def test_a_cluster_that_is_joined_gets_what_the_user_has_set_and_what_was_not_submitted(unset):
    assert job_environment() == ENVIRONMENT
    unset.setenv("OMP_WAIT_POLICY", "ACTIVE")
    unset.setenv(SUBMITTED, json.dumps({"runtime_env": {"env_vars": {"OMP_NUM_THREADS": "4"}}, "metadata": {}}))
    assert job_environment() == {n: v for n, v in ENVIRONMENT.items() if n != "OMP_NUM_THREADS"} | {"OMP_WAIT_POLICY": "ACTIVE"}
    unset.setenv(SUBMITTED, json.dumps({"runtime_env": None}))
    assert job_environment()["OMP_NUM_THREADS"] == "1"
