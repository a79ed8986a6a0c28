"""From texts and conversations to token ids, and from token ids to what an answer says of them.

Tokenising runs on threads of its own: a text of a megabyte takes a second, in which other requests are served.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from transformers import PreTrainedTokenizerBase

from puzzle_ray.errors import ConfigError
from puzzle_ray.serving.generation import EngineBusy
from puzzle_ray.serving.limits import TooLong
from puzzle_ray.serving.requests import ChatRequest, CompletionRequest
from puzzle_ray.serving.text import special_token_ids

_THREADS = 2
_MAX_PENDING = 64
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_ANCHOR = "a"  # decoded before a token, so that the space at its beginning is shown

Result = TypeVar("Result")


class Prompts:
    """Token ids of requests to one model. `max_tokens`: longer prompts are refused, those of far too many characters unread."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> None:
        self._tokenizer = tokenizer
        self._max_tokens = max_tokens
        self._longest_token = max((len(text) for text in tokenizer.get_vocab()), default=1)
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="tokenising")
        self._pending = 0

    async def token_ids(self, request: CompletionRequest | ChatRequest) -> list[list[int]]:
        """The token ids of each prompt. Raises ConfigError, EngineBusy."""
        return await self._run(lambda: self.read(request))

    async def _run(self, work: Callable[[], Result]) -> Result:
        if self._pending >= _MAX_PENDING:
            raise EngineBusy(self._pending)
        self._pending += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, work)
        finally:
            self._pending -= 1

    def read(self, request: CompletionRequest | ChatRequest) -> list[list[int]]:
        """The token ids of each prompt. Texts get the tokenizer's own special tokens, conversations the chat template's."""
        if isinstance(request, ChatRequest):
            return [self._conversation(request)]
        return [self._encode(one, "prompt") if isinstance(one, str) else one for one in request.prompts()]

    def _conversation(self, request: ChatRequest) -> list[int]:
        if self._tokenizer.chat_template is None:
            raise ConfigError("messages", "this model has no chat template", "use /v1/completions")
        turns = [message.turn() for message in request.messages]
        self._check_characters(sum(len(turn["content"]) for turn in turns), "messages")
        try:
            text = self._tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # whatever the template's code raises, e.g. where it wants user and assistant to alternate
            raise ConfigError("messages", f"the model's chat template refuses them: {error}") from None
        return self._encode(str(text), "messages", add_special_tokens=False)  # the template writes special tokens itself

    def _encode(self, text: str, where: str, **options: Any) -> list[int]:
        self._check_characters(len(text), where)
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            problem = f"holds half of a surrogate pair at character {error.start}"
            raise ConfigError(where, problem, "send whole characters") from None
        return list(self._tokenizer(text, **options)["input_ids"])

    def _check_characters(self, number: int, where: str) -> None:
        most = self._longest_token * self._max_tokens
        if number > most:
            problem = (
                f"has {number} characters, and this model's maximum context length is {self._max_tokens} tokens, at most {most}"
            )
            raise TooLong(where, problem, "shorten it")


class TokenTexts:
    """What single tokens are in text and bytes, for answers with log-probabilities."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._anchor = list(tokenizer(_ANCHOR, add_special_tokens=False)["input_ids"])
        self._known: dict[int, tuple[str, bytes]] = {}
        self._special_ids = special_token_ids(tokenizer)
        self._bytes = {character: byte for byte, character in _byte_letters().items()}

    def text(self, token_id: int) -> str:
        """The token's text. Bytes that are no whole character are written as OpenAI does: `bytes:\\xe2\\x80`."""
        return self._entry(token_id)[0]

    def raw(self, token_id: int) -> list[int]:
        """The token's bytes."""
        return list(self._entry(token_id)[1])

    def echoed(self, token_ids: Sequence[int]) -> str:
        """A prompt's text. Special tokens are shown as nothing, as they are in answers: who sent a text gets that text."""
        return self.decoded([token_id for token_id in token_ids if token_id not in self._special_ids])

    def width(self, token_id: int) -> int:
        """The characters that the token has in a text."""
        return 0 if token_id in self._special_ids else len(self.text(token_id))

    def decoded(self, token_ids: Sequence[int]) -> str:
        """Several tokens' text, special tokens included."""
        text = self._tokenizer.decode(token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text

    def _entry(self, token_id: int) -> tuple[str, bytes]:
        if token_id not in self._known:
            text = self.decoded([*self._anchor, token_id])[len(self.decoded(self._anchor)) :]
            raw = text.encode("utf-8", "replace")
            if _REPLACEMENT in text and (found := self._raw_bytes(token_id)) is not None:
                raw = found
                text = "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)
            self._known[token_id] = text, raw
        return self._known[token_id]

    def _raw_bytes(self, token_id: int) -> bytes | None:
        piece = str(self._tokenizer.convert_ids_to_tokens(token_id))
        if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):  # sentencepiece's spelling of a byte
            return bytes([int(piece[3:5], 16)])
        if all(character in self._bytes for character in piece):
            return bytes(self._bytes[character] for character in piece)
        return None


def _byte_letters() -> dict[int, str]:
    """Byte -> the letter that stands for it in byte-level vocabularies (GPT-2's): printable ones themselves, others from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    letters = {byte: chr(byte) for byte in printable}
    for offset, byte in enumerate(byte for byte in range(256) if byte not in letters):
        letters[byte] = chr(256 + offset)
    return letters
