"""A Python whose processes begin with torch, transformers and Ray imported: each is a fork of one process that imported them once.

Ray starts hundreds of processes in a run of the tests: workers, and two or three for each node. Imports take three seconds of CPU time
of each new one. The Rays that tests start in their own process begin so; the commands that tests run as a user would have new processes.

`WarmPython.executable` is a small script that stands for the fork: it hands its arguments, environment and files to the process that
forks, ends when the fork ends, and the fork is killed when the script is.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import pkgutil
import runpy
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path

ROOT = Path(__file__).parents[1]
STAND_IN = """#!{python} -IS
import json, os, socket, sys
with socket.socket(socket.AF_UNIX) as fork:
    fork.connect({address!r})
    request = json.dumps([sys.argv[1:], dict(os.environ), os.getcwd()]).encode()
    socket.send_fds(fork, [len(request).to_bytes(8, "big")], [0, 1, 2])
    fork.sendall(request)
    os._exit(int.from_bytes(fork.recv(1), "big"))
"""
PACKAGES = ("puzzle_ray", "actors", "ray.dashboard.modules")  # with all that is in them
MODULES = (
    *("ray.dashboard.agent", "ray.train.torch", "ray.tune", "ray.serve", "torch._dynamo", "torch.distributed.fsdp"),
    *("transformers.models.llama.modeling_llama", "pyarrow.parquet", "s3fs"),
)
DIES_WITH_ITS_PARENT = 1  # PR_SET_PDEATHSIG of prctl(2)
JOB = "01000000"  # the first of a cluster: that of the tests' own process
UNBUFFERED, WITHOUT_SITE = "-u", ("-s", "-S")  # the options that Ray passes on


class WarmPython:
    """While it is open, there is a process that forks. On Linux alone: elsewhere it is the plain Python."""

    _process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> WarmPython:
        if sys.platform != "linux":
            self.executable = Path(sys.executable)
            return self
        self._folder = Path(tempfile.mkdtemp(prefix="warm-"))  # not pytest's: a socket's path is short
        address = str(self._folder / "socket")
        self.executable = self._folder / "python"
        self.executable.write_text(STAND_IN.format(python=sys.executable, address=address))
        self.executable.chmod(0o700)
        with socket.socket(socket.AF_UNIX) as listening:  # before it forks: who asks meanwhile waits
            listening.bind(address)
            listening.listen(512)
            paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
            command = [sys.executable, __file__, str(listening.fileno()), str(self.executable)]
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, pass_fds=[listening.fileno()], env=os.environ | {"PYTHONPATH": paths}
            )
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self._process.communicate(timeout=60)
            shutil.rmtree(self._folder)

    @contextmanager
    def used(self) -> Iterator[None]:
        """A Ray or a node that is started here starts its Python processes so, then and later."""
        assert self._process is None or self._process.poll() is None, "the process that forks has ended; what it said is above"
        python, sys.executable = sys.executable, str(self.executable)
        try:
            yield
        finally:
            sys.executable = python


class Forks:
    """The process that forks, and what it knows of its children."""

    def __init__(self, listening: socket.socket) -> None:
        self.listening = listening
        self.of_children: dict[int, socket.socket] = {}  # to their stand-ins, by process id
        self.ended, self._wake = os.pipe()
        os.set_blocking(self._wake, False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(self._wake)

    def until_asked(self) -> list[str] | None:
        """Returns in each child, with its arguments, and None in this process when nobody needs it any more."""
        while True:
            ready, _, _ = select.select([0, self.ended, self.listening, *self.of_children.values()], [], [])
            if 0 in ready:
                break
            for pid in [pid for pid, stand_in in self.of_children.items() if stand_in in ready]:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                self.of_children.pop(pid).close()
            if self.ended in ready:
                os.read(self.ended, 4096)
                self._reap()
            if self.listening in ready:
                stand_in, _ = self.listening.accept()
                try:
                    request = self._request(stand_in)
                except (OSError, ValueError):  # it was killed as it began
                    stand_in.close()
                    continue
                pid = os.fork()
                self.of_children[pid] = stand_in
                if not pid:
                    return self._become(*request)
                for file in request[0]:
                    os.close(file)
        for pid in self.of_children:
            os.kill(pid, signal.SIGKILL)
        return None

    def _request(self, stand_in: socket.socket) -> tuple[list[int], list[str], dict[str, str], str]:
        size, files, _, _ = socket.recv_fds(stand_in, 8, 3)
        with stand_in.makefile("rb") as stream:
            arguments, environment, folder = json.loads(stream.read(int.from_bytes(size, "big")))
        return files, arguments, environment, folder

    def _reap(self) -> None:
        while self.of_children:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                return
            with self.of_children.pop(pid) as stand_in, suppress(OSError):  # it may be killed by now
                code = os.waitstatus_to_exitcode(status)
                stand_in.send(bytes([code if code >= 0 else 128 - code]), socket.MSG_NOSIGNAL)

    def _become(self, files: list[int], arguments: list[str], environment: dict[str, str], folder: str) -> list[str]:
        """This process is the child."""
        from ray._raylet import Config

        ctypes.CDLL(None).prctl(DIES_WITH_ITS_PARENT, signal.SIGKILL)
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for number, file in enumerate(files):
            os.dup2(file, number)
            os.close(file)
        for file in (self.ended, self._wake, self.listening.detach(), *(s.detach() for s in self.of_children.values())):
            os.close(file)
        os.environ.clear()
        # Ray's processes look whether their raylet lives: here, the stand-in ends with it
        os.environ.update(environment | {"RAY_RAYLET_PID": str(os.getppid())})
        Config.initialize("")  # Ray reads its other variables again
        os.chdir(folder)
        return arguments


def main(listening: socket.socket, stand_in: str) -> None:
    # Ray reads these when it is imported, and never again
    os.environ.update({"RAY_RAYLET_PID": str(os.getpid()), "RAY_JOB_ID": JOB})
    for name in PACKAGES:
        for module in pkgutil.walk_packages(import_module(name).__path__, f"{name}."):
            with suppress(ImportError):  # what it needs is an extra that is not installed
                import_module(module.name)
    for name in MODULES:
        import_module(name)
    gc.collect()
    gc.freeze()  # none of it dies, and no child looks through it
    arguments = Forks(listening).until_asked()
    if arguments is not None:
        run(arguments, stand_in)


def run(arguments: list[str], stand_in: str) -> None:
    """What `python ARGUMENTS` does."""
    while arguments[0] in (UNBUFFERED, *WITHOUT_SITE):
        if arguments.pop(0) == UNBUFFERED:
            sys.stdout.reconfigure(write_through=True)
    script = arguments[0]
    if not script.endswith(".py") or os.environ.get("RAY_JOB_ID", JOB) != JOB:  # that, a fork cannot be
        os.execv(sys.executable, [sys.executable, *arguments])
    sys.executable, sys.argv = stand_in, arguments  # what it starts itself is a fork too
    sys.path[sys.path.index(str(Path(__file__).parent))] = str(Path(script).parent)
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])  # as in all processes of Ray
    main(socket.socket(fileno=int(sys.argv[1])), sys.argv[2])
