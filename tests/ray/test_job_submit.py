"""`ray job submit` as the README has it: the nodes have the dependencies, and the package is the working directory alone."""

import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from byte_tokenizer import VOCAB_SIZE, byte_tokenizer
from ray.job_submission import JobStatus, JobSubmissionClient
from small_models import save_parent
from waiting import until

ROOT = Path(__file__).parents[2]
SETTINGS = {
    "data.sequence_length": 16,
    "space.attention": ["parent", "noop"],
    "space.ffn": ["parent", "noop"],
    "library.tokens": 256,
    "library.calibration_tokens": 64,
    "library.validation_tokens": 64,
    "library.micro_batch_tokens": 64,
    "profile.repeats": 2,
    "profile.stack": 1,
    "profile.scenario": {"batch_size": 1, "input_tokens": 8, "output_tokens": 2},
    "scoring.tokens": 64,
    "scoring.micro_batch_tokens": 32,
    "search.measure_tokens": 64,
    "search.candidates": 1,
    "search.limits": {"params_fraction": 0.9},
    "search.sweep": {"params_fraction": [0.9]},
    "gkd.tokens": 128,
    "gkd.micro_batch_tokens": 64,
    "evaluate.tokens": 64,
    "evaluate.repeats": 1,
    "evaluate.sample_tokens": 2,
    "cluster.num_shards": 1,
}
HIDDEN = """
from importlib import metadata

found = metadata.Distribution.from_name.__func__

def from_name(cls, name):
    if name.replace("-", "_") == "puzzle_ray":
        raise metadata.PackageNotFoundError(name)
    return found(cls, name)

metadata.Distribution.from_name = classmethod(from_name)
"""  # the package may be installed where the tests run
WHERE = "import puzzle_ray, puzzle_ray.version as v; print('runs from', puzzle_ray.__file__, v.__version__)"


def free_port():
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


@pytest.fixture(scope="module")
def working_directory(tmp_path_factory):
    """A copy of the packages whose sources differ from those of any installed one: preflight would see these on a node."""
    folder = tmp_path_factory.mktemp("checkout")
    for package in ("puzzle_ray", "actors", "jobs"):
        shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    version = folder / "puzzle_ray" / "version.py"
    version.write_text(version.read_text() + '__version__ += "+submitted"\n')
    return folder


@pytest.fixture(scope="module")
def submit(tmp_path_factory, working_directory):
    """Submits a command to a head of its own on loopback; returns (status, exit code, log)."""
    folder, dashboard = tmp_path_factory.mktemp("head"), free_port()
    (folder / "sitecustomize.py").write_text(HIDDEN)
    with tempfile.TemporaryDirectory(prefix="ray-") as sessions:  # a socket's path is short
        kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        path = os.pathsep.join([str(Path(sys.executable).parent), kept["PATH"]])
        # loopback alone needs the second variable, as in a cluster of our own
        ours = {"RAY_AUTH_MODE": "disabled", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "PATH": path, "PYTHONPATH": str(folder)}
        command = ["ray", "start", "--head", "--block", "--node-ip-address=127.0.0.1", f"--port={free_port()}", "--num-cpus=2"]
        command += ["--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={free_port()}"]
        command += [f"--temp-dir={sessions}", f"--object-store-memory={80 << 20}", "--disable-usage-stats"]
        with open(folder / "head.log", "w") as log:
            head = subprocess.Popen(command, env=kept | ours, stdout=log, stderr=log, start_new_session=True)
            try:
                yield Submit(dashboard, working_directory)
            finally:  # the processes that were started here, and no others
                for process in (*psutil.Process(head.pid).children(recursive=True), psutil.Process(head.pid)):
                    with suppress(psutil.NoSuchProcess):
                        process.kill()
                head.wait(30)


class Submit:
    def __init__(self, port, working_directory):
        self.url, self.client, self.started = f"http://127.0.0.1:{port}", None, None
        # one of the variables that the job's own processes are given, too: Ray refuses to be told twice
        self.runtime_env = {"working_dir": str(working_directory), "env_vars": {"OMP_NUM_THREADS": "1"}}
        until(self._connected, "the head answers", 120)

    def _connected(self):
        with suppress(ConnectionError):
            self.client = JobSubmissionClient(self.url)
        return self.client

    def _accepted(self, entrypoint):
        with suppress(RuntimeError):  # the node's agent comes up after the dashboard
            self.started = self.client.submit_job(entrypoint=entrypoint, runtime_env=self.runtime_env)
        return self.started

    def __call__(self, entrypoint, stop_when=None):
        self.started = None
        until(lambda: self._accepted(entrypoint), "the job is accepted", 120)
        job = self.started
        if stop_when:
            until(lambda: stop_when in self.client.get_job_logs(job) or self._over(job), stop_when, 240)
            self.client.stop_job(job)
        until(lambda: self._over(job), "the job ends", 480)
        return self.client.get_job_status(job), self.client.get_job_info(job).driver_exit_code, self.client.get_job_logs(job)

    def _over(self, job):
        return self.client.get_job_status(job).is_terminal()


def test_a_submitted_job_runs_to_the_report_where_the_package_is_not_installed(submit, tmp_path):
    """Stopped first; the same command continues."""
    parent = save_parent(tmp_path / "parent", num_hidden_layers=2, vocab_size=VOCAB_SIZE + 7)
    byte_tokenizer().save_pretrained(parent)
    (tmp_path / "text.txt").write_text("a text of some length. " * 600)
    words = ["--parent", str(parent), "--data", str(tmp_path / "text.txt")]
    words += [word for name, value in SETTINGS.items() for word in ("--set", f"{name}={json.dumps(value)}")]
    compress = ["python", "-m", "jobs.compress", *words]

    command = shlex.join([*compress, "--store", str(tmp_path / "store")])
    status, _, log = submit(command, stop_when="[tokens]")
    assert status == JobStatus.STOPPED, log

    status, code, log = submit(f"{shlex.join(['python', '-c', WHERE])} && {command}")
    assert (status, code) == (JobStatus.SUCCEEDED, 0), log
    (where,) = [line for line in log.splitlines() if line.startswith("runs from")]
    assert "runtime_resources" in where and where.endswith("+submitted")
    assert "[tokens] already there" in log and "serve it: puzzle-ray serve-child" in log
    assert list((tmp_path / "store").glob("report-*/index.html"))
