"""Where text may come from: which files a name means, over which ways, and what its content is known by."""

import functools
import http.server
import json
import os
import threading

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub import HfApi

from puzzle_ray.data.documents import TextFacts, documents
from puzzle_ray.data.files import find_files
from puzzle_ray.data.settings import DataConfig
from puzzle_ray.data.sources import check_source, hub_commit, source_fingerprint
from puzzle_ray.errors import DataError

TEXTS = ["one", "two", "three"]


def read(source, **settings):
    check_source(str(source), "data.train")
    facts = TextFacts()
    return list(documents(str(source), DataConfig(**settings), "data.train", facts=facts)), facts


def write_jsonl(path, texts=TEXTS):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.fixture
def served(tmp_path):
    """(a folder, its URL)."""

    class Silent(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    folder = tmp_path / "served"
    folder.mkdir()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Silent, directory=folder))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield folder, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("name", ["folder[v2]/train.jsonl", "what?.jsonl", "a*b/x.jsonl", "TRAIN.JSONL", "with space.jsonl"])
def test_a_name_that_exists_is_taken_literally(tmp_path, name):
    path = write_jsonl(tmp_path / name)
    assert read(path)[0] == TEXTS
    assert read(path.parent)[0] == TEXTS


@pytest.mark.parametrize("pattern", ["*.jsonl", "part-[01].jsonl", "../*/part-?.jsonl", "../**/*.jsonl"])
def test_globs(tmp_path, pattern):
    write_jsonl(tmp_path / "data" / "part-0.jsonl", TEXTS[:2])
    write_jsonl(tmp_path / "data" / "part-1.jsonl", TEXTS[2:])
    assert read(f"{tmp_path}/data/{pattern}")[0] == TEXTS


@pytest.mark.parametrize(("pattern", "texts"), [("*.txt", ["a"]), ("./*.txt", ["a"]), ("**", ["a", "b"]), ("data/**", ["b"])])
def test_globs_below_the_working_folder_pass_over_hidden_files(tmp_path, monkeypatch, pattern, texts):
    (tmp_path / "data" / ".cache").mkdir(parents=True)
    for name, text in (("a.txt", "a"), (".a.txt", "hidden"), ("data/b.txt", "b"), ("data/.cache/b.txt", "hidden")):
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    assert read(pattern)[0] == texts


def test_what_is_about_the_data_is_left_out_of_folders_and_said(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    for name in ("README.md", "LICENSE.txt", "dataset_infos.json", "LICENSE", "table.csv"):
        (tmp_path / name).write_text("about")
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "b.txt").write_text("hidden")
    texts, facts = read(tmp_path)
    assert texts == ["text"]
    assert sorted(os.path.basename(name) for name in facts.left_out) == sorted(
        ["README.md", "LICENSE.txt", "dataset_infos.json", "LICENSE", "table.csv"]
    )
    assert facts.line() == "1 document, 5 files left out (LICENSE, LICENSE.txt, README.md, ...)"
    assert read(tmp_path / "README.md")[0] == ["about"]


def test_what_is_about_the_data_in_other_languages_and_of_other_licences(tmp_path):
    about = ["README_ja.md", "LICENSE_GPL.md", "license-mit.txt", "dataset-card.md", "Data Card.md"]
    for name in ("cards.txt", "notice_board.txt", "readmeans.txt"):
        (tmp_path / name).write_text(name)
    for name in about:
        (tmp_path / name).write_text("about")
    texts, facts = read(tmp_path)
    assert texts == ["cards.txt", "notice_board.txt", "readmeans.txt"]
    assert sorted(os.path.basename(name) for name in facts.left_out) == sorted(about)


@pytest.mark.parametrize("pattern", ["", "**/*.txt"])
def test_linked_folders_are_read_and_broken_links_are_counted(tmp_path, pattern):
    (tmp_path / "data" / "sub").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "data" / "sub" / "a.txt").write_text("a")
    (tmp_path / "elsewhere" / "b.txt").write_text("b")
    (tmp_path / "data" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "broken.txt").symlink_to(tmp_path / "nowhere.txt")
    texts, facts = read(f"{tmp_path}/data/{pattern}")
    assert sorted(texts) == ["a", "b"] and facts.line() == "2 documents, 1 file left out (broken.txt)"


def test_a_link_back_to_its_own_folder_ends(tmp_path):
    (tmp_path / "data" / "sub").mkdir(parents=True)
    (tmp_path / "data" / "a.txt").write_text("a")
    (tmp_path / "data" / "sub" / "back").symlink_to(tmp_path / "data")
    texts, facts = read(tmp_path / "data")
    assert texts == ["a"] and facts.line() == "1 document, 1 file left out (back)"
    assert read(f"{tmp_path}/data/**/*.txt")[0] == read(f"{tmp_path}/data/sub/../**/*.txt")[0] == ["a"]


def test_rows_in_a_file_of_any_name_are_text(tmp_path):
    write_jsonl(tmp_path / "authors.jsonl")
    assert read(tmp_path)[0] == TEXTS


def test_over_http(served):
    folder, url = served
    write_jsonl(folder / "train.jsonl")
    write_jsonl(folder / "folder[v2]" / "more.jsonl")
    (folder / "folder[v2]" / "README.md").write_text("about")
    pq.write_table(pa.table({"text": TEXTS}), folder / "x.parquet")
    for source in ("train.jsonl", "train.jsonl?download=1", "folder[v2]/more.jsonl", "folder[v2]/", "*.jsonl", "x.parquet"):
        assert read(f"{url}/{source}")[0] == TEXTS, source
    assert [os.path.basename(name) for name in read(f"{url}/folder[v2]/")[1].left_out] == ["README.md"]


def test_in_a_store_with_urls():
    memory = fsspec.filesystem("memory")
    lines = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()
    memory.pipe({"/texts/train[1]/a.jsonl": lines, "/texts/train[1]/README.md": b"about"})
    for source in ("memory://texts/train[1]/a.jsonl", "memory://texts/train[1]", "memory://texts/*/a.jsonl"):
        assert read(source)[0] == TEXTS, source
    assert [file.name for file in find_files("memory://texts/train[1]").files] == ["memory:///texts/train[1]/a.jsonl"]


def test_s3(tmp_path, monkeypatch):
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    try:
        _, port = server.get_host_and_port()
        for name, value in (("AWS_ACCESS_KEY_ID", "x"), ("AWS_SECRET_ACCESS_KEY", "x"), ("AWS_DEFAULT_REGION", "us-east-1")):
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        filesystem = fsspec.filesystem("s3", skip_instance_cache=True)
        filesystem.mkdir("texts")
        path = write_jsonl(tmp_path / "a.jsonl")
        filesystem.pipe("texts/run[1]/a.jsonl", path.read_bytes())
        for source in ("s3://texts/run[1]/a.jsonl", "s3://texts/run[1]", "s3://texts/*/*.jsonl"):
            assert read(source)[0] == TEXTS, source
        before = source_fingerprint("s3://texts/run[1]/a.jsonl")
        assert source_fingerprint("s3://texts/run[1]/a.jsonl") == before
        filesystem.pipe("texts/run[1]/a.jsonl", path.read_bytes().replace(b"one", b"six"))
        assert source_fingerprint("s3://texts/run[1]/a.jsonl") != before
        with pytest.raises(DataError, match="no .txt, .jsonl or .parquet file at 's3://texts/absent.jsonl'"):
            check_source("s3://texts/absent.jsonl", "data.train")
    finally:
        server.stop()


def test_a_files_content_is_its_fingerprint_even_where_size_and_time_stay(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one")
    before, status = source_fingerprint(str(path)), path.stat()
    path.write_text("two")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert path.stat().st_mtime_ns == status.st_mtime_ns and source_fingerprint(str(path)) != before


def test_what_is_left_out_is_no_part_of_the_fingerprint(tmp_path):
    (tmp_path / "a.txt").write_text("one")
    before = source_fingerprint(str(tmp_path))
    (tmp_path / "README.md").write_text("about")
    assert source_fingerprint(str(tmp_path)) == before


def test_a_url_is_known_by_its_time_of_change_or_else_by_its_content(served):
    folder, url = served
    path = write_jsonl(folder / "train.jsonl")
    before = source_fingerprint(f"{url}/train.jsonl")
    assert source_fingerprint(f"{url}/train.jsonl") == before
    os.utime(path, (1, 1))
    assert source_fingerprint(f"{url}/train.jsonl") != before


class Unversioned:
    """A filesystem that knows no more of a file than its size."""

    def __init__(self, content):
        self.content = content

    def info(self, path):
        return {"size": len(self.content), "type": "file"}

    def open(self, path, mode, **_):
        import io

        return io.BytesIO(self.content)


def test_a_url_without_version_and_time_is_known_by_its_content():
    from puzzle_ray.data.files import TextFile
    from puzzle_ray.data.sources import _remote_identity

    identity = [_remote_identity(TextFile("x://a.txt", "a.txt", Unversioned(content))) for content in (b"one", b"one", b"two")]
    assert identity[0] == identity[1] != identity[2]


def hub(answers):
    """A hub that knows data sets by their commit."""

    class Hub(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            commit = answers.get(self.path.removeprefix("/api/datasets/").split("?")[0])
            body = json.dumps({"id": "x", "sha": commit} if commit else {"error": "Repository not found"}).encode()
            self.send_response(200 if commit else 404)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


def test_a_data_set_of_the_hub_is_known_by_its_commit():
    server = hub({"some/texts": "c0ffee"})
    try:
        api = HfApi(endpoint=f"http://127.0.0.1:{server.server_port}", token=False)
        assert hub_commit("some/texts", "data.train", api) == "c0ffee"
        with pytest.raises(DataError, match="no data set of that name can be had of the hub") as error:
            hub_commit("other/texts", "data.train", api)
        assert "\n" not in str(error.value)
    finally:
        server.shutdown()
        server.server_close()


def test_the_hub_that_cannot_be_reached_is_one_line():
    with pytest.raises(DataError, match="there is no file 'some/texts', and no data set") as error:
        hub_commit("some/texts", "data.train", HfApi(endpoint="http://127.0.0.1:9", token=False))
    assert "\n" not in str(error.value)


def test_a_data_set_of_the_hub_is_streamed(monkeypatch):
    import datasets

    asked = []

    def load_dataset(*args, **kwargs):
        asked.append((args, kwargs))
        return iter([{"text": "one"}, {"text": None}, {"text": "two"}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    texts, facts = read("some/texts", config_name="english", split="validation")
    assert texts == ["one", "two"] and facts.line() == "2 documents, 1 row without text dropped"
    assert asked == [(("some/texts", "english"), {"split": "validation", "streaming": True})]
