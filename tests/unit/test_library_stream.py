"""What the driver of a library does when a node leaves; no Ray is started."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from ray.exceptions import GetTimeoutError, RayError

from actors import library_stream
from actors.library_stream import Stream, flow


@pytest.mark.parametrize(("stops_after", "sent", "done"), [(0, 0, False), (3, 3, False), (5, 5, True), (99, 5, True)])
def test_a_stream_is_left_only_where_something_is_left_to_do(monkeypatch, stops_after, sent, done):
    """A notice that comes when all micro-batches are on their way changes nothing."""
    monkeypatch.setattr(library_stream, "check_stores", lambda *_: 0)
    monkeypatch.setattr(library_stream, "note", lambda *_, **__: None)
    out: list[int] = []
    stream = SimpleNamespace(
        flow=None, plans=[], reservation=SimpleNamespace(shards_of_nodes=dict),
        send=lambda position, ids, known: out.append(position) or [position], collect=lambda pending: 0.5,
    )  # fmt: skip
    text = SimpleNamespace(batch=lambda position: torch.zeros(1), position_ids=lambda ids: None)
    bar = SimpleNamespace(advance=lambda *_, **__: None)
    assert flow(stream, range(5), text, 2, bar, lambda: len(out) >= stops_after) is done
    assert out == list(range(sent))


@pytest.mark.parametrize("error", [GetTimeoutError("too slow"), RayError("the disk is full")])
def test_what_cannot_be_saved_before_a_move_is_said(monkeypatch, capsys, error):
    def get(*_, **__):
        raise error

    monkeypatch.setattr(library_stream.ray, "get", get)
    Stream.save(SimpleNamespace(trainers=[], cluster=SimpleNamespace(step_timeout_s=1)))
    assert f"not all trainers were saved ({error}); they go on from their last checkpoints" in capsys.readouterr().err
