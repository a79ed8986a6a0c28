"""A run's log and what `watch` makes of it; a store that cannot be written costs the log, and never the run."""

from __future__ import annotations

import json
import os
import time
from types import SimpleNamespace

import pytest
from small_runs import make_run, save_parent_with_text

import jobs.observed
from jobs.app import run as run_command
from jobs.curves import POINTS, thinned
from jobs.observed import observed, tokens_per_unit
from jobs.watch import lines
from puzzle_ray import run_log
from puzzle_ray.config import RunConfig
from puzzle_ray.errors import ProfileError
from puzzle_ray.progress import Quiet
from puzzle_ray.run_log import RunLog, new_run_id, read_events, run_ids, state_of
from puzzle_ray.store import Store
from puzzle_ray.store.upkeep import artifacts, collect_garbage


@pytest.fixture(params=["local", "remote"])
def store(request, tmp_path):
    return Store(str(tmp_path / "store") if request.param == "local" else f"memory://{tmp_path.name}/store")


def test_every_line_comes_back_in_order_over_several_parts(store, monkeypatch):
    monkeypatch.setattr(run_log, "PART_BYTES", 500)
    log = RunLog(store, "a-run")
    for number in range(40):
        log.event("progress", number=number, text="ein Zeichen: ä")
    log.flush()
    events = read_events(store, "a-run")
    assert [event["number"] for event in events] == list(range(40))
    assert {event["run"] for event in events} == {"a-run"} and {event["text"] for event in events} == {"ein Zeichen: ä"}
    assert len([name for name in store.names(log.url) if name.startswith("events.")]) > 3
    assert artifacts(store) == [], "a log is no artifact"


def test_a_line_that_is_being_written_is_left_out(tmp_path):
    store = Store(str(tmp_path))
    log = RunLog(store, "a-run")
    log.event("run_begun")
    with open(f"{log.url}/events.0000.jsonl", "a") as file:
        file.write('{"time": "2026-01-01T00:00')
    assert [event["event"] for event in read_events(store, "a-run")] == ["run_begun"]


def test_runs_are_listed_in_the_order_in_which_they_began(store):
    ids = []
    for _ in range(3):
        ids.append(new_run_id())
        RunLog(store, ids[-1]).event("run_begun")
        RunLog(store, ids[-1]).flush()
        time.sleep(0.01)
    for run_id in ids:
        log = RunLog(store, run_id)
        log.event("run_begun")
        log.flush()
    assert run_ids(store) == ids


def test_a_log_that_cannot_be_written_is_said_once(tmp_path, capsys):
    (tmp_path / "log").write_text("a file where the folder should be")
    log = RunLog(Store(str(tmp_path)), "a-run")
    for _ in range(3):
        log.event("progress")
    log.write_file("index.html", b"")
    log.flush()
    said = capsys.readouterr().err
    assert said.count("cannot be written") == 1 and "; the run goes on" in said
    (tmp_path / "log").unlink()
    log.event("run_ended")
    assert [e["event"] for e in read_events(Store(str(tmp_path)), "a-run")] == ["progress"] * 3 + ["run_ended"], (
        "it is made up for"
    )


def test_old_logs_may_go_and_those_of_today_stay(tmp_path):
    store = Store(str(tmp_path))
    for run_id in ("old", "new"):
        RunLog(store, run_id).event("run_begun")
    long_ago = time.time() - 40 * 24 * 3600
    for path in (tmp_path / "log" / "old").iterdir():
        os.utime(path, (long_ago, long_ago))
    assert [(g.name, g.bytes > 0) for g in collect_garbage(store, 0.0)] == [("log/old", True)] and run_ids(store) == [
        "new",
        "old",
    ]
    assert collect_garbage(store, 60.0) == []
    collect_garbage(store, 30.0, dry_run=False)
    assert run_ids(store) == ["new"]


def event(name, at, **facts):
    return {"time": f"2026-01-01T00:00:{at:06.3f}Z", "run": "r", "event": name} | facts


EVENTS = [
    event("run_begun", 0, verb="compress", host="h", pid=7, version="1"),
    event("stage_begun", 1, stage="tokens"),
    event("stage_finished", 3, stage="tokens", did=False, seconds=2.0, bytes=1500),
    event("stage_begun", 3, stage="library"),
    event("progress", 5, stage="library", bar="library", done=10, total=40, unit="micro-batch", per_s=2.0, tokens_per_s=128.0,
          facts={"loss": 0.25}),
    event("cluster", 6, nodes=2, resources={"CPU": [8.0, 3.0], "object_store_memory": [2e9, 2e9]}, workers={"block trainer": 5}),
]  # fmt: skip


def test_a_state_is_what_the_lines_add_up_to(tmp_path):
    state = state_of("r", EVENTS)
    assert [(stage.name, stage.state, stage.bytes) for stage in state.stages.values()] == [
        ("tokens", "already there", 1500),
        ("library", "running", 0),
    ]
    assert (state.began, state.heard - state.began) == (state.heard - 6, 6)
    shown = "\n".join(lines(state, Store(str(tmp_path)), state.heard + 4))
    assert "library: 10/40 micro-batch, 2/s, 128 tokens/s, 0:15 left, loss 0.25" in shown
    assert "2 nodes, CPU 5 of 8 in use, object store 2.0 GB" in shown and "workers 5 x block trainer" in shown
    assert "state   running, 0:10 since it began, last word 0:04 ago" in shown
    assert "1.5 kB in this run's artifacts" in shown


def test_a_run_that_fell_silent_and_one_that_failed_are_told_apart(tmp_path):
    state = state_of("r", EVENTS)
    assert state.words(state.heard + 1000).startswith("silent for 1000 s")
    closed = [event("bar_closed", 7, stage="library", bar="library"), event("run_ended", 8, how="failed", error="no room")]
    over = state_of("r", [*EVENTS, *closed])
    shown = "\n".join(lines(over, Store(str(tmp_path)), over.heard + 1000))
    assert "failed: no room, 0:08 since it began" in shown and "stopped" in shown
    assert "micro-batch" not in shown and "workers" not in shown


@pytest.fixture(scope="module")
def parent_with_text(tmp_path_factory):
    return save_parent_with_text(tmp_path_factory.mktemp("parent"))


def test_a_run_tells_its_stages_and_its_end_and_leaves_a_page(parent_with_text, tmp_path, capsys):
    run = make_run(parent_with_text, tmp_path / "store")
    for did in (True, False):
        progress = run.progress
        with observed(run, "tokens"):
            make_again = make_run(parent_with_text, tmp_path / "store") if not did else run
            make_again.progress, make_again.listener = run.progress, run.listener
            make_again.done("tokens")
        assert run.progress is progress and run.listener is None, "nobody listens any more"
        run_id = run_ids(run.store)[-1]
        events = read_events(run.store, run_id)
        assert [e["event"] for e in events if e["event"] != "progress"][:1] == ["run_begun"]
        (finished,) = [e for e in events if e["event"] == "stage_finished"]
        assert finished["stage"] == "tokens" and finished["did"] is did and finished["bytes"] > 0
        assert events[-1]["event"] == "run_ended" and events[-1]["how"] == "finished"
        page = tmp_path / "store" / "log" / run_id / "index.html"
        assert "Block distillation: needs a block library" in page.read_text()
        assert run_command(["watch", "--store", str(tmp_path / "store"), "--once"]) == 0
        said = capsys.readouterr()
        assert run_id in said.out and ("finished, " in said.out) and f"run {run_id}: puzzle-ray watch" in said.err
        time.sleep(0.01)  # ids sort by milliseconds


def test_what_a_run_fails_by_is_in_its_log(parent_with_text, tmp_path):
    run = make_run(parent_with_text, tmp_path)
    with pytest.raises(ProfileError), observed(run, "profile"):
        raise ProfileError("profile", "the device is gone")
    with pytest.raises(KeyboardInterrupt), observed(run, "profile"):
        raise KeyboardInterrupt
    ends = sorted((e["how"], e["error"]) for run_id in run_ids(run.store) for e in read_events(run.store, run_id)[-1:])
    assert ends == [("failed", "profile: the device is gone"), ("interrupted", "")]


def test_a_log_reads_now_and_then_that_a_run_is_at_work(parent_with_text, tmp_path, capsys, monkeypatch):
    run = make_run(parent_with_text, tmp_path)
    with observed(run, "score-blocks") as observer, run.progress.stage("scores", 40, "items") as bar:
        bar.advance(3)
        monkeypatch.setattr("jobs.observed.QUIET_S", 3600.0)
        observer.say_at_work()
        assert "still at work" not in capsys.readouterr().err, "there was progress just now"
        monkeypatch.setattr("jobs.observed.QUIET_S", 0.0)
        observer.say_at_work()
        assert "  still at work: scores 3/40 items; no progress for " in capsys.readouterr().err
        monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
        observer.say_at_work()
        assert capsys.readouterr().err == "", "a terminal has bars"


def test_what_an_earlier_run_has_done_is_no_speed_of_this_one(monkeypatch):
    clock, told = [100.0], []
    monkeypatch.setattr(jobs.observed.time, "monotonic", lambda: clock[0])
    log = SimpleNamespace(event=lambda name, **facts: told.append(facts))
    nobody = SimpleNamespace(tokens={"distill": 10}, heard=lambda: None, log=log, _with_metrics=lambda tell: None)
    with Quiet().stage("distill", 100, "steps") as bar:
        own = jobs.observed._ToldBar(nobody, bar, "gkd", "distill", 100, "steps")
        own.advance(50)
        clock[0] += 10.0
        own.advance(5)
    assert [(row["done"], row["per_s"], row["tokens_per_s"]) for row in told] == [(55, 0.5, 5.0)]


def test_all_artifacts_of_a_run_are_counted_though_a_stage_has_several():
    root = SimpleNamespace(root="runs")
    ended = [
        {"event": "stage_finished", "stage": "gkd", "artifact": f"gkd-{n}", "seconds": 1.0, "bytes": 1000 * n} for n in (1, 2)
    ]
    events = [{"time": "2026-01-02T03:04:05.000Z", "run": "r"} | event for event in ended]
    assert "store   runs, 3.0 kB in this run's artifacts" in "\n".join(lines(state_of("r", events), root, time.time()))


def test_a_step_of_a_distillation_counts_all_its_tokens():
    own = {"num_workers": 2, "gradient_accumulation": 4, "micro_batch_tokens": 256}
    assert tokens_per_unit(RunConfig(data={"sequence_length": 64}, gkd=own))["distill"] == 2048
    stages = [
        {"sequence_length": 64, "tokens": 2048 * 3, "micro_batch_tokens": 256},
        {"sequence_length": 128, "tokens": 4096, "micro_batch_tokens": 512},
    ]
    in_stages = RunConfig(data={"sequence_length": 64}, gkd=own | {"stages": stages})
    assert tokens_per_unit(in_stages)["distill"] == (2048 * 3 + 4096) / 4


def test_curves_are_written_for_tensorboard(parent_with_text, tmp_path):
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.record_writer import RecordWriter  # noqa: F401  (the format that is read below)

    run = make_run(parent_with_text, tmp_path)
    run.progress = Quiet()
    with observed(run, "build-library"), run.progress.stage("library", 3, "micro-batch") as bar:
        for loss in (3.0, 2.0, 1.0):
            bar.advance(loss=loss)
    (file,) = (tmp_path / "log").rglob("events.out.tfevents.*")
    data, found, at = file.read_bytes(), [], 0
    while at < len(data):
        length = int.from_bytes(data[at : at + 8], "little")
        found += [
            (v.tag, e.step, v.simple_value) for e in [Event.FromString(data[at + 12 : at + 12 + length])] for v in e.summary.value
        ]
        at += 12 + length + 4
    assert found == [("library/loss", 1, 3.0), ("library/loss", 2, 2.0), ("library/loss", 3, 1.0)]
    (progress,) = [e for e in read_events(run.store, run_ids(run.store)[-1]) if e["event"] == "progress"]
    assert (progress["done"], progress["total"], progress["facts"]) == (3, 3, {"loss": 1.0}) and "tokens_per_s" in progress


def test_long_curves_are_thinned_and_keep_both_ends():
    values = list(range(1000))
    kept = thinned(values)
    assert (
        len(kept) == POINTS and kept[0] == (0, 0) and kept[-1] == (999, 999) and thinned(values[:5]) == list(enumerate(range(5)))
    )


def test_watch_refuses_what_is_not_there_in_one_line(tmp_path, capsys):
    Store(str(tmp_path)).check()
    assert run_command(["watch", "--store", str(tmp_path)]) == 2
    assert "no run has a log" in capsys.readouterr().err
    RunLog(Store(str(tmp_path)), "20260101-000000-aaaaaa").event("run_begun")
    assert run_command(["watch", "--store", str(tmp_path), "--run", "2027"]) == 2
    assert "the latest is 20260101-000000-aaaaaa" in capsys.readouterr().err
    assert json.dumps(run_ids(Store(str(tmp_path)))) == '["20260101-000000-aaaaaa"]'
