"""What is found out about a cluster's nodes before work, from what each of them answers."""

from dataclasses import replace

import pytest

from puzzle_ray import preflight
from puzzle_ray.errors import ClusterError
from puzzle_ray.preflight import GIB, Answer, Node, Question, compare, look, parent_files, source_hash

VERSIONS = {"python": "3.11.7", "ray": "2.60.0", "torch": "2.13.0", "transformers": "5.24.0"}
GOOD = Answer(VERSIONS, "0123", "", "abcd", 1, 8 * GIB)
QUESTION = Question("/shared/runs", "/shared/runs/.preflight", "nonce", ("puzzle_ray",), "/models/llama", True)


def node(name, seen=True, gpus=1.0, object_store_bytes=GIB, **changes):
    return Node(name, replace(GOOD, **changes), seen, gpus, object_store_bytes)


def other(package, version):
    return {"versions": VERSIONS | {package: version}}


def test_nodes_that_agree_are_nothing_to_talk_of():
    assert compare(GOOD, [node("a"), node("b", num_gpus=2, gpus=0.0)], QUESTION) == []


@pytest.mark.parametrize(
    ("nodes", "words"),
    [
        (
            [node("b", store_problem="does not hold what the driver wrote"), node("a")],
            "store: '/shared/runs' does not hold what the driver wrote on node b; name a folder that all nodes share, or a URL",
        ),
        ([node("a", seen=False), node("b", seen=False)], "does not show the driver what is written there on nodes a, b;"),
        (
            [node(name, store_problem="cannot be used (ImportError: Install s3fs)") for name in "gfedcba"],
            r"cannot be used \(ImportError: Install s3fs\) on nodes a, b, c, d and 3 more;",
        ),
        ([node("a"), node("b", source="9999")], "another puzzle_ray than the driver's is on node b;"),
        ([node("a", **other("ray", "2.61.0"))], "cluster: ray 2.61.0 is on node a, and 2.60.0 where the driver runs;"),
        ([node("a", **other("torch", "2.12.1"))], "torch 2.12.1 is on node a, and 2.13.0 where the driver runs;"),
        ([node("a", **other("python", "3.12.7"))], "python 3.12.7 is on node a"),
        ([node("a", **other("transformers", "none"))], "transformers none is on node a"),
        ([node("a", parent="")], "parent: '/models/llama' is not on node a; put it into a folder that all nodes share"),
        ([node("a", parent="efgh")], "'/models/llama' holds other files on node a than where the driver runs;"),
        (
            [node("a", gpus=8.0, num_gpus=0), node("b", gpus=8.0, num_gpus=8)],
            r"torch sees fewer GPUs than Ray gives out on node a \(0 of 8 on a\); install a CUDA build",
        ),
    ],
)
def test_what_would_stop_the_run_or_mix_its_results_is_one_line_that_names_the_nodes(nodes, words):
    with pytest.raises(ClusterError, match=words) as error:
        compare(GOOD, nodes, QUESTION)
    assert "\n" not in str(error.value)


def test_small_differences_and_a_small_shm_are_warnings():
    nodes = [node("a", **other("torch", "2.13.1")), node("b", object_store_bytes=12 * GIB), node("c", shm_free_bytes=None)]
    version, shm = compare(GOOD, nodes, QUESTION)
    assert version == "torch 2.13.1 is on node a, and 2.13.0 where the driver runs"
    assert shm.startswith("/dev/shm of node b has 8.00 GiB free, and its object store may take 12.00 GiB:")


def test_gpus_and_the_parent_are_compared_only_where_they_matter():
    nodes = [node("a", gpus=8.0, num_gpus=0, parent="")]
    assert compare(GOOD, nodes, replace(QUESTION, count_gpus=False, parent=None)) == []


def asked(tmp_path, **changes):
    folder = tmp_path / "store" / ".preflight"
    folder.mkdir(parents=True)
    (folder / "driver").write_text("nonce")
    return folder, Question(str(tmp_path / "store"), str(folder), "nonce", ("puzzle_ray",), None, False, **changes)


def test_a_node_reads_what_the_driver_wrote_and_writes_beside_it(tmp_path):
    folder, question = asked(tmp_path)
    answer = look(question, "me")
    assert answer.store_problem == "" and (folder / "me").read_text() == "nonce"
    assert answer.versions["ray"].startswith("2.") and "+" not in answer.versions["torch"] and answer.parent == ""


def test_a_node_without_the_drivers_folder_writes_nothing(tmp_path):
    folder, question = asked(tmp_path)
    elsewhere = tmp_path / "elsewhere"
    answer = look(replace(question, store=str(elsewhere), folder=str(elsewhere / ".preflight")), "me")
    assert answer.store_problem == "does not hold what the driver wrote" and not elsewhere.exists()
    (folder / "driver").write_text("of another run")
    assert look(question, "me").store_problem == "holds something else than the driver wrote"
    unknown = look(replace(question, store="nosuch://bucket"), "me").store_problem
    assert unknown.startswith("cannot be used (StoreError: ")


def test_the_parents_files_are_told_apart_by_config_and_sizes(tmp_path):
    assert parent_files(str(tmp_path)) == ""
    (tmp_path / "config.json").write_text("{}")
    without = parent_files(str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"12345678")
    assert len({"", without, parent_files(str(tmp_path))}) == 3


def test_sources_are_told_apart_by_content(tmp_path, monkeypatch):
    package = tmp_path / "some_package"
    package.mkdir()
    (package / "__init__.py").write_text("x = 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    first = source_hash(["some_package"])
    (package / "notes.txt").write_text("no source")
    assert source_hash(["some_package"]) == first
    (package / "__init__.py").write_text("x = 2\n")
    assert source_hash(["some_package"]) != first and source_hash(["no_such_package"]) != first


def test_torch_that_cannot_be_asked_sees_no_gpu(monkeypatch):
    monkeypatch.setattr(preflight, "COUNT_GPUS", "raise SystemExit(1)")
    assert preflight._gpus_of_torch() == 0
    monkeypatch.setattr(preflight, "COUNT_GPUS", "import os; print(len(os.environ.get('CUDA_VISIBLE_DEVICES', 'all')))")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert preflight._gpus_of_torch() == 3, "what Ray hides is seen"
