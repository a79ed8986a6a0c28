"""Settings of the text."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from puzzle_ray.settings import Count, Fraction, Section


class DataConfig(Section):
    """Text. A source is a .txt/.jsonl/.parquet file, a folder or glob of them, an fsspec URL, or a datasets hub id."""

    train: str | None = None
    heldout: str | None = None  # without it, a share of the training documents is held out
    heldout_fraction: Fraction = 0.05
    text_column: str = "text"
    split: str = "train"  # of a hub data set
    sequence_length: Annotated[int, Field(ge=8)] = 256
    max_train_tokens: Count = 50_000_000  # what is read of the source at the most
    max_heldout_tokens: Count = 1_000_000

    def identity(self) -> dict[str, Any]:
        """The settings that the tokens depend on; the sources stand among the inputs, by their content."""
        return self.model_dump(mode="json", exclude={"train", "heldout"})
