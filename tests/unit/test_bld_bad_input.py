"""What cannot be distilled is refused in one line before any work, with what to write instead."""

import json
from contextlib import nullcontext

import pytest
from small_runs import make_run, save_parent_with_text

from puzzle_ray.distill.library_checkpoints import variant_file
from puzzle_ray.errors import ConfigError, DataError
from puzzle_ray.scoring.downstream import Question


@pytest.fixture(scope="module")
def parent_with_text(tmp_path_factory):
    return save_parent_with_text(tmp_path_factory.mktemp("parent"))


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("space.attention=['gqa:3']", "space.attention: .*outside 1 ... 2"),
        ("space.attention=['gqa:x']", "space.attention: 'x' is neither a number nor a percentage; write 4 or 50%"),
        ("space.ffn=['ffn:20']", "ffn:20 is no multiple of ffn_multiple_of=8; write ffn:16 or ffn:24"),
        ("space.ffn=['ffn:64']", "space.ffn: '64' is outside 1 ... 48"),
        ("space.ffn=['gqa:1']", "variant 'gqa:1' is not for the ffn subblock"),
        ("data.sequence_length=256", "sequences of 256 tokens do not fit its 128 positions; shorten data.sequence_length"),
        ("library.start_from=nowhere/library-abc", "library.start_from: .* is no finished library; name the folder library-"),
        (
            "library.start_from=foo://x/library-abc",
            "library.start_from: 'foo://x/library-abc' cannot be read .*Protocol not known",
        ),
        ("library.start_from=scores-abc", "library.start_from: 'scores-abc' is no finished library"),
    ],
)
def test_what_does_not_fit_the_parent_is_said_before_work_starts(parent_with_text, tmp_path, override, words):
    extra = ("library.micro_batch_tokens=256", "scoring.micro_batch_tokens=256", "gkd.micro_batch_tokens=256")
    with pytest.raises(ConfigError, match=words):
        make_run(parent_with_text, tmp_path, override, *extra).check()


def test_a_start_from_another_parents_library_is_refused_before_the_profile_is_measured(parent_with_text, tmp_path):
    """Of the same shape, so that it has all halves."""
    halves = ("space.attention=['parent', 'noop']", "space.ffn=['parent']")
    extra = ("library.micro_batch_tokens=256", "scoring.micro_batch_tokens=256", "gkd.micro_batch_tokens=256", *halves)
    own = make_run(parent_with_text, tmp_path, *extra)
    for parent, refused in ((own.parent.key, False), ("another", True)):
        library = own.store.artifact("library", {}, {"parent": parent})
        for entry in own.space.entries():
            library.write(variant_file(*entry), b"")
        library.finish({"coupled": False})
        run = make_run(parent_with_text, tmp_path, f"library.start_from={library.url}", *extra)
        with (
            pytest.raises(ConfigError, match="was made for another parent; name a library of this one")
            if refused
            else nullcontext()
        ):
            run.check()


def test_questions_of_which_none_is_left_to_test_the_child_on_are_refused(parent_with_text, tmp_path):
    questions = [Question(f"question {n}", ("yes", "no"), 0) for n in range(40)]
    path = tmp_path / "q.jsonl"
    path.write_text(json.dumps(vars(questions[0])) + "\n")
    with pytest.raises(DataError, match="holds no question in the half to"):
        make_run(parent_with_text, tmp_path, f"scoring.downstream={path}").check()
    path.write_text("".join(json.dumps(vars(q)) + "\n" for q in questions))
    make_run(parent_with_text, tmp_path, f"scoring.downstream={path}").check()


def test_key_value_heads_that_do_not_divide_name_those_that_do(tmp_path):
    from small_models import save_parent

    from puzzle_ray.models.child import read_config
    from puzzle_ray.variants.space import search_space

    config = read_config(save_parent(tmp_path, "gpt2"))
    with pytest.raises(ConfigError, match="gqa:3: 3 does not divide 4 KV heads; use one of 1, 2"):
        search_space(config, ("gqa:3",), (), 8)
