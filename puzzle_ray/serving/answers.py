"""How completions, chat completions and their chunks write the same content."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Sequence

from puzzle_ray.serving.api_errors import Json
from puzzle_ray.serving.choosing import TokenLogprob
from puzzle_ray.serving.generation import Delta, FinishReason, Generation
from puzzle_ray.serving.prompts import TokenTexts
from puzzle_ray.serving.requests import ChatRequest, CompletionRequest

_LEAST_LOGPROB = -9999.0  # OpenAI's word for minus infinity, which JSON cannot say


class Answer:
    """The texts of one response: whole, or in chunks."""

    def __init__(
        self, request: CompletionRequest | ChatRequest, model_name: str, texts: TokenTexts, chunks: bool = False
    ) -> None:
        self._chat, self._chunks, self._texts = isinstance(request, ChatRequest), chunks, texts
        self._echo = isinstance(request, CompletionRequest) and bool(request.echo)
        self._logprobs = bool(request.logprobs) if isinstance(request, ChatRequest) else request.logprobs is not None
        kind = "chat.completion" if self._chat else "text_completion"
        self._head = {
            "id": f"{'chatcmpl' if self._chat else 'cmpl'}-{uuid.uuid4().hex}",
            "object": f"{kind}.chunk" if self._chat and chunks else kind,
            "created": int(time.time()),
            "model": model_name,
        }
        self._offsets: dict[int, int] = {}  # of a choice that has begun: characters so far

    def head(self) -> Json:
        """The fields before `choices`."""
        return dict(self._head)

    def whole(self, index: int, generation: Generation) -> Json:
        """A choice of a response that is not streamed."""
        return self._choice(index, generation, generation.text, generation.finish_reason, generation.logprobs)

    def chunk(self, index: int, generation: Generation, delta: Delta) -> Json | None:
        """A choice of a chunk: what has come since the last one. None where there is nothing to say."""
        logprobs = delta.logprobs if self._logprobs else ()
        if not (logprobs or delta.text or delta.finish_reason):
            return None
        return self._choice(index, generation, delta.text, delta.finish_reason, logprobs)

    def _choice(
        self, index: int, generation: Generation, text: str, finish_reason: FinishReason | None, logprobs: Sequence[TokenLogprob]
    ) -> Json:
        begins = index not in self._offsets
        offset = self._offsets.get(index, 0)
        entries: list[TokenLogprob | None] = list(logprobs)
        if begins and self._echo:
            text = self._texts.echoed(generation.prompt_ids) + text
            entries = [*(generation.prompt_logprobs or ()), *entries]
        listed, end = self._logprob_list(generation, entries, offset) if self._logprobs else (None, offset)
        self._offsets[index] = end
        tail = {"index": index, "logprobs": listed, "finish_reason": finish_reason}
        if not self._chat:
            return {"text": text, **tail}
        message = {"role": "assistant", "content": text} if begins else {"content": text}
        return {"delta" if self._chunks else "message": message, **tail}

    def _logprob_list(self, generation: Generation, entries: Sequence[TokenLogprob | None], offset: int) -> tuple[Json, int]:
        """The field `logprobs` about some tokens, the first of which begins at character `offset`, and the character after them."""
        if self._chat:
            return {"content": [self._chat_entry(entry) for entry in entries if entry is not None], "refusal": None}, offset
        tokens, offsets = [], []
        for position, entry in enumerate(entries):  # only the prompt's first token has no entry
            token_id = generation.prompt_ids[position] if entry is None else entry.token_id
            tokens.append(self._texts.text(token_id))
            offsets.append(offset)
            offset += self._texts.width(token_id)
        alternatives = [None if entry is None else self._alternatives(entry) for entry in entries]
        own = [None if entry is None else _number(entry.logprob) for entry in entries]
        return {"tokens": tokens, "token_logprobs": own, "top_logprobs": alternatives, "text_offset": offsets}, offset

    def _alternatives(self, entry: TokenLogprob) -> dict[str, float]:
        """Texts of the likeliest tokens, and of the token itself. Of tokens with one text, the likeliest counts."""
        found: dict[str, float] = {}
        for token_id, logprob in (*entry.top, (entry.token_id, entry.logprob)):
            found.setdefault(self._texts.text(token_id), _number(logprob))
        return found

    def _chat_entry(self, entry: TokenLogprob) -> Json:
        def described(token_id: int, logprob: float) -> Json:
            return {"token": self._texts.text(token_id), "logprob": _number(logprob), "bytes": self._texts.raw(token_id)}

        return {**described(entry.token_id, entry.logprob), "top_logprobs": [described(*each) for each in entry.top]}


def usage(generations: Sequence[Generation], num_candidates: int) -> Json:
    """Token counts. A prompt counts once, however many candidates it has."""
    prompts = generations[::num_candidates]
    prompt = sum(len(each.prompt_ids) for each in prompts)
    completion = sum(len(each.token_ids) for each in generations)
    counts = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
    return {**counts, "prompt_tokens_details": {"cached_tokens": sum(each.cached_tokens for each in prompts)}}


def best(candidates: Sequence[Generation], number: int) -> list[Generation]:
    """The likeliest answers to one prompt, by mean log-probability per token; all of them in their order where all are wanted."""
    if len(candidates) == number:
        return list(candidates)

    def mean(generation: Generation) -> float:
        entries = generation.logprobs
        return sum(entry.logprob for entry in entries) / len(entries) if entries else float("-inf")

    return sorted(candidates, key=mean, reverse=True)[:number]


def event(body: Json) -> str:
    """A server-sent event."""
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"


def _number(logprob: float) -> float:
    return max(logprob, _LEAST_LOGPROB)
