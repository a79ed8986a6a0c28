"""The forks that stand for new processes of Ray: they have what their caller gives them, and live and end as it says."""

import json
import os
import subprocess
import sys

import psutil
import pytest
from waiting import until

SAYS = """
import json, os, sys
print(json.dumps([sys.argv, os.getcwd(), os.environ.get("ANSWER"), "torch" in sys.modules, sys.stdin.read(), __name__]))
sys.exit(7)
"""
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nothing is forked")


def test_a_fork_has_the_arguments_variables_folder_and_files_of_its_caller(warm_python, tmp_path):
    script = tmp_path / "says.py"
    script.write_text(SAYS)
    command, environment = [warm_python.executable, "-u", script, "a b"], os.environ | {"ANSWER": "42"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, input="given", capture_output=True, text=True, timeout=240)
    assert done.returncode == 7 and not done.stderr
    assert json.loads(done.stdout) == [[str(script), "a b"], str(tmp_path), "42", True, "given", "__main__"]


def test_what_a_fork_cannot_be_is_a_new_process(warm_python, tmp_path):
    """Code that is in no file, and a worker of another driver: Ray has read the first one's number."""
    code, script = "import sys; print('torch' in sys.modules)", tmp_path / "says.py"
    script.write_text(code)
    for words, job in ((["-c", code], "01000000"), ([script], "02000000")):
        environment = os.environ | {"RAY_JOB_ID": job}
        done = subprocess.run([warm_python.executable, *words], env=environment, capture_output=True, text=True, timeout=240)
        assert done.stdout == "False\n", done.stderr


def test_a_fork_is_killed_with_what_stands_for_it_and_the_next_one_begins(warm_python, tmp_path):
    script, said = tmp_path / "sleeps.py", tmp_path / "pid"
    script.write_text(f"import os, time; open({str(said)!r}, 'w').write(str(os.getpid())); time.sleep(600)")
    with subprocess.Popen([warm_python.executable, script]) as standing_in:
        until(lambda: said.exists() and said.read_text(), "the fork runs", 120)
        fork = psutil.Process(int(said.read_text()))
        assert fork.pid != standing_in.pid and fork.is_running()
        standing_in.kill()
    until(lambda: not fork.is_running(), "the fork is gone")
    script.write_text("import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    assert subprocess.run([warm_python.executable, script], timeout=240).returncode == 128 + 9
