"""Settings of the replace-one scores."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from puzzle_ray.settings import Count, Positive, Section


class ScoringConfig(Section):
    """Replace-one scores on held-out text, and how many of them are computed exactly: see `puzzle_ray.scoring`.

    With `dtype: bfloat16` KLs below about 5e-4 become uncertain (`benchmarks.scoring_dtype`).
    """

    metric: Literal[
        "kl",
        "lm_loss",
        "top1_disagreement",
        "top5_disagreement",
        "top10_disagreement",
        "cosine_distance",
        "normalised_mse",
        "downstream",
        "fisher",
    ] = "kl"  # the one that the search adds up; every metric is measured and kept
    granularity: Literal["block", "subblock"] = "subblock"
    tokens: Count = 8_192
    micro_batch_tokens: Count = 2048
    dtype: Literal["float32", "bfloat16"] = "float32"  # of weights and activations; what is summed is summed in float32
    tf32: bool = False  # products of float32 on a GPU in TF32
    chunk_mib: Count | Literal["auto"] = "auto"  # of the parent's activations, kept by a process at a time; changes no score
    candidate_batch: Count = 1  # replacements of one layer in one pass through the layers behind it; pays for tiny micro-batches
    shortlist: Literal["none", "fisher"] = "none"  # fisher: estimates all from gradients, scores only some exactly
    shortlist_keep: Annotated[float, Field(ge=0, le=1)] = 0.3  # share of a layer's replacements scored exactly at first
    shortlist_settle: bool = True  # also scores exactly what an answer uses, and searches again until all of it is exact
    fisher_samples: Count = 1  # labels drawn at every position; each needs a backward pass
    racing: bool = False  # a replacement whose standard error is small enough reads no more text: see `puzzle_ray.scoring.racing`
    racing_stderr: Positive = 0.05  # as a share of the mean
    downstream: str | None = None  # .jsonl of query, choices, gold; half of it scores blocks, the other half tests children
    downstream_questions: Count = 200

    @model_validator(mode="after")
    def _metric_is_measured(self) -> ScoringConfig:
        if self.metric == "downstream" and self.downstream is None:
            raise ValueError("metric downstream needs questions; set scoring.downstream to a .jsonl file")
        if self.metric == "fisher" and self.shortlist != "fisher":
            raise ValueError("metric fisher needs its estimates; set scoring.shortlist to fisher")
        return self

    @property
    def makes_exact(self) -> bool:
        """Whether what a search's answer uses is scored exactly, where it was only estimated."""
        return self.shortlist != "none" and self.shortlist_settle

    @property
    def alone(self) -> ScoringConfig:
        """How replacements are scored that are asked for one by one.

        Whom one would share a batch with, and whom it would be compared with on the text that it did not read, depends on what else is
        asked for. So each is in a batch of its own, and reads all text.
        """
        return self.model_copy(update={"candidate_batch": 1, "racing": False})

    def identity(self) -> dict[str, Any]:
        """The settings that the first scores depend on; what is made exact later depends on the answers.

        Questions stand among the inputs, by their content. All metrics are measured: the one that is searched by decides only where it
        says what is read or estimated.
        """
        without_effect = {"shortlist_settle", "downstream", "chunk_mib"}
        without_effect |= set() if self.racing else {"racing_stderr"}
        without_effect |= set() if self.shortlist != "none" else {"shortlist_keep", "fisher_samples"}
        without_effect |= set() if self.racing or self.shortlist != "none" else {"metric"}
        without_effect |= {"downstream_questions"} if self.downstream is None else set()
        return self.model_dump(mode="json", exclude=without_effect)
