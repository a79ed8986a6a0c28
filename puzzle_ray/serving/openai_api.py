"""OpenAI's completions and chat completions on one or several engines, without a web framework."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import asdict

from transformers import PreTrainedTokenizerBase

from puzzle_ray.errors import ConfigError, PuzzleError
from puzzle_ray.serving.answers import Answer, best, event, usage
from puzzle_ray.serving.api_errors import Json, UnknownModel, error_response
from puzzle_ray.serving.engine import Engine
from puzzle_ray.serving.generation import Generation, stream_deltas, wait_for_all
from puzzle_ray.serving.metrics import Source, exposition
from puzzle_ray.serving.prompts import Prompts, TokenTexts
from puzzle_ray.serving.requests import ChatRequest, CompletionRequest
from puzzle_ray.serving.sampling_defaults import SamplingDefaults

_EVENTS_PER_S = 200  # of all streams together, about: each costs the server's processes half a millisecond


class ServedModel:
    """A model under a name: its engine, and what turns requests into tokens and tokens into answers.

    defaults: the sampling of requests that leave fields out. None: OpenAI's.
    """

    def __init__(
        self, name: str, engine: Engine, tokenizer: PreTrainedTokenizerBase, defaults: SamplingDefaults | None = None
    ) -> None:
        self.name = name
        self.engine = engine
        self.defaults = defaults or SamplingDefaults()
        self.prompts = Prompts(tokenizer, engine.max_length)
        self.texts = TokenTexts(tokenizer)
        self.created = int(time.time())

    def card(self) -> Json:
        """The model as /v1/models lists it."""
        about = {"id": self.name, "object": "model", "created": self.created, "owned_by": "puzzle_ray"}
        return {**about, "max_model_len": self.engine.max_length, "sampling_defaults": self.defaults.shown()}


class OpenAIService:
    """Answers requests for the models it has. It raises PuzzleErrors before the first token (see `error_response`).

    stream_interval_s: tokens that come faster are put together into one event. The first and the last one never wait. Where many
    streams run, their tokens wait longer: events take time that the model needs. 0: each token has an event, whatever that takes.
    """

    def __init__(self, models: Sequence[ServedModel], stream_interval_s: float = 0.02) -> None:
        self._models: Mapping[str, ServedModel] = {model.name: model for model in models}
        self._stream_interval_s = stream_interval_s
        self._streams = 0  # that are open now

    def _interval_s(self) -> float:
        return max(self._stream_interval_s, self._streams / _EVENTS_PER_S) if self._stream_interval_s else 0.0

    def check(self) -> None:
        """Raises EngineFailed if an engine has stopped or is stuck."""
        for model in self._models.values():
            model.engine.check()

    def health(self) -> Json:
        """Body of GET /health, with the counters of each model's engine. Raises EngineFailed if one has stopped or is stuck."""
        self.check()
        return {"status": "ok", "models": {name: asdict(model.engine.stats()) for name, model in self._models.items()}}

    def metrics(self, labels: Mapping[str, str]) -> str:
        """Body of GET /metrics, for Prometheus. All samples have `labels`, and the model's name."""
        return exposition(
            [
                Source({**labels, "model": name}, asdict(model.engine.stats()), model.engine.metrics)
                for name, model in self._models.items()
            ]
        )

    def models(self) -> Json:
        """Body of GET /v1/models."""
        return {"object": "list", "data": [model.card() for model in self._models.values()]}

    def model(self, name: str | None) -> ServedModel:
        """The model of that name; without a name, the only one. Raises UnknownModel, ConfigError."""
        served = ", ".join(repr(each) for each in self._models)
        if name is None:
            if len(self._models) > 1:
                raise ConfigError("model", "is missing", f"name one of {served}")
            return next(iter(self._models.values()))
        if name not in self._models:
            raise UnknownModel(name[:100], served)
        return self._models[name]

    async def submit(self, request: CompletionRequest | ChatRequest) -> list[Generation]:
        """Start `num_candidates` generations per prompt, all or none. Raises UnknownModel, ConfigError, EngineBusy, EngineFailed."""
        model = self.model(request.model)
        params = request.sampling_params(model.defaults)
        model.engine.check()
        model.engine.check_number(request.num_prompts * len(params))  # before a million prompts are tokenised
        prompts = await model.prompts.token_ids(request)
        rooms = [model.engine.max_length - len(prompt_ids) for prompt_ids in prompts]
        asked = [(ids, request.within(each, room)) for ids, room in zip(prompts, rooms, strict=True) for each in params]
        return model.engine.submit_all(asked)

    async def answer(self, request: CompletionRequest | ChatRequest) -> Json:
        """The whole response. Where this call is cancelled, because the client has gone, the slots are freed."""
        generations = await self.submit(request)
        await wait_for_all(generations)
        model = self.model(request.model)
        answer, per_prompt = Answer(request, model.name, model.texts), request.num_candidates
        grouped = [generations[start : start + per_prompt] for start in range(0, len(generations), per_prompt)]
        chosen = [each for group in grouped for each in best(group, request.num_choices)]
        choices = [answer.whole(index, each) for index, each in enumerate(chosen)]
        return {**answer.head(), "choices": choices, "usage": usage(generations, per_prompt)}

    async def answer_stream(self, request: CompletionRequest | ChatRequest) -> AsyncGenerator[str, None]:
        """Server-sent events. Errors are raised before the first event. Closing the iterator frees the slots, and so does losing it."""
        events = self._events(request, await self.submit(request))
        await anext(events)  # a generator that has not begun would be closed without a look at its `finally`
        return events

    async def _events(
        self, request: CompletionRequest | ChatRequest, generations: Sequence[Generation]
    ) -> AsyncGenerator[str, None]:
        try:
            yield ""  # it has begun
        except GeneratorExit:
            for generation in generations:
                generation.cancel()
            raise
        model = self.model(request.model)
        answer = Answer(request, model.name, model.texts, chunks=True)
        has_usage = request.stream_options is not None and request.stream_options.include_usage
        # With `include_usage`, every chunk has the field `usage`. It is null except in the last chunk.
        head = {**answer.head(), "usage": None} if has_usage else answer.head()
        self._streams += 1
        try:
            async with contextlib.aclosing(stream_deltas(generations, self._interval_s)) as stream:
                async for index, delta in stream:
                    if (choice := answer.chunk(index, generations[index], delta)) is not None:
                        yield event({**head, "choices": [choice]})
            if has_usage:
                yield event({**head, "choices": [], "usage": usage(generations, request.num_candidates)})
        except PuzzleError as error:  # the status line was sent already, so the error becomes the last event
            yield event(error_response(error)[1])
        finally:
            self._streams -= 1
        yield "data: [DONE]\n\n"
