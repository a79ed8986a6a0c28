"""A race of the pick's finalists: who is in it and who goes on, what it costs, and a winner with the bits of a child that never waited."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from gkd_jobs import CHOICES, gkd_jobs
from report_inputs import CHOSEN, SPACE, whole_run

from jobs.search_architecture import candidates, describe, race_lines
from puzzle_ray import pipeline
from puzzle_ray.artifacts import LayerChoice
from puzzle_ray.config import RunConfig, load, validated
from puzzle_ray.data.order import Tokens
from puzzle_ray.distill import race as racing
from puzzle_ray.distill.curriculum import Curriculum
from puzzle_ray.distill.gkd import CHILD, CURVE, LOOKS, distill_child, steps_saved
from puzzle_ray.distill.race import at_rungs, losers_steps, race, race_here
from puzzle_ray.distill.range_test import MOST_TRIALS
from puzzle_ray.distill.rungs import RungRow, climb, read_rows
from puzzle_ray.distill.settings import GkdConfig
from puzzle_ray.errors import ConfigError
from puzzle_ray.models.child import load_model
from puzzle_ray.planning.distilling import tokens_before_pick, tokens_of_gkd
from puzzle_ray.progress import Quiet
from puzzle_ray.report.page import render
from puzzle_ray.search.settings import SearchConfig
from puzzle_ray.store import Store

CONFIG = GkdConfig(
    tokens=18 * 64, micro_batch_tokens=32, num_workers=2, learning_rate=1e-3, checkpoint_every=4, heldout_looks=9
)  # fmt: skip
WORSE = (LayerChoice("noop", "noop"), LayerChoice("linear", "noop"))


def run_race(kls, num_rungs, known=None):
    """A race of children with given KLs at every rung; also, how many came to each rung."""
    rows = known or {name: [] for name in kls}
    came = []

    def advance(names, number):
        came.append(len(names))
        for name in names:
            assert len(rows[name]) == number, "from the rung below"
            rows[name].append(RungRow(number + 1, 10 * 3**number, 100 * 3**number, kls[name][number]))

    return race(list(kls), num_rungs, rows, advance), came


def test_the_best_third_goes_on_and_from_the_last_rung_the_best_alone():
    kls = {"a": (0.9, 0.0), "b": (0.5, 0.4), "c": (0.7, 0.1), "d": (0.6, 0.3)}
    rows, came = run_race(kls, 2)
    assert came == [4, 2] == at_rungs(4, 2)
    assert {name: [row.goes_on for row in own] for name, own in rows.items()} == {
        "a": [False], "b": [True, False], "c": [False], "d": [True, True],
    }  # fmt: skip
    assert losers_steps(4, (10, 30)) == sum(own[-1].step for own in rows.values() if not own[-1].goes_on)
    rows, came = run_race({"a": (0.2, 0.2), "b": (0.2, 0.1), "c": (0.3, 0.0)}, 2)
    assert came == [3] == at_rungs(3, 2), "who is alone waits for nobody"
    assert [row[-1].goes_on for row in rows.values()] == [True, False, False], "of equals the first"
    assert losers_steps(3, (10, 30)) == 20 and losers_steps(1, (10, 30)) == 0


def test_what_is_known_is_not_climbed_again():
    kls = {name: (0.1 * n, 0.1 * n) for n, name in enumerate("abcd")}
    whole, _ = run_race(kls, 2)
    known = {"a": [RungRow(1, 10, 100, 0.0)], "b": [], "c": [RungRow(1, 10, 100, 0.2)], "d": []}
    again, came = run_race(kls, 2, known)
    assert again == whole and came == [2, 2]


def test_rungs_are_at_looks_from_a_third_of_the_rung_above_on():
    config = GkdConfig(tokens=272 * 512, micro_batch_tokens=256, num_workers=2)
    assert config.race_steps(3) == (54, 108) and config.race_steps(2) == (108,)
    assert config.race_steps(9) == (27, 54, 108), "none before the first look"
    assert config.model_copy(update={"heldout_looks": 1}).race_steps(3) == ()
    stages = [{"sequence_length": 128, "tokens": 512 * n, "micro_batch_tokens": 256} for n in (10, 20)]
    assert GkdConfig(stages=stages, num_workers=2).race_steps(2) == (12,)


def test_tokens_until_a_step_are_those_that_its_batches_have():
    text = Tokens(np.zeros((64, 16), dtype=np.int32))
    stages = [
        {"sequence_length": 16, "tokens": 300, "micro_batch_tokens": 32},
        {"sequence_length": 32, "tokens": 500, "micro_batch_tokens": 64},
    ]
    shared = {"num_workers": 2, "gradient_accumulation": 2, "micro_batch_tokens": 32}
    for config in (GkdConfig(stages=stages, **shared), GkdConfig(tokens=700, **shared)):
        read, found = 0, Curriculum.of(text, config, 0)
        for step in range(found.total_steps):
            assert config.tokens_until(step) == read
            read += sum(found.batch(step, rank, round_).numel() for rank in range(2) for round_ in range(2))
        assert config.tokens_until(found.total_steps) == read == found.tokens


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    """Two children, whose distillations two workers share, and the first of them elsewhere, distilled without a pause."""
    here = gkd_jobs(tmp_path_factory.mktemp("race"), CONFIG, (CHOICES, WORSE))
    alone = gkd_jobs(tmp_path_factory.mktemp("alone"), CONFIG, (CHOICES, WORSE))
    for job in alone:
        distill_child(job, Quiet())
    return here, alone


def published(job):
    state = load_model(job.artifact.local_folder(CHILD)).state_dict()
    return {name: value.tolist() for name, value in state.items()}, job.artifact.read(CURVE), job.artifact.read(LOOKS)


def test_a_race_that_is_killed_takes_no_step_twice_and_its_winner_has_the_bits_of_a_child_alone(jobs, monkeypatch):
    here, alone = jobs
    steps = CONFIG.race_steps(3)
    assert steps == (2, 6)
    pick = here[0].artifact.store.artifact("architecture", {}, {})
    climbed = []

    def killed(job, *how, **more):
        if len(climbed) == 1:
            raise KeyboardInterrupt
        climbed.append(job.artifact.key)
        return climb(job, *how, **more)

    monkeypatch.setattr(racing, "climb", killed)
    with pytest.raises(KeyboardInterrupt):
        race_here(here, steps, pick, Quiet())
    names = [job.artifact.key for job in here]
    before = read_rows(pick, names)
    assert [len(before[name]) for name in names] == [1, 0] and steps_saved(here[0].artifact) == 2
    monkeypatch.setattr(racing, "climb", lambda job, *how, **more: climbed.append(job.artifact.key) or climb(job, *how, **more))
    rows = race_here(here, steps, pick, Quiet())
    assert climbed == names, "the first one's rung was there"
    assert race_here(here, steps, pick, Quiet()) == rows and climbed == names, "a race that is over is read"
    assert [(len(rows[name]), steps_saved(job.artifact)) for name, job in zip(names, here, strict=True)] == [(1, 2), (1, 2)]
    won = next(n for n, name in enumerate(names) if rows[name][-1].goes_on)
    assert rows[names[won]][0].kl < rows[names[1 - won]][0].kl
    for n, job in enumerate(alone):  # of who is distilled to the end already
        assert list(climb(job, steps[:1], Quiet()))[0].kl == rows[names[n]][0].kl
    distill_child(here[won], Quiet())
    assert published(here[won]) == published(alone[won]) and here[won].artifact.facts() == alone[won].artifact.facts()
    assert not here[1 - won].artifact.finished


def test_a_row_counts_the_looks_until_a_child_first_came_there(jobs, monkeypatch):
    """Training that goes back looks again at steps that it was at: a row read later must not count these."""
    from puzzle_ray.distill import rungs
    from puzzle_ray.distill.guard import HeldoutRow

    looks = [HeldoutRow(0, 1.0, 1, 1), HeldoutRow(2, 0.9, 1, 1), HeldoutRow(4, 2.0, 1, 1, 1), HeldoutRow(2, 0.5, 1, 0.5)]
    monkeypatch.setattr(rungs, "read_looks", lambda artifact: looks)
    assert [row.kl for row in climb(jobs[1][0], (2, 6), Quiet())] == [0.9, 0.5]


def test_a_row_says_what_was_read_where_stages_have_steps_of_other_sizes(jobs):
    stages = [
        {"sequence_length": 16, "tokens": 64 * 4, "micro_batch_tokens": 32},
        {"sequence_length": 32, "tokens": 128 * 14, "micro_batch_tokens": 64},
    ]
    staged = replace(jobs[1][0], config=CONFIG.model_validate(CONFIG.model_dump() | {"stages": stages}))
    assert [row.tokens for row in climb(staged, (2, 6), Quiet())] == [2 * 64, 4 * 64 + 2 * 128]


def test_distilled_before_the_pick_children_are_measured_on_by_as_many_threads_as_before(monkeypatch, tmp_path):
    def distilled_of(*_):
        torch.set_num_threads(threads + 1)
        return SimpleNamespace(facts=lambda: {"heldout_kl": 0.5})

    threads = torch.get_num_threads()
    monkeypatch.setattr(pipeline, "distilled_of", distilled_of)
    monkeypatch.setattr(pipeline, "child_with", lambda *_: None)
    s = pipeline.Setting(RunConfig(search={"candidates": 2, "distil_tokens": 64}), Store(str(tmp_path)), Quiet())
    try:
        assert pipeline.distilled_kl(s, None, None, ()) == 0.5 and torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(threads)


def test_a_race_stands_in_no_key_where_there_is_none():
    names = {"race_rungs", "race_own", "race_within"}
    plain = SearchConfig(candidates=3)
    assert not names & plain.identity().keys() and not names & SearchConfig().identity().keys()
    assert SearchConfig(candidates=3, race_own=2, race_within=9.0).identity() == plain.identity(), "and what is about one"
    raced = SearchConfig(candidates=3, race_rungs=3)
    assert names < raced.identity().keys() and "predicted_within" not in raced.identity(), "none is left out"
    assert raced.sweep_identity() == plain.sweep_identity()


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"search": {"race_rungs": 3, "candidates": 2, "distil_tokens": 64}}, "set one of them to 0"),
        ({"search": {"race_rungs": 1}}, "race_rungs=1 is the end alone.*2 or more, or to 0"),
        ({"search": {"race_rungs": 3, "race_own": 6}}, "race_own=6 .* at most 5 are measured; raise search.candidates=1"),
        ({"search": {"race_rungs": 3, "race_own": 2, "corrections": 0}}, "race_own=2 .* at most 1 are measured"),
        ({"search": {"race_rungs": 3, "rivals": []}}, "lets children race, and there is one; raise search.race_own"),
        ({"search": {"race_rungs": 3, "rivals": ["mip"]}}, "lets children race, and there is one"),
        ({"search": {"race_rungs": 3}, "gkd": {"tokens": 0}}, "gkd.tokens is 0; set gkd.tokens, or leave out search.race_rungs"),
        ({"search": {"race_rungs": 3}, "gkd": {"preset": "none"}}, "gkd.preset=none is no distillation; name another preset, or"),
        ({"search": {"race_rungs": 3}, "gkd": {"heldout_tokens": 0}}, "gkd.heldout_tokens is 0; set gkd.heldout_tokens"),
        ({"search": {"race_rungs": 3}, "gkd": {"heldout_looks": 1}}, "no look at held-out text before the last of 489 steps"),
        ({"search": {"race_rungs": 3}, "gkd": {"parallel": "fsdp"}}, "set search.race_rungs to 0, or gkd.parallel to ddp"),
        (
            {"search": {"race_rungs": 3, "sweep_gkd": True, "sweep_rungs": 2}, "gkd": {"parallel": "fsdp"}},
            "set search.race_rungs to 0, or gkd.parallel to ddp",
        ),
        (
            {"search": {"race_rungs": 3}, "gkd": {"use_gpu": True, "num_workers": 2}},
            "set gkd.parallel to ddp, or search.race_rungs",
        ),
    ],
)
def test_races_that_make_no_sense_are_refused_before_work(values, said):
    with pytest.raises(ConfigError, match=said):
        validated({"parent": "somewhere", "store": "here"} | values)


def test_a_race_with_one_answer_and_a_rival_is_measured_and_may_be_of_sharded_size_where_that_is_said():
    config = validated(
        {"parent": "x", "search": {"race_rungs": 3}, "gkd": {"use_gpu": True, "num_workers": 2, "parallel": "ddp"}}
    )
    assert config.search.measures and config.search.most_racing == 5 and config.gkd_before_pick == config.gkd
    undecided = {"parent": "x", "search": {"race_rungs": 3}, "gkd": {"use_gpu": True, "num_workers": 2}, "hardware": "auto"}
    assert validated(undecided).search.race_rungs == 3, "what hardware decides is looked at afterwards"


def test_what_losers_read_is_planned():
    config = load(
        None, None, ("search.race_rungs=3", "search.rivals=[greedy]", "gkd.tokens=2048000", "gkd.micro_batch_tokens=2048")
    )
    assert config.gkd.race_steps(3) == (200, 400) and tokens_before_pick(config) == 200 * 2048
    stages = [{"sequence_length": n * 128, "tokens": n * 1_024_000, "micro_batch_tokens": n * 2048} for n in (1, 2)]
    search, data = {"race_rungs": 2, "rivals": ["greedy"]}, {"sequence_length": 128}
    staged = validated({"parent": "x", "search": search, "gkd": {"stages": stages}, "data": data})
    assert staged.gkd.race_steps(2) == (400,) and tokens_before_pick(staged) == 400 * 2048, "of short sequences"
    short = RunConfig(search={"candidates": 2, "distil_tokens": 640, "rivals": []})
    assert tokens_before_pick(short) == 2 * 640


def test_every_childs_test_of_learning_rates_is_planned():
    """1000 steps of 2048 tokens: a trial takes 50. Of two that race, the winner's test counts for stage `gkd`."""
    words = ("search.race_rungs=3", "search.rivals=[greedy]", "gkd.tokens=2048000", "gkd.micro_batch_tokens=2048")
    plain, auto = load(None, None, words), load(None, None, (*words, "gkd.learning_rate=auto"))
    test = MOST_TRIALS * 50 * 2048
    assert tokens_before_pick(auto) == tokens_before_pick(plain) + test
    assert (tokens_of_gkd(plain), tokens_of_gkd(auto)) == (2048000, 2048000 + test)
    three = auto.model_copy(update={"search": auto.search.model_copy(update={"rivals": ("greedy", "depth")})})
    fixed = three.model_copy(update={"gkd": plain.gkd})
    assert tokens_before_pick(three) == tokens_before_pick(fixed) + 2 * test
    short = RunConfig(search={"candidates": 2, "distil_tokens": 4096, "rivals": []}, gkd={"learning_rate": "auto"})
    assert tokens_before_pick(short) == 2 * (4096 + MOST_TRIALS * 4096), "two steps each, and as many in a trial"


def test_it_is_said_once_that_the_text_is_read_again_in_a_race_and_behind_it(tmp_path, capsys):
    """100 sequences of 16 tokens. A child that is alone does not race, and says it itself."""
    config = CONFIG.model_copy(update={"tokens": 36 * 64})
    here = gkd_jobs(tmp_path, config, (CHOICES, WORSE))
    pick = here[0].artifact.store.artifact("architecture", {}, {})
    rows = race_here(here, (2,), pick, Quiet())
    (winner,) = [job for job in here if rows[job.artifact.key][-1].goes_on]
    distill_child(winner, Quiet())
    said = "  gkd: its text is read 1.4 times over: there are 1600 tokens to train on\n"
    assert capsys.readouterr().err.count(said) == 1
    (alone,) = gkd_jobs(tmp_path / "alone", config)
    distill_child(alone, Quiet())
    assert capsys.readouterr().err.count(said) == 1


RACED = [
    {"origin": "mip", "also": [], "kl": 0.3, "rungs": [{"step": 27, "tokens": 13824, "kl": 0.25, "goes_on": False}]},
    {"origin": "mip #2", "also": ["greedy"], "kl": 0.4, "rungs": [{"step": 27, "tokens": 13824, "kl": 0.24, "goes_on": True}]},
]


def test_the_tables_say_who_stopped_where():
    lines = race_lines(RACED)
    assert (
        "13,824" in lines[1] and "mip #2 = greedy, won" in lines[2] and "mip, stopped after 27 steps, 13,824 tokens" in lines[3]
    )
    assert race_lines([]) == []
    run = whole_run()
    page = render(replace(run, picked={**run.picked, "race": RACED}))
    assert "stopped at step 27" in page and ">won<" in page and "The pick is by a race" not in render(run)
    assert "at the start<" in page and "to the original" not in page + lines[0]


def test_a_later_rounds_answer_is_printed_as_it_is_counted_from_the_original():
    """The child of the round before has a narrow FFN in its last layer, which this round leaves as it is."""
    assert CHOSEN.choices[-1] == LayerChoice()
    space = replace(SPACE, layers=(*SPACE.layers[:-1], replace(SPACE.layers[-1], now=LayerChoice("parent", "ffn:128"))))
    lines, before = (describe(CHOSEN, own).splitlines() for own in (space, SPACE))
    assert lines[-3].split() == ["layer", "7", "parent", "ffn:128"] and before[-3].split() == ["layer", "7", "parent", "parent"]
    assert lines[:-3] == before[:-3]


def test_a_later_rounds_tables_say_what_each_kl_is_to():
    """Children are measured against the child of the round before, and distilled towards the original."""
    run = replace(whole_run(), round=2)
    plain = [row | {"layers_unlike_first": 1, "top1_agreement": 0.5} for row in run.picked["candidates"]]
    rows = [row | {"kl_distilled": 0.125} for row in plain]
    page = render(replace(run, picked={**run.picked, "candidates": rows, "race": RACED}))
    assert "at the start, to the child of round 1<" in page and "Held-out KL, to the original, by the tokens" in page
    assert "KL distilled for a while, to the original<" in page
    assert "to the original (at the start to the child of round 1)" in race_lines(RACED, 2)[0]
    printed = candidates(run.picked | {"candidates": rows, "picked": rows[0]}, 2)
    assert "held-out tokens, against the child of round 1:" in printed
    assert printed.count("; distilled for a while 0.12500 to the original") == len(rows) + 1
    printed = candidates(run.picked | {"candidates": plain, "picked": plain[0]})
    assert "original" not in printed and "distilled for" not in printed and "against" not in printed
