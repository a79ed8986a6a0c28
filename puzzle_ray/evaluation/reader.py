"""One model in memory that answers chunks of requests, and the answers of several models in one process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from puzzle_ray.data.packing import positions_in_documents
from puzzle_ray.errors import DataError
from puzzle_ray.evaluation.requests import (
    Answer,
    Asked,
    Chunk,
    Continuations,
    Ids,
    Likelihoods,
    Predictions,
    file_name,
)
from puzzle_ray.models.blocks import CPU
from puzzle_ray.models.child import quiet_transformers
from puzzle_ray.models.masks import packed_arguments
from puzzle_ray.models.rope import constant_up_to
from puzzle_ray.models.shards import LayersOf, ShardedModel
from puzzle_ray.models.spread import load_on
from puzzle_ray.models.tokenizer import tokenizer_of
from puzzle_ray.progress import Progress
from puzzle_ray.store import Artifact

GENERATED_TOGETHER = 16  # requests that are continued in one batch


class Reader:
    """Answers chunks for one model, a child or any causal LM, in float32. `batch_tokens`: of a forward pass, padding included.
    `trusted`: the tokenizer's own code may run. With `layers_of`, the model's layers lie in shards, and what is at its ends on the first
    device."""

    def __init__(
        self,
        folder: str,
        batch_tokens: int,
        devices: Sequence[torch.device] = (CPU,),
        trusted: bool = False,
        layers_of: LayersOf | None = None,
    ) -> None:
        with quiet_transformers():
            if layers_of is None:
                self.model = load_on(folder, torch.float32, devices)
            else:
                self.model = ShardedModel(folder, layers_of, torch.float32, devices[0])
        self.tokenizer = tokenizer_of(folder, trusted)
        self.batch_tokens = batch_tokens
        self.max_tokens: int | None = getattr(self.model.config, "max_position_embeddings", None)

    @torch.inference_mode()
    def answer(self, chunk: Chunk) -> Answer:
        """Raises DataError for a continuation that is longer than the model's positions."""
        if isinstance(chunk, Likelihoods):
            return self._likelihoods(chunk)
        if isinstance(chunk, Predictions):
            return self._predictions(chunk)
        return self._continuations(chunk)

    def _logits(self, ids: Tensor, separator: int | None = None) -> Tensor:
        ids = ids.to(self.model.device)
        known = packed_arguments(self.model, ids, positions_in_documents(ids, separator))
        logits: Tensor = self.model(ids, use_cache=False, **known).logits
        return logits

    def _likelihoods(self, chunk: Likelihoods) -> Answer:
        """Pairs that differ in their last token alone are read once: choices of one letter cost one row together."""
        rows: dict[Ids, list[int]] = {}
        for number, (context, continuation) in enumerate(chunk.pairs):
            rows.setdefault(self._input(context, continuation), []).append(number)
        log_prob, is_greedy = np.zeros(len(chunk.pairs)), np.zeros(len(chunk.pairs), dtype=bool)
        for batch in _batches(list(rows), self.batch_tokens, constant_up_to(self.model.config)):
            ids = torch.zeros((len(batch), len(batch[0])), dtype=torch.long)
            for row, tokens in zip(ids, batch, strict=True):
                row[: len(tokens)] = torch.tensor(tokens)
            for logits_TV, tokens in zip(self._logits(ids), batch, strict=True):
                for number in rows[tokens]:
                    wanted = torch.tensor(chunk.pairs[number][1], device=logits_TV.device)
                    own = F.log_softmax(logits_TV[len(tokens) - len(wanted) : len(tokens)].float(), dim=-1)
                    log_prob[number] = float(own.gather(-1, wanted[:, None]).sum())
                    is_greedy[number] = bool((own.argmax(-1) == wanted).all())
        return {"log_prob": log_prob, "is_greedy": is_greedy}

    def _input(self, context: Ids, continuation: Ids) -> Ids:
        """What the model reads: all but the last token, as many from the end as it has positions for."""
        whole = context + continuation
        if self.max_tokens is not None:
            if len(continuation) > self.max_tokens:
                problem = f"a continuation has {len(continuation)} tokens, and the model {self.max_tokens} positions"
                raise DataError("evaluate.tasks", problem, "leave the task out")
            whole = whole[-(self.max_tokens + 1) :]
        return whole[:-1]

    def _predictions(self, chunk: Predictions) -> Answer:
        loss, best = [], []
        sequences = max(1, self.batch_tokens // chunk.input_ids.shape[1])
        for ids in torch.from_numpy(chunk.input_ids.copy()).split(sequences):
            log_probs = F.log_softmax(self._logits(ids, chunk.separator)[:, :-1].float(), dim=-1)
            next_ids = ids[:, 1:].to(log_probs.device)
            loss.append(-log_probs.gather(-1, next_ids.unsqueeze(-1)).squeeze(-1).cpu())
            best.append(log_probs.argmax(-1).to(torch.int32).cpu())
        return {"loss": torch.cat(loss).numpy(), "best": torch.cat(best).numpy()}

    def _continuations(self, chunk: Continuations) -> Answer:
        from puzzle_ray.serving.engine import Engine
        from puzzle_ray.serving.masks import unserved_layers
        from puzzle_ray.serving.sampling import SamplingParams
        from puzzle_ray.serving.without_cache import continued

        limit = min(self.max_tokens or 2**20, constant_up_to(self.model.config) or 2**20)  # what the engine can serve
        room = min(chunk.max_tokens, limit - 1)
        prompts = [prompt[-(limit - room) :] for prompt in chunk.prompts]
        size = min(limit, max(len(prompt) for prompt in prompts) + room)
        how: dict[str, Any] = {"max_tokens": room, "stop": chunk.stop, "temperature": chunk.temperature, "top_p": chunk.top_p}
        params = [SamplingParams(seed=number, **how) for number in range(len(prompts))]
        if isinstance(self.model, ShardedModel) or unserved_layers(self.model.config):
            generations = continued(self.model, self.tokenizer, prompts, params, size, self.batch_tokens)
            return _as_answer([generation.token_ids for generation in generations], chunk.max_tokens)
        engine = Engine(
            self.model,
            self.tokenizer,
            max_batch_size=min(GENERATED_TOGETHER, len(prompts)),
            max_length=size,
            max_waiting=len(prompts),
            prefill_tokens=self.batch_tokens,
            prefix_cache=False,
        )
        # all are there before the engine begins: which of them share a batch does not depend on time
        asked = [engine.submit(prompt, each) for prompt, each in zip(prompts, params, strict=True)]
        with engine:
            return _as_answer([generation.result().token_ids for generation in asked], chunk.max_tokens)


def _as_answer(found: Sequence[Sequence[int]], max_tokens: int) -> Answer:
    ids = np.full((len(found), max_tokens), -1, dtype=np.int32)
    for row, tokens in zip(ids, found, strict=True):
        row[: len(tokens)] = tokens
    return {"ids": ids, "length": np.asarray([len(tokens) for tokens in found], dtype=np.int32)}


def _batches(rows: Sequence[Ids], batch_tokens: int, border: int | None = None) -> list[list[Ids]]:
    """Rows of like length together, the longest first; a batch has one row at least. None has rows on both sides of a border."""
    batches: list[list[Ids]] = []
    for row in sorted(rows, key=lambda row: (-len(row), row)):
        full = not batches or len(batches[-1][0]) * (len(batches[-1]) + 1) > batch_tokens
        if full or (border is not None and len(row) <= border < len(batches[-1][0])):
            batches.append([])
        batches[-1].append(row)
    return batches


def saved_answer(artifact: Artifact, asked: Asked) -> Answer | None:
    """The answer that an earlier run left in an unfinished stage."""
    name = file_name(asked)
    if not artifact.exists(name):
        return None
    return {key: tensor.numpy() for key, tensor in artifact.read_tensors(name)[0].items()}


def save_answer(artifact: Artifact, asked: Asked, answer: Answer) -> None:
    artifact.write_tensors(file_name(asked), {key: torch.from_numpy(np.array(v)) for key, v in answer.items()})


class AskHere:
    """Answers in this process: one model at a time is in memory, and every answer is kept in the stage's folder."""

    def __init__(
        self,
        folders: Mapping[str, str],
        batch_tokens: int,
        artifact: Artifact,
        progress: Progress,
        trusted: bool = False,
        layers_of: LayersOf | None = None,
    ) -> None:
        self.folders, self.batch_tokens, self.artifact, self.progress = folders, batch_tokens, artifact, progress
        self.trusted, self.layers_of = trusted, layers_of
        self.name = ""
        self.reader: Reader | None = None

    def __call__(self, asked: Sequence[Asked]) -> list[Answer]:
        answers: list[Answer] = []
        with self.progress.stage("quality", len(asked), "chunk") as bar:
            for item in asked:
                found = saved_answer(self.artifact, item)
                if found is None:
                    found = self._reader(item[0]).answer(item[1])
                    save_answer(self.artifact, item, found)
                answers.append(found)
                bar.advance()
        return answers

    def _reader(self, name: str) -> Reader:
        if self.name != name or self.reader is None:
            self.reader = None  # one model at a time
            self.reader = Reader(self.folders[name], self.batch_tokens, trusted=self.trusted, layers_of=self.layers_of)
            self.name = name
        return self.reader
