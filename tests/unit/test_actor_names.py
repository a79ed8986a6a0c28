"""Names of actors: what the dashboard and `watch` show."""

from __future__ import annotations

import pytest

from actors.block_trainer import Trainer
from actors.names import actor_name, count_by_kind, layers_in_words
from actors.parent_shard import Shard
from actors.profiler import ShapeProfiler
from puzzle_ray.distill.settings import LibraryConfig
from puzzle_ray.errors import PuzzleError
from puzzle_ray.profiling.settings import ProfileConfig


def test_layers_are_said_as_runs():
    assert layers_in_words(range(0, 8)) == "layers 0-7"
    assert layers_in_words((5,)) == "layer 5"
    assert layers_in_words((6, 1, 5, 4)) == "layers 1, 4-6"


def test_no_name_comes_twice_and_kinds_are_counted():
    names = [
        actor_name(words)["name"] for words in ("block trainer, layers 0-1", "block trainer, layers 0-1", "children's meter")
    ]
    assert len(set(names)) == 3 and all(" #" in name for name in names)
    assert count_by_kind(names) == {"block trainer": 2, "children's meter": 1}


@pytest.mark.parametrize(
    ("actor", "given"),
    [
        (Shard, (0, 2, "float32", "float32", 1, "object_store")),
        (Trainer, ([0, 1], None, LibraryConfig(), None, 1, "object_store")),
        (ShapeProfiler, (ProfileConfig(), 1)),
    ],
)
def test_an_actor_whose_constructor_raised_has_words_all_the_same(actor, given, tmp_path):
    """Ray asks for them before it tells the error. Where they raise, the process ends, and the actor is started again for ever."""
    made = actor.__new__(actor)
    with pytest.raises(PuzzleError):
        made.__init__(str(tmp_path / "nowhere"), *given)
    assert repr(made)
