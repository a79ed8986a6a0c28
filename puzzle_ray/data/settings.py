"""Settings of the text."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from puzzle_ray.settings import Count, Fraction, Section


class DataConfig(Section):
    """Text. A source is one of these:

    - a file: .txt or .md (one document each), .jsonl or .json (one row per object), .parquet; text and JSON may be compressed
      (.gz, .bz2, .xz, .zst);
    - a folder or a glob of such files, all of one kind. Files of other kinds, and a README, LICENSE or data card, are left out and
      named in the stage's line; hidden files are not looked at. A README that is named itself is read;
    - an fsspec URL of a file, folder or glob (http, https, s3, gs, hf, ...); a folder on http is written with a `/` at its end;
    - the id of a data set on the Hugging Face hub, which is streamed (`config_name` and `split` choose a part of it).

    Text is UTF-8; other bytes are refused, never replaced. The text column holds strings, or chat messages (a list of objects with
    `role` and `content`), which the parent's chat template writes out. Rows without text are dropped and counted.
    """

    train: str | None = None
    heldout: str | None = None  # without it, a share of the training documents is held out
    heldout_fraction: Fraction = 0.05
    text_column: str = "text"  # its name, or a dotted path into nested columns, such as data.text
    config_name: str | None = None  # of a hub data set that has several
    split: str = "train"  # of a hub data set
    sequence_length: Annotated[int, Field(ge=8)] = 256
    max_train_tokens: Count = 50_000_000  # what is read of the source at the most
    max_heldout_tokens: Count = 1_000_000

    def identity(self) -> dict[str, Any]:
        """The settings that the tokens depend on; the sources stand among the inputs, by their content."""
        return self.model_dump(mode="json", exclude={"train", "heldout"})
