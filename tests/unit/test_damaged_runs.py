"""Damage in a finished run: said in one line by the next stage that reads it; the same command makes that again and nothing else."""

import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from s3_server import s3_bucket
from safetensors import safe_open
from small_models import save_parent
from small_runs import SMALL, save_parent_with_text

from jobs.run import stages
from puzzle_ray.errors import ConfigError, Damaged
from puzzle_ray.models.checkpoint import locate
from puzzle_ray.pipeline import compress
from puzzle_ray.progress import Quiet
from puzzle_ray.search.narrow import read_architectures
from puzzle_ray.store import RECORD, SCHEMA_VERSION, Artifact, Store, adding_items, artifact_at, files
from puzzle_ray.store.upkeep import artifacts, verify

VARIANT = "layer_001.ffn.ffn-24.safetensors"


@pytest.fixture(scope="module")
def run_once(tmp_path_factory):
    """(settings without a store, a store with a finished run)."""
    folder = tmp_path_factory.mktemp("run")
    parent, text = save_parent_with_text(folder / "parent")
    settings = SMALL | {"parent": str(parent), "data.train": str(text)}
    torch.set_num_threads(1)  # as when a process of its own begins
    compress(settings=settings, store=str(folder / "store"), progress=Quiet())
    return settings, folder / "store"


@pytest.fixture
def run(run_once, tmp_path):
    """A copy of the finished run that may be damaged: (a function that gives the same command, its store)."""
    settings, finished = run_once
    shutil.copytree(finished, tmp_path / "store")

    def again():
        files._KNOWN.clear()  # a new process remembers nothing
        torch.set_num_threads(1)
        return compress(settings=settings, store=str(tmp_path / "store"), progress=Quiet())

    return again, tmp_path / "store"


@pytest.fixture
def written(monkeypatch):
    """`<stage>/<file>` of everything that is added to a store."""
    found, put, publish = [], Artifact._put, Artifact.folder_to_publish

    def noted_put(self, name, *how):
        put(self, name, *how)
        found.append(f"{self.stage}/{name}")

    def noted_publish(self, name):
        found.append(f"{self.stage}/{name}")
        return publish(self, name)

    monkeypatch.setattr(Artifact, "_put", noted_put)
    monkeypatch.setattr(Artifact, "folder_to_publish", noted_publish)
    return found


def test_one_process_says_of_its_stages_what_the_command_says(run, capsys):
    """What was dropped, what is only estimated, what stands out, and that a child was not improved."""
    again, store = run
    again()
    said, with_lines = capsys.readouterr().err.splitlines(), ("tokens", "profile", "library", "gkd")
    lines = {name: stages()[name].said(artifact_at(str(of(store, name)))[0].facts()) for name in with_lines}
    assert [line for line in said if line.startswith("  ")] == [f"  {line}" for line in lines.values() if line]
    assert lines["tokens"] and lines["library"] and lines["gkd"]


def of(store, stage):
    return next(store.glob(f"{stage}-*"))


def flip(path):
    """One bit, somewhere behind the header of a file of tensors or tokens."""
    data = bytearray(path.read_bytes())
    data[random.Random(0).randrange(len(data) * 3 // 4, len(data))] ^= 4
    path.write_bytes(data)


def contents(store):
    """All files by name, but for records, which say when they were written, and what was timed."""
    files = (path for path in store.rglob("*") if path.is_file() and path.name not in (RECORD, "evaluation.json"))
    return {path.relative_to(store).as_posix(): content(path) for path in files}


def content(path):
    """Bytes; of a safetensors file, whose metadata have no order, what is in it."""
    if path.suffix != ".safetensors":
        return path.read_bytes()
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name).numpy().tobytes() for name in file.keys()} | {"": file.metadata() or {}}  # noqa: SIM118


FLIPPED = {  # the file, the stages that have to be done because they are not there, and what is made again for the flipped bit
    "library": (f"library-*/{VARIANT}", ("scores",), {f"library/{VARIANT}"}),
    "child": ("child-*/child/model.safetensors", ("gkd",), {"child/child"}),
    "tokens": ("tokens-*/all/000000.arrow", ("library",), {"tokens/all/000000.arrow"}),
}


@pytest.mark.parametrize("stage", FLIPPED)
def test_a_flipped_bit_is_one_line_and_the_same_command_mends_it(run, written, stage):
    again, store = run
    file, missing, mended = FLIPPED[stage]
    before = contents(store)
    for name in missing:
        shutil.rmtree(of(store, name))
    flip(next(store.glob(file)))
    with pytest.raises(Damaged) as damage:
        again()
    assert str(damage.value).startswith(f"{stage}: ") and "its checksum is not the one" in str(damage.value)
    assert "run the command that made it again" in str(damage.value) and "\n" not in str(damage.value)
    written.clear()
    again()
    others = {name for name in written if name.startswith(f"{stage}/") and "/checkpoints/" not in name}
    assert others - {f"{stage}/{RECORD}", "library/library.parquet", "library/curves.parquet"} == mended
    assert contents(store) == before and not any(verify(Store(str(store))).values())


def empty_record(store):
    (of(store, "library") / RECORD).write_bytes(b"")


def other_schema(store):
    record = of(store, "scores") / RECORD
    record.write_text(json.dumps(json.loads(record.read_text()) | {"schema": 2}))


def emptied_item(store):
    (of(store, "scores") / RECORD).unlink()
    next(of(store, "scores").glob("items/*")).write_bytes(b"")


SEEN_AT_ONCE = {
    "a file is cut short": lambda store: (of(store, "library") / VARIANT).write_bytes(b"short"),
    "a file is missing": lambda store: (of(store, "library") / VARIANT).unlink(),
    "a folder is missing": lambda store: shutil.rmtree(of(store, "child") / "child"),
    "a record is empty": empty_record,
    "a record is of another schema": other_schema,
    "an item of an unfinished stage is empty": emptied_item,
}


@pytest.mark.parametrize("how", SEEN_AT_ONCE)
def test_what_names_and_sizes_tell_is_mended_without_a_word_from_the_user(run, how, capsys):
    again, store = run
    before = contents(store)
    SEEN_AT_ONCE[how](store)
    again()
    assert contents(store) == before and not any(verify(Store(str(store))).values())
    assert {listed.state for listed in artifacts(Store(str(store))) if listed.stage != "exact_scores"} == {"finished"}


# folders that are handed on by their address


@pytest.fixture(scope="module")
def s3_url():
    with s3_bucket() as url:
        yield url


@pytest.fixture(params=["folder", "s3"])
def tiny_parent(request, tmp_path):
    """A published parent, as recipe `tiny` makes one: in a folder or on an object store."""
    root = str(tmp_path / "store") if request.param == "folder" else f"{request.getfixturevalue('s3_url')}/{tmp_path.name}"
    artifact = Store(root).artifact("tiny_parent", {}, {})
    with artifact.folder_to_publish("parent") as folder:
        save_parent(folder / "model")
    artifact.finish({})
    return artifact


def test_a_parent_in_a_store_is_verified_by_whoever_is_handed_its_address(tiny_parent, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    address = f"{tiny_parent.path('parent')}/model"
    found, inside = artifact_at(address)
    assert (found.url, inside) == (tiny_parent.url, "parent/model")
    assert (locate(address) / "model.safetensors").is_file()

    path, filesystem = f"{address}/model.safetensors", tiny_parent.store.filesystem
    data = bytearray(filesystem.cat_file(path))
    data[-9] ^= 1
    filesystem.pipe_file(path, bytes(data))
    with pytest.raises(Damaged, match="tiny_parent: .*/parent/model/model.safetensors is damaged"):
        locate(address)
    assert tiny_parent.state() == "damaged", "the next run of the command sees it at once"
    filesystem.pipe_file(f"{tiny_parent.url}/{RECORD}", b"")
    with pytest.raises(Damaged, match=f"{RECORD} cannot be read"):
        locate(address)


def test_other_folders_are_read_as_they_are(tmp_path):
    folder = save_parent(tmp_path / "some-0123456789ab" / "model")
    assert locate(str(folder)) == folder, "no record, nothing to compare"
    assert artifact_at(str(tmp_path / "elsewhere")) is None and artifact_at("s3://library-0123456789ab/x") is None


def test_an_architecture_of_another_version_or_a_damaged_one_is_no_narrower_space(tmp_path):
    artifact = Store(str(tmp_path)).artifact("architecture", {}, {})
    artifact.write_json("architecture.json", {"choices": [{"attention": "noop", "ffn": "parent"}]})
    artifact.finish({})
    assert len(read_architectures(artifact.url)) == 1
    path = Path(artifact.path("architecture.json"))
    path.write_text(path.read_text().replace("noop", "nope"))
    with pytest.raises(Damaged, match="architecture: .*its checksum is not the one"):
        read_architectures(artifact.url)
    record = Path(artifact.path(RECORD))
    record.write_text(json.dumps(json.loads(record.read_text()) | {"schema": 2}))
    with pytest.raises(
        ConfigError, match=rf"was written by an older version \(schema 2, this one reads {SCHEMA_VERSION}\); search again"
    ):
        read_architectures(artifact.url)


def test_items_that_all_budgets_share_are_added_by_one_run_at_a_time_and_mended(tmp_path):
    artifact, said = Store(str(tmp_path)).artifact("measured", {}, {}), []
    artifact.write_json("children/a.json", 1)
    Path(artifact.path("children/b.json")).write_bytes(b"")
    with adding_items(artifact, said.append):
        assert artifact.names("children") == ["a.json"] and artifact.claim is not None
    assert said == ["[measured] children/b.json was damaged and is made again"] and artifact.claim is None


def test_a_record_says_how_many_seconds_its_stage_took(run):
    again, store = run
    shutil.rmtree(of(store, "scores"))
    again()
    found = {path.parent.name.rpartition("-")[0]: json.loads(path.read_text()) for path in store.glob(f"*/{RECORD}")}
    assert all(0 <= record["seconds"] < 600 for record in found.values())
    assert not [name for record in found.values() for name in record["files"] if "seconds" in name]
