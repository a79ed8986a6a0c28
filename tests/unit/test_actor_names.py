"""Names of actors: what the dashboard and `watch` show."""

from __future__ import annotations

from actors.names import actor_name, count_by_kind, layers_in_words


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
