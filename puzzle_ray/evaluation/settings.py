"""Settings of the evaluation."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from puzzle_ray.evaluation.task_names import entry_name
from puzzle_ray.settings import Count, Section

TIMED = (
    "tokens",
    "micro_batch_tokens",
    "repeats",
    "prompt",
    "sample_tokens",
)  # what the stage `evaluation` reads; the stage `quality` has its own


class EvaluateConfig(Section):
    """The evaluation of finished models: predictions on held-out text, speed, tasks, samples.

    `tasks` are those of lm-evaluation-harness by name, or .jsonl files of questions; they need the extra `eval`. Parent and children are
    asked the same, and what a child retained has a confidence interval by a paired bootstrap.
    All lines of a file of questions are `{query, choices, gold}` (the choices are ranked; `gold` counts from 0),
    `{context_options, continuation, gold}` (the contexts are ranked) or `{context, continuation}` (the continuation is foretold).
    """

    tokens: Count = 32_768  # of held-out text
    num_shards: Annotated[int, Field(ge=0)] = (
        0  # processes that share a model's layers, for one that no node holds; no speed is measured
    )
    micro_batch_tokens: Count = 2048  # in one forward
    repeats: Annotated[int, Field(ge=1)] = 5  # timings of every model
    prompt: str = "Once upon a time"
    sample_tokens: Count = 48  # generated behind the prompt
    samples: Annotated[int, Field(ge=0)] = 3  # openings of held-out text that every model continues, beside the prompt
    window_tokens: Count | None = None  # sequences of held-out text joined to windows for positions; null: data.sequence_length
    tasks: tuple[str, ...] = ()
    num_fewshot: Annotated[int, Field(ge=0)] | None = None  # null: what each task says
    limit: Count | None = None  # questions of every task
    half: Literal["auto", "all", "test"] = (
        "auto"  # test: without the half that scores blocks; auto: so where scoring.downstream is set
    )
    batch_tokens: Count = 8192  # of one pass, padding included
    confidence: Annotated[float, Field(gt=0, lt=1)] = 0.95  # of intervals
    resamples: Annotated[int, Field(ge=100)] = 10_000  # draws of the bootstrap
    retrieval_tokens: tuple[Count, ...] = ()  # lengths of texts that hide numbers to be found again (as in RULER)
    retrieval_depths: Count = 5  # places of the number, from the beginning to the end
    retrieval_questions: Count = 5  # for every kind, length and place

    def identity(self) -> dict[str, Any]:
        """The settings of the stage that times models."""
        return self.model_dump(mode="json", include=set(TIMED)) | self._sharded()

    def _sharded(self) -> dict[str, Any]:
        """Whether layers lie in shards: then there are no speeds, and text is generated without a cache. How many changes no bit."""
        return {"sharded": True} if self.num_shards else {}

    def quality_identity(self) -> dict[str, Any]:
        """The settings of the stage that asks models. Files of questions stand by their names here, and among the inputs by content."""
        unused = {"retrieval_depths", "retrieval_questions"} if not self.retrieval_tokens else set()
        unused |= set() if self.tasks else {"num_fewshot", "limit", "half", "confidence", "resamples"}
        found = self.model_dump(mode="json", exclude={"repeats", "num_shards"} | unused) | self._sharded()
        return found | {"tasks": [entry_name(entry) for entry in self.tasks]}

    def sequences(self, length: int) -> int:
        """Of so many tokens each, in one forward."""
        return max(1, self.micro_batch_tokens // length)
