"""The documents of a mixture of sources, in an order that follows from the text and the weights alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from puzzle_ray.data.documents import Piece, TextFacts, pieces
from puzzle_ray.data.settings import DataConfig
from puzzle_ray.errors import DataError


@dataclass
class SourceRead:
    """How far a source was read."""

    facts: TextFacts = field(default_factory=TextFacts)  # of the first time that it was read
    times: int = 0  # that its end was reached
    characters: int = 0


def mixed(config: DataConfig, name: str, tokenizer: Any, read: list[SourceRead]) -> Iterator[Piece]:
    """The documents of `train` or `heldout`. `read`, with an entry for each of its sources, is told while this goes on.

    The next document is of the source that is furthest behind its weight in characters, of equal ones the first. Raises DataError,
    also for a source without a document or without a character.
    """
    sources = config.sources(name)
    if len(sources) == 1:
        yield from _pieces(config, name, 0, tokenizer, read[0].facts)
        read[0].times = 1
        return
    streams = [_pieces(config, name, number, tokenizer, state.facts) for number, state in enumerate(read)]
    ahead = [next(stream, None) for stream in streams]  # the beginning of the next document of each
    for number, piece in enumerate(ahead):
        if piece is None:
            raise DataError(
                config.where(name, number), f"{sources[number].source!r} has no document", "take it out of the mixture"
            )
    while any(piece is not None for piece in ahead):
        there = [number for number, piece in enumerate(ahead) if piece is not None or config.source_end == "stop"]
        number = min(there, key=lambda n: (read[n].characters / sources[n].weight, n))
        piece, state = ahead[number], read[number]
        if piece is None:
            return
        while True:
            state.characters += len(piece.text)
            yield piece
            piece = next(streams[number], None)
            if piece is None or piece.begins:
                break
        if piece is None:
            state.times += 1
            if config.source_end == "repeat":
                if all(each.times for each in read):
                    return
                streams[number] = _pieces(config, name, number, tokenizer, TextFacts())
                piece = next(streams[number], None)
        ahead[number] = piece


def _pieces(config: DataConfig, name: str, number: int, tokenizer: Any, facts: TextFacts) -> Iterator[Piece]:
    source, where = config.sources(name)[number], config.where(name, number)
    any_piece = any_text = False
    for piece in pieces(source.source, config.read_as(source), where, tokenizer, facts):
        any_piece, any_text = True, any_text or bool(piece.text)
        yield piece._replace(source=number) if number else piece
    if any_piece and not any_text:  # it would be furthest behind its weight for ever
        raise DataError(where, f"{source.source!r} has no text", "name a source with text in it")
