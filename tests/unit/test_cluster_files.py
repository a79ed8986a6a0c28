"""The files of `cluster/`: what Ray and Kubernetes would refuse is refused here."""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
import yaml
from kuberay_fields import KINDS
from packaging.requirements import Requirement

import jobs
from puzzle_ray.config import load
from puzzle_ray.profiling.nodes import described

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"
LAUNCHER = ("aws.yaml", "gcp.yaml")
MANIFESTS = ("raycluster.yaml", "rayjob.yaml", "rayservice.yaml", "redis.yaml")
PLACEHOLDER = re.compile(r"YOUR(?:-[A-Z]+)+")


def documents(name):
    return list(yaml.safe_load_all((CLUSTER / name).read_text()))


def ray_resource(name):
    (found,) = [document for document in documents(name) if document["apiVersion"] == "ray.io/v1"]
    return found


def cluster_spec(name):
    spec = ray_resource(name)["spec"]
    return spec.get("rayClusterSpec") or spec.get("rayClusterConfig") or spec


def filled_in(text):
    """Placeholders as a user would fill them in."""
    return text.replace("YOUR-ADDRESS", "192.0.2.1").replace("YOUR-PROJECT", "a-project")


# the launcher


@pytest.mark.parametrize("name", LAUNCHER)
def test_ray_takes_the_launchers_file(name):
    from ray.autoscaler._private.util import prepare_config, validate_config

    validate_config(prepare_config(yaml.safe_load(filled_in((CLUSTER / name).read_text()))))  # raises for what it does not take


@pytest.mark.parametrize("name", LAUNCHER)
def test_ray_refuses_a_launchers_file_with_a_mistake(name):
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = yaml.safe_load((CLUSTER / name).read_text())
    config["available_node_types"]["h100"]["label"] = config["available_node_types"]["h100"].pop("labels")
    with pytest.raises(jsonschema.ValidationError, match="label"):
        validate_config(prepare_config(config))


@pytest.mark.parametrize("name", LAUNCHER)
def test_a_launched_cluster_is_as_a_run_wants_it(name):
    config = yaml.safe_load((CLUSTER / name).read_text())
    types, docker = config["available_node_types"], config["docker"]
    assert types[config["head_node_type"]]["resources"] == {"CPU": 0}, "the head has no CPUs for work"
    assert types["h100"]["labels"]["ray.io/accelerator-type"] == "H100" and types["h100"]["resources"]["GPU"] == 8
    assert types["cpu-spot"]["labels"]["ray.io/market-type"] == "spot"
    options = {"head": docker["head_run_options"], "cpu-spot": docker["worker_run_options"]}
    options["h100"] = types["h100"]["docker"]["worker_run_options"]
    assert all(any(option.startswith("--shm-size=") for option in those) for those in options.values())
    assert "-e RAY_AUTH_MODE=token" in docker["run_options"] and "/home/ray/.ray/auth_token" in config["file_mounts"]
    assert all("--dashboard-host=127.0.0.1" in line for line in config["head_start_ray_commands"] if "--head" in line)
    identity = {"aws": "IamInstanceProfile", "gcp": "serviceAccounts"}[config["provider"]["type"]]
    assert all(identity in node["node_config"] for node in types.values()), "every node has its role"
    market = {"aws": ("InstanceMarketOptions", {"MarketType": "spot"}), "gcp": ("scheduling", {"provisioningModel": "SPOT"})}
    field, wanted = market[config["provider"]["type"]]
    assert wanted.items() <= types["cpu-spot"]["node_config"][field].items()


# Kubernetes


@pytest.mark.parametrize("name", MANIFESTS)
def test_kubernetes_knows_every_field_of_a_manifest(name):
    for document in documents(name):
        jsonschema.validate(document, KINDS[document["kind"]])


@pytest.mark.parametrize(
    ("name", "path", "value"),
    [
        ("raycluster.yaml", ("rayVersion",), 2.6),
        ("raycluster.yaml", ("headGroupSpec", "rayStartParams", "num-cpus"), 0),
        ("raycluster.yaml", ("workerGroupSpecs", 0, "label"), {"a": "b"}),
        ("rayjob.yaml", ("workerGroupSpecs", 1, "maxReplicas"), "16"),
        ("rayservice.yaml", ("authOptions", "mode"), "tokens"),
    ],
)
def test_a_mistake_in_a_manifest_is_refused(name, path, value):
    resource = copy.deepcopy(ray_resource(name))
    spec = resource["spec"]
    inner = spec.get("rayClusterSpec") or spec.get("rayClusterConfig") or spec
    for part in path[:-1]:
        inner = inner[part]
    inner[path[-1]] = value
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(resource, KINDS[resource["kind"]])


@pytest.mark.parametrize("name", MANIFESTS[:3])
def test_a_cluster_on_kubernetes_is_as_a_run_wants_it(name):
    spec = cluster_spec(name)
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0" and spec["authOptions"] == {"mode": "token"}
    groups = [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
    for pod in (group["template"]["spec"] for group in groups):
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        for container in pod["containers"]:
            mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
            assert volumes[mounts["/dev/shm"]]["emptyDir"]["medium"] == "Memory"
    assert spec["enableInTreeAutoscaling"] and spec["autoscalerOptions"]["version"] == "v2"
    if name != "rayjob.yaml":  # a job's cluster goes with it; a retry is a new one
        assert spec["gcsFaultToleranceOptions"]["redisAddress"].startswith("puzzle-ray-redis:")


def test_the_jobs_entrypoint_is_a_verb_with_settings_that_load():
    spec = ray_resource("rayjob.yaml")["spec"]
    python, flag, module, *words = spec["entrypoint"].split()
    assert (python, flag) == ("python", "-m") and Path(jobs.__path__[0], f"{module.removeprefix('jobs.')}.py").is_file()
    options = dict(zip(words[::2], words[1::2], strict=True))
    assert options.keys() == {"--recipe", "--data", "--store", "--set"}
    found = load(options["--recipe"], overrides=tuple(words[n + 1] for n, word in enumerate(words) if word == "--set"))
    assert found.cluster.autoscaling and described(found.hardware)[:2] == (1, 8), (
        "nodes that come later are seen by nobody before"
    )
    assert spec["backoffLimit"] >= 1 and yaml.safe_load(spec["runtimeEnvYAML"])


def test_serve_takes_the_services_config():
    from ray.serve.schema import ServeDeploySchema

    config = ServeDeploySchema.model_validate(yaml.safe_load(ray_resource("rayservice.yaml")["spec"]["serveConfigV2"]))
    assert [application.import_path for application in config.applications] == ["actors.serve:build"]


# all of them


def test_the_runtime_environment_is_one_that_ray_takes():
    from ray.runtime_env import RuntimeEnv

    RuntimeEnv(**yaml.safe_load((CLUSTER / "runtime_env.yaml").read_text()))
    with pytest.raises(TypeError):
        RuntimeEnv(env_vars={"A": 1})


def test_every_file_means_the_same_ray_and_one_that_the_package_takes():
    (pinned,) = re.findall(r"^ARG RAY_VERSION=(\S+)$", (CLUSTER / "Dockerfile").read_text(), re.MULTILINE)
    assert {cluster_spec(name)["rayVersion"] for name in MANIFESTS[:3]} == {pinned}
    project = (ROOT / "pyproject.toml").read_text()
    (wanted,) = [Requirement(text) for text in re.findall(r'"(ray\[[^"]+)"', project)]
    assert wanted.specifier.contains(pinned)


@pytest.mark.parametrize("name", [*LAUNCHER, *MANIFESTS])
def test_what_a_user_fills_in_is_named_at_the_top(name):
    lines = (CLUSTER / name).read_text().splitlines()
    top = [line for line in lines if line.startswith("#")]
    body = [line for line in lines if not line.startswith("#")]
    assert set(PLACEHOLDER.findall("\n".join(body))) == set(PLACEHOLDER.findall("\n".join(top)))
    assert not re.search(r"password: *\w|token: *\w", "\n".join(body)), "no secret is written down"


# the images

STEP = re.compile(r"^(FROM|ARG|WORKDIR|COPY|RUN)\s+(.*)$")


def stages():
    """Target -> its steps, (instruction, rest) each."""
    found = {}
    for line in (CLUSTER / "Dockerfile").read_text().splitlines():
        if not line or line.startswith("#"):
            continue
        step = STEP.match(line)
        assert step, f"no step of ours: {line}"
        instruction, rest = step.groups()
        if instruction == "FROM":
            found[rest.rpartition(" AS ")[2]] = steps = []
        elif found:
            steps.append((instruction, rest))
    return found


PIP = """#!/bin/sh
# Installs this folder as pip does, without its dependencies: they are here already.
case "$*" in *torch*) exit 0;; esac
exec {python} -m pip install --quiet --no-deps --no-index --no-build-isolation --target "$SITE" .
"""
PUZZLE_RAY = """#!/bin/sh
PYTHONPATH="$SITE" exec {python} "$SITE/bin/puzzle-ray" "$@"
"""
PYTHON = """#!/bin/sh
PYTHONPATH="$SITE" exec {python} "$@"
"""


@pytest.mark.parametrize("target", ["cpu", "gpu"])
@pytest.mark.wide
def test_the_images_steps_install_a_package_that_runs(target, tmp_path):
    """Every RUN of a target, in the folder that its COPYs make. pip takes what is installed here for the dependencies."""
    work, site, tools = tmp_path / "work", tmp_path / "site", tmp_path / "tools"
    work.mkdir()
    tools.mkdir()
    for name, text in (("pip", PIP), ("puzzle-ray", PUZZLE_RAY), ("python", PYTHON)):
        (tools / name).write_text(text.format(python=sys.executable))
        (tools / name).chmod(0o755)
    environment = {**os.environ, "SITE": str(site), "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}"}
    environment.pop("PYTHONPATH", None)
    said = ""
    for instruction, rest in stages()[target]:
        if instruction == "COPY":
            *names, to = [word for word in rest.split() if not word.startswith("--")]
            for name in names:
                source = ROOT / name
                where = work / to if source.is_dir() else work / to / name
                shutil.copytree(source, where) if source.is_dir() else shutil.copy(source, where)
        elif instruction == "RUN":
            done = subprocess.run(["bash", "-euc", rest], cwd=work, env=environment, capture_output=True, text=True, timeout=240)
            assert done.returncode == 0, done.stderr
            said += done.stdout
    from puzzle_ray.version import __version__

    assert said.strip() == __version__
    installed = json.dumps(sorted(path.name for path in (site / "puzzle_ray" / "recipes").iterdir()))
    assert "tiny.yaml" in installed and "llama31_8b.yaml" in installed


# the board


def test_the_board_draws_every_gauge_of_ours_and_only_what_there_is():
    """Ray's own metrics are those that its own boards draw."""
    import ray

    from actors.metrics import GAUGES, PREFIX

    board = json.loads((CLUSTER / "grafana.json").read_text())
    drawn = {
        name for panel in board["panels"] for target in panel["targets"] for name in re.findall(r"\bray_\w+", target["expr"])
    }
    ours = {name for name in drawn if name.startswith(f"ray_{PREFIX}")}
    assert ours == {f"ray_{PREFIX}{name}" for name in GAUGES}
    boards = Path(ray.__file__).parent / "dashboard" / "modules" / "metrics" / "dashboards"
    known = "".join(file.read_text() for file in boards.glob("*.py"))
    assert drawn - ours and all(name in known for name in drawn - ours)
    for panel in board["panels"]:
        for target in panel["targets"]:
            name = re.search(rf"ray_{PREFIX}(\w+)", target["expr"])
            asked = set(re.findall(r"{{(\w+)}}", target["legendFormat"]))
            assert name is None or asked <= set(GAUGES[name[1]][1]), target


# the walk


def test_the_walk_names_files_verbs_and_options_that_there_are(capsys):
    from jobs.app import run

    text = (CLUSTER / "README.md").read_text()
    listed = set(re.findall(r"`([\w.]+\.(?:yaml|json)|Dockerfile)`", text.partition("\n## ")[0]))
    assert listed == {path.name for path in CLUSTER.iterdir() if path.name != "README.md"}
    for verb in set(re.findall(r"puzzle-ray ([a-z][a-z-]+)", text)) - {"child", "head"}:
        assert run([verb, "--help"]) == 0, verb
        shown = capsys.readouterr().out
        for options in re.findall(rf"puzzle-ray {verb}([^\n`;]*)", text):
            for option in re.findall(r"(--[a-z-]+)", options):
                assert option in shown or verb == "store", (verb, option)
    settings = re.findall(r"--set +([\w.]+=\S+?)(?=[\s`;]|$)", text.replace("\n", " "))
    assert len(settings) >= 5 and load("llama31_8b", overrides=tuple(dict.fromkeys(settings))).cluster.autoscaling


def test_the_worked_example_shows_what_plan_says():
    from typer.testing import CliRunner

    from jobs.app import application

    text = (CLUSTER / "README.md").read_text()
    done = CliRunner().invoke(application(), ["plan", "--recipe", "llama31_8b", "--cluster", "1x8 H100-80GB"])
    shown = [line for line in done.stdout.splitlines() if "published shape" not in line]
    assert "\n".join(f"    {line}" if line else "" for line in shown) in text
    config = load("llama31_8b")
    assert config.library.tokens == 1_000_000_000 and config.gkd.tokens == 5_000_000_000 and config.scoring.tokens == 131_072
