"""What children kept of their parent's quality: tasks, retrieval, where predictions differ, and samples side by side.

Everything that models are asked is a chunk that goes through one function, `ask`, in this process or on Ray.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from puzzle_ray.data.order import Tokens
from puzzle_ray.data.packing import separator_of
from puzzle_ray.evaluation import breakdown
from puzzle_ray.evaluation.requests import Answer, Ask, Chunk, Continuations, Ids, Predictions, chunked
from puzzle_ray.evaluation.retrieval import make_questions, retrieval_chunks, retrieval_scores, retrieval_table
from puzzle_ray.evaluation.settings import EvaluateConfig
from puzzle_ray.evaluation.task_names import harness_version
from puzzle_ray.evaluation.tasks import compare_tasks
from puzzle_ray.models.tokenizer import tokenizer_of
from puzzle_ray.scoring.halves import Half

PARENT = breakdown.PARENT
SEQUENCES = 8  # of a chunk


@dataclass(frozen=True)
class Quality:
    """What to find out. `folders`: the models by name, `parent` first; they have one tokenizer.

    `text` is held-out text that chose nothing; where it has a separator, attention does not cross its documents. `token_counts[v]` is how
    often token v is in the training text. `half`: the questions of tasks that are asked; None is all of them.
    `trusted`: the tokenizer's own code may run.
    """

    folders: Mapping[str, str]
    text: Tokens
    token_counts: npt.NDArray[np.int64]
    config: EvaluateConfig
    half: Half | None
    seed: int
    trusted: bool = False

    def run(self, ask: Ask) -> dict[str, Any]:
        """JSON-able: `by_position`, `by_document_length`, `by_frequency`, `retrieval`, `samples` and `tasks`.

        Raises ConfigError and DataError for tasks that cannot be asked, before any model is.
        """
        config, tokenizer = self.config, tokenizer_of(self.folders[PARENT], self.trusted)
        tasks = self._tasks()
        ids = self._held_out(config.window_tokens or self.text.sequences.shape[1])
        needles = make_questions(
            tokenizer, config.retrieval_tokens, config.retrieval_depths, config.retrieval_questions, self.seed
        )
        openings = self._openings(tokenizer)
        parts: dict[str, list[Chunk]] = {
            "text": [Predictions(ids[i : i + SEQUENCES], self.text.separator) for i in range(0, len(ids), SEQUENCES)],
            "retrieval": retrieval_chunks(needles) if needles else [],
            "samples": [Continuations(part, config.sample_tokens) for part in chunked([prompt for prompt, _ in openings])],
        }
        found = self._ask_all(ask, parts)
        texts = {
            name: {key: np.concatenate([a[key] for a in own["text"]]) for key in ("loss", "best")} for name, own in found.items()
        }
        separator = separator_of(tokenizer)
        scores = {name: retrieval_scores(needles, own["retrieval"], tokenizer) for name, own in found.items()} if needles else {}
        return {
            "by_position": breakdown.by_position(texts, ids, self.text.separator),
            "by_document_length": breakdown.by_document_length(texts, ids, separator),
            "by_frequency": breakdown.by_frequency(texts, ids, self.token_counts),
            "retrieval": retrieval_table(needles, scores) if needles else [],
            "samples": _samples(openings, {name: own["samples"] for name, own in found.items()}, tokenizer),
            "tasks": self._ask_tasks(tasks, ask) if tasks else None,
        }

    def _held_out(self, window: int) -> npt.NDArray[np.int64]:
        """Token ids, `[windows, tokens]`."""
        batches = self.text.first(self.config.tokens, self.text.num_sequences)
        return breakdown.windows(batches[0].numpy(), window)

    def _openings(self, tokenizer: Any) -> list[tuple[Ids, Ids]]:
        """(prompt, how the text goes on) of every sample: the prompt of the settings, then first halves of held-out sequences."""
        start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        ids = tokenizer(self.config.prompt, add_special_tokens=False)["input_ids"]
        openings: list[tuple[Ids, Ids]] = [((*start, *ids), ())] if start or ids else []
        sequences = self._held_out(self.text.sequences.shape[1])
        chosen = np.linspace(0, len(sequences) - 1, min(self.config.samples, len(sequences))).astype(int)
        for number in dict.fromkeys(chosen.tolist()):
            row = sequences[number].tolist()
            middle = len(row) // 2
            openings.append((tuple(row[:middle]), tuple(row[middle : middle + self.config.sample_tokens])))
        return openings

    def _ask_all(self, ask: Ask, parts: Mapping[str, Sequence[Chunk]]) -> dict[str, dict[str, list[Answer]]]:
        """Every model's answers to every part, asked for all at once."""
        asked = [(name, chunk) for name in self.folders for chunks in parts.values() for chunk in chunks]
        answers = iter(ask(asked))
        return {name: {part: [next(answers) for _ in chunks] for part, chunks in parts.items()} for name in self.folders}

    def _tasks(self) -> Any:
        if not self.config.tasks:
            return None
        harness_version()
        from puzzle_ray.evaluation.harness import Tasks

        return Tasks(self.config.tasks, self.half, self.config.limit)

    def _ask_tasks(self, tasks: Any, ask: Ask) -> dict[str, Any]:
        from puzzle_ray.evaluation.harness import PuzzleLM

        answers = {}
        for name, folder in self.folders.items():
            model = PuzzleLM(folder, ask=partial(_ask_one, ask, name), trusted=self.trusted)
            answers[name] = tasks.evaluate(model, self.config, self.seed)
        config = self.config
        found = compare_tasks(tasks.entries, answers, tasks.chances(), self.seed, config.resamples, config.confidence)
        how = {"half": self.half, "limit": config.limit, "num_fewshot": config.num_fewshot, "lm_eval": harness_version()}
        return found | how


def _ask_one(ask: Ask, name: str, chunks: Sequence[Chunk]) -> list[Answer]:
    return ask([(name, chunk) for chunk in chunks])


def quality_facts(found: Mapping[str, Any]) -> dict[str, Any]:
    """What stands in the stage's record: each child's agreement at all positions, and what it retained on the mean over tasks."""
    facts: dict[str, Any] = {}
    rows = found["by_position"]
    total = sum(row["tokens"] for row in rows)
    for name in rows[0]["models"]:
        if name != PARENT:
            facts[f"{name}_agreement"] = sum(row["tokens"] * row["models"][name]["agreement"] for row in rows) / total
    tasks = found["tasks"]
    for name, own in (tasks["mean"]["models"] if tasks and tasks["mean"] else {}).items():
        if name != PARENT:
            facts[f"{name}_retained"] = own["retained"]
    return facts


def _samples(
    openings: Sequence[tuple[Ids, Ids]], answers: Mapping[str, Sequence[Answer]], tokenizer: Any
) -> list[dict[str, Any]]:
    """Rows of `prompt`, `text` (how it goes on, empty for a prompt of the user's), `models` (name -> continuation), and `same_tokens`
    (name -> how many tokens are the parent's before the first that is not)."""
    rows = {
        name: [ids[:n].tolist() for a in of for ids, n in zip(a["ids"], a["length"], strict=True)] for name, of in answers.items()
    }
    found = []
    for number, (prompt, text) in enumerate(openings):
        parent = rows[PARENT][number]
        same = {}
        for name, of in rows.items():
            pairs = zip(of[number], parent, strict=False)
            same[name] = next((i for i, (own, other) in enumerate(pairs) if own != other), min(len(of[number]), len(parent)))
        begin = _decoded(tokenizer, prompt)
        texts = {name: _decoded(tokenizer, (*prompt, *of[number]))[len(begin) :] for name, of in rows.items()}
        found.append({"prompt": begin, "text": _decoded(tokenizer, text), "models": texts, "same_tokens": same})
    return found


def _decoded(tokenizer: Any, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=True))
