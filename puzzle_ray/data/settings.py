"""Settings of the text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationError

from puzzle_ray.plugins import did_you_mean
from puzzle_ray.settings import Count, Fraction, Positive, Section

OWN = ("config_name", "split", "text_column")  # what a source may have of its own


class TextSource(Section):
    """One source. What is None is as `data` has it."""

    source: str
    weight: Positive = 1.0  # its share of the mixture's characters, beside the weights of the others
    config_name: str | None = None
    split: str | None = None
    text_column: str | None = None


def _listed(given: Any) -> Any:
    """`{source: ...}` and lists of sources as sources; a name stays a name."""
    if isinstance(given, Mapping | TextSource):
        given = [given]
    if not isinstance(given, list | tuple):
        return given
    if not given:
        raise ValueError("an empty list names no text; name a source, or leave it out")
    return tuple(_one(number, entry) for number, entry in enumerate(given, 1))


def _one(number: int, entry: Any) -> TextSource:
    if not isinstance(entry, str | Mapping | TextSource):
        raise ValueError(f"source {number} is {entry!r}; write a name, or {{source: name, weight: 1.5}}")
    try:
        return TextSource.model_validate({"source": entry} if isinstance(entry, str) else entry)
    except ValidationError as error:
        first = error.errors()[0]
        setting = ".".join(map(str, first["loc"]))
        if first["type"] == "extra_forbidden":
            known = did_you_mean(setting, TextSource.model_fields)
            raise ValueError(f"source {number} has an unknown setting {setting!r}; {known}") from None
        shown = "" if first["type"] == "missing" else f", not {first['input']!r}"
        problem = f"{setting}: {first['msg']}{shown}"
        raise ValueError(f"source {number}: {problem}; write {{source: name, weight: 1.5}}") from None


TextSources = Annotated[str | tuple[TextSource, ...] | None, BeforeValidator(_listed)]


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

    `train` and `heldout` may also be a mixture: a list of sources, each a name or `{source, weight, config_name, split, text_column}`.
    The next document is always of the source that is furthest behind its weight, counted in characters of text. So the mixture is a
    function of the text and the weights alone; training then draws its own order from the run's seed. Where a source has no more text,
    `source_end` says what happens: `go_on` with the others, `stop`, or `repeat` it until every source was read once.

    Without `heldout`, a document's hash says whether it is held out, of a mixture in the mixture's shares. Of fewer than 1000 documents
    the end of the text is held out, which with `go_on` is of the source alone that lasted longest. With `repeat` it never is, as the
    end was trained on before: where the hash leaves too little on either side, `heldout` has to be named.

    Documents are packed one behind the other into sequences of `sequence_length` tokens. With `document_mask` every stage that reads them
    (library, scores, pick, GKD, evaluation, quality) reads each document as if it were a sequence of its own. It pays for many short
    documents, and for sequences that are longer than documents; kernels that need no mask are faster.
    """

    train: TextSources = None
    heldout: TextSources = None  # without it, a share of the training documents is held out
    heldout_fraction: Fraction = 0.05
    text_column: str = "text"  # its name, or a dotted path into nested columns, such as data.text
    config_name: str | None = None  # of a hub data set that has several
    split: str = "train"  # of a hub data set
    source_end: Literal["go_on", "stop", "repeat"] = "go_on"  # of a mixture whose text of one source is at its end
    sequence_length: Annotated[int, Field(ge=8)] = 256
    document_mask: bool = (
        False  # a token attends to its own document alone, and positions start anew at each; false: to all of its row
    )
    max_train_tokens: Count = 50_000_000  # what is read of the source at the most
    max_heldout_tokens: Count = 1_000_000
    tokenise_workers: Annotated[int, Field(ge=0)] | Literal["auto"] = (
        "auto"  # on Ray; 0: none; auto: none for little text, else all CPUs
    )

    def sources(self, name: str) -> tuple[TextSource, ...]:
        """The sources of `train` or `heldout`; none where it names none."""
        text: str | tuple[TextSource, ...] | None = getattr(self, name)
        return (TextSource(source=text),) if isinstance(text, str) else text or ()

    def where(self, name: str, number: int) -> str:
        """What errors call a source: `data.train`, or `data.train[1]` of several."""
        return f"data.{name}[{number}]" if len(self.sources(name)) > 1 else f"data.{name}"

    def read_as(self, source: TextSource) -> DataConfig:
        """These settings with the source's own."""
        own = {name: value for name in OWN if (value := getattr(source, name)) is not None}
        return self.model_copy(update=own)

    def identity(self) -> dict[str, Any]:
        """The settings that the tokens depend on; the sources stand among the inputs, by their content."""
        found = self.model_dump(mode="json", exclude={"train", "heldout", "source_end", "tokenise_workers", "document_mask"})
        for name in ("train", "heldout"):
            sources = self.sources(name)
            if len(sources) > 1:
                found |= {"source_end": self.source_end, name: [_own(source) | {"weight": source.weight} for source in sources]}
            elif sources and _own(sources[0]):
                found[name] = _own(sources[0])
        return found

    def mask_identity(self) -> dict[str, Any]:
        """What everything depends on, beside the tokens, that reads packed sequences. Nothing at the default, as before there was one."""
        return {"document_mask": True} if self.document_mask else {}


def _own(source: TextSource) -> dict[str, Any]:
    return source.model_dump(include=set(OWN), exclude_none=True)
