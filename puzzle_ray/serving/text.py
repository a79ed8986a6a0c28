"""From a stream of token ids to a stream of text. Only whole characters are shown, and no part of a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

# Tokens of the prompt that are decoded before the first new token, so that the space between both is right.
_CONTEXT_TOKENS = 5
# A character has at most 4 bytes. So more undecodable tokens than this never become a character, and are shown as U+FFFD.
_MAX_PENDING_TOKENS = 16
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class TextStream:
    """Decodes one request's new tokens.

    `push` takes one token, `push_all` several; both return the text that can be shown. The bytes of an unfinished character are held
    back until the rest comes. Text that may be the beginning of a stop string is held back until it is known not to be one. After a
    stop string, `stopped` is True, and all text before it has been returned. `special_ids` are shown as nothing: by default the
    tokenizer's, which takes a while to ask for (see `special_token_ids`).
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        prompt_ids: Sequence[int],
        stop: Sequence[str] = (),
        special_ids: frozenset[int] | None = None,
    ) -> None:
        self.stopped = False
        self._tokenizer = tokenizer
        self._special_ids = special_token_ids(tokenizer) if special_ids is None else special_ids
        self._stop = tuple(stop)
        self._context = list(prompt_ids[-_CONTEXT_TOKENS:])
        self._pending: list[int] = []
        self._held = ""

    def push(self, token_id: int) -> str:
        """Adds a token. Returns the text that can be shown now, often "" or one piece."""
        if token_id in self._special_ids:
            return ""
        self._pending.append(token_id)
        piece = self._decode_pending()
        if piece.endswith(_REPLACEMENT) and len(self._pending) < _MAX_PENDING_TOKENS:
            return ""
        self._context, self._pending = self._pending, []
        return self._release(piece)

    def push_all(self, token_ids: Sequence[int]) -> str:
        """Adds several tokens. Returns what `push` says of them one after the other, from one look at them all where it can."""
        shown = [token_id for token_id in token_ids if token_id not in self._special_ids]
        if not self._stop and len(shown) > 1:
            tokens = self._pending + shown
            text = self._decode(self._context + tokens)
            if _REPLACEMENT not in text:  # so no token is a part of a character that is not whole
                piece = text[len(self._decode(self._context)) :]
                self._context, self._pending = self._last_characters(tokens), []
                return piece
        return "".join(self.push(token_id) for token_id in shown if not self.stopped)

    def finish(self) -> str:
        """The rest of the text, when no token follows. An unfinished character is shown as U+FFFD."""
        piece = self._decode_pending() if self._pending else ""
        shown = self._release(piece)
        if not self.stopped:
            shown, self._held = shown + self._held, ""
        return shown

    def _last_characters(self, token_ids: list[int]) -> list[int]:
        """The shortest end of `token_ids` that does not begin within a character."""
        for number in range(1, _MAX_PENDING_TOKENS):
            if _REPLACEMENT not in self._decode(token_ids[-number:]):
                return token_ids[-number:]
        return token_ids

    def _decode_pending(self) -> str:
        return self._decode(self._context + self._pending)[len(self._decode(self._context)) :]

    def _decode(self, token_ids: list[int]) -> str:
        text = self._tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text

    def _release(self, piece: str) -> str:
        """The part of the held text and `piece` that cannot belong to a stop string."""
        text = self._held + piece
        positions = [position for stop in self._stop if (position := text.find(stop)) >= 0]
        if positions:
            self.stopped, self._held = True, ""
            return text[: min(positions)]
        held = max((_overlap(text, stop) for stop in self._stop), default=0)
        cut = len(text) - held
        self._held = text[cut:]
        return text[:cut]


def special_token_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The tokens that `decode(skip_special_tokens=True)` skips.

    They are more than the tokenizer's named ones: `<|end|>` of Phi-3 and `<|eot_id|>` of Llama 3 may have no role, and are special.
    """
    try:
        added = tokenizer.added_tokens_decoder
    except NotImplementedError:  # mistral_common's
        added = {}
    return frozenset(tokenizer.all_special_ids) | {token_id for token_id, token in added.items() if token.special}


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that is a beginning of `stop`, but not all of it."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
