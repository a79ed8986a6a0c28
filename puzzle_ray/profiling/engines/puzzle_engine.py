"""The `puzzle` engine: what `serve-child` serves with, by everything but HTTP.

The scenario's batch is that many streams, all of which are asked for at once by token ids, greedy, to their full length. So the times
contain what the server's own attention, masks and cache cost, what choosing and handing on the tokens costs, their text, and the
events of the streams. Those costs are the same for parent and child, and stand in `fixed`: they make a small model's child gain less than
engine `torch` predicts. Not contained: HTTP and Ray Serve, the clients, and whatever keeps and finds the beginnings of prompts.

Every stack has two layers of the parent's own among its layers. Among nothing but its like a small layer is cheaper than in a child,
by up to a twentieth of the child: weights stay in the CPU's caches, and each layer runs the same code as the one before.

A prefill lasts until the last stream has its first event. By then, streams whose prompts were read first have further tokens.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from puzzle_ray.artifacts import LayerChoice, Scenario
from puzzle_ray.errors import ConfigError, ProfileError
from puzzle_ray.process import keep_freed_memory
from puzzle_ray.profiling.engines.torch_engine import TorchEngine
from puzzle_ray.profiling.measure import ProfileTask, stack_config
from puzzle_ray.serving.engine import Engine
from puzzle_ray.serving.limits import position_limit
from puzzle_ray.serving.masks import AttentionMasks
from puzzle_ray.serving.openai_api import OpenAIService, ServedModel
from puzzle_ray.serving.requests import CompletionRequest, parse
from puzzle_ray.version import __version__

_MODEL = "profiled"


class PuzzleEngine(TorchEngine):
    """`clock`: seconds of what is counted, by default of the wall."""

    name = "puzzle"
    base_layers = 2

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock

    def version(self) -> str:
        return f"puzzle_ray {__version__}, {super().version()}"

    def build(self, config: Any, choices: Sequence[LayerChoice], dtype: str, use_gpu: bool = False, like: Any = None) -> Any:
        """A stack of layers of one kind, with the parent's own among them."""
        kinds = getattr(config, "layer_types", None) or getattr(config, "attention_layers", None) or [""]
        deeper = stack_config(config, kinds[0], len(choices) + self.base_layers)
        return super().build(deeper, among_parents(choices[0], len(choices), self.base_layers), dtype, use_gpu, like)

    def check(self, task: ProfileTask, model_config: Any) -> None:
        """Raises ConfigError for a parent that the server refuses."""
        try:
            position_limit(model_config)
            AttentionMasks(model_config, torch.float32)
        except ConfigError as error:
            raise ConfigError("profile.engine", f"puzzle cannot serve this parent: {error}", "use engine torch") from None

    def time_once(self, model: Any, scenario: Scenario) -> tuple[float, float]:
        """(prefill_ms, decode_ms) of one batch of streams. decode_ms is 0 where an answer has one token."""
        if model.device.type == "cpu":
            keep_freed_memory()
        prompt, answer = int(scenario.input_tokens), int(scenario.output_tokens)
        tokenizer = word_tokenizer(model.config.vocab_size)
        prompts = torch.randint(model.config.vocab_size, (scenario.batch_size, prompt)).tolist()
        options = {"max_tokens": answer, "temperature": 0, "ignore_eos": True, "stream": True}
        bodies = [json.dumps({"model": _MODEL, "prompt": ids, **options}).encode() for ids in prompts]
        with self._engine(model, tokenizer, scenario.batch_size, prompt + answer) as engine:
            service = OpenAIService([ServedModel(_MODEL, engine, tokenizer)])
            first_s, all_s = asyncio.run(self._streams(service, bodies))
        return 1e3 * first_s, 1e3 * (all_s - first_s) / (answer - 1) if answer > 1 else 0.0

    @contextlib.contextmanager
    def _engine(self, model: Any, tokenizer: PreTrainedTokenizerBase, batch_size: int, length: int) -> Iterator[Engine]:
        """The server's engine, with the rows that it has after a while. Raises ProfileError where memory does not hold them."""
        engine = Engine(model, tokenizer, max_batch_size=batch_size, max_length=length, prefix_cache=False)
        if not engine.make_room(batch_size, length):
            problem = f"the server's key-value memory does not hold {batch_size} requests of {length} tokens"
            raise ProfileError("profile.scenario", problem, "lower the batch size")
        with engine:
            yield engine

    async def _streams(self, service: OpenAIService, bodies: list[bytes]) -> tuple[float, float]:
        """Seconds until the last stream has begun, and until the last one has ended."""
        began, firsts = self._clock(), []

        async def read(body: bytes) -> None:
            events = await service.answer_stream(parse(CompletionRequest, body))
            await anext(events)
            firsts.append(self._clock())
            async for _ in events:
                pass

        await asyncio.gather(*map(read, bodies))
        return max(firsts) - began, self._clock() - began


def among_parents(choice: LayerChoice, depth: int, base: int) -> list[LayerChoice]:
    """`depth` layers of one kind, and `base` of the parent's own spread over them: the last of each of `base` equal parts."""
    total = depth + base
    own = {(part + 1) * total // base - 1 for part in range(base)}
    return [LayerChoice() if index in own else choice for index in range(total)]


def word_tokenizer(vocab_size: int) -> PreTrainedTokenizerBase:
    """A tokenizer whose every token is a word. A profile knows a model's shapes, and no tokenizer of its own."""
    words = Tokenizer(WordLevel({f"w{token_id}": token_id for token_id in range(vocab_size)}, unk_token="w0"))
    return PreTrainedTokenizerFast(tokenizer_object=words)


ENGINE = PuzzleEngine()
