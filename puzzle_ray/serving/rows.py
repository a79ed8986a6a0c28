"""Rows of the cache within a budget of memory: how many, how long, and the forward passes that fill them."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from puzzle_ray.errors import ConfigError
from puzzle_ray.serving.masks import AttentionMasks
from puzzle_ray.serving.slots import SlotCache
from puzzle_ray.surgery.kv_cache import continuing

_log = logging.getLogger(__name__)

_SHORTEST_ROW = 64


class Rows:
    """The model and its cache. `capacity_tokens` is the number of rows x their length that memory allows.

    Raises ConfigError for a model that the engine cannot serve.
    """

    def __init__(self, model: PreTrainedModel, max_rows: int, max_length: int) -> None:
        self._model = model.eval()
        self._max_rows, self._max_length = max_rows, max_length
        self._masks = AttentionMasks(model.config, model.dtype)
        self.cache = SlotCache(model.config.num_hidden_layers, num_rows=1, row_length=min(_SHORTEST_ROW, max_length))
        self.capacity_tokens = max_rows * max_length
        self.forward_passes = 0
        with torch.inference_mode():  # a trial, after which it is known what each layer stores per token
            self.prefill(0, [[0]], [0], every_position=False)
            self.decode(torch.zeros(1, dtype=torch.long, device=model.device), np.array([1]))
            self.cache.clear(0)
        self.forward_passes = 0

    def limit(self, max_length: int, capacity_tokens: int) -> None:
        """The longest row there may be, and how many tokens all rows may hold."""
        self._max_length = max_length
        self.capacity_tokens = min(capacity_tokens, self._max_rows * max_length)
        self.cache.resize(1, min(_SHORTEST_ROW, max_length))

    def room(self, num_rows: int, length: int, spare: int = 0) -> bool:
        """Makes room for `num_rows` rows of `length` tokens. False where memory does not allow that and `spare` more tokens per row.

        Both are at least what is in use. Sizes grow by doubling, so that what is there is seldom copied.
        """
        if num_rows * min(length + spare, self._max_length) > self.capacity_tokens:
            return False
        if num_rows <= self.cache.num_rows and length <= self.cache.row_length:
            return True
        rows = min(_power_of_two(num_rows), self._max_rows)
        longer = min(_power_of_two(max(length, _SHORTEST_ROW)), self._max_length)
        choices = [
            (max(rows, self.cache.num_rows), max(longer, self.cache.row_length)),
            (rows, longer),
            (num_rows, longer),
            (num_rows, min(self.capacity_tokens // num_rows, self._max_length)),
        ]
        size = next((each for each in choices if each[0] * each[1] <= self.capacity_tokens), choices[-1])
        try:
            self.cache.resize(*size)
        except ConfigError as error:
            _log.warning("%s; the key-value cache stays at %d x %d tokens", error, self.cache.num_rows, self.cache.row_length)
            self.capacity_tokens = self.cache.num_rows * self.cache.row_length
            return num_rows <= self.cache.num_rows and length <= self.cache.row_length
        return True

    def prefill(self, first_row: int, pieces: Sequence[Sequence[int]], starts: Sequence[int], every_position: bool) -> Tensor:
        """Adds each piece to its row, from `first_row` on, at its start.

        Returns the logits after the last token of each piece, `[B, vocab]`, or after every token, `[B, T, vocab]`. Pieces are padded on
        the right. Causal attention does not look there.
        """
        device, longest = self._model.device, max(map(len, pieces))
        # Padded with a piece's own last token: no number can get into a row that does not come from its own request.
        padded = torch.tensor([[*piece, *[piece[-1]] * (longest - len(piece))] for piece in pieces], device=device)
        positions = torch.arange(longest, device=device) + torch.tensor(starts, device=device)[:, None]
        last = torch.tensor([len(piece) for piece in pieces], device=device) - 1
        keep, which = (torch.arange(longest, device=device), last) if every_position else last.unique(return_inverse=True)
        inputs: dict[str, object] = {"input_ids": padded, "position_ids": positions, "logits_to_keep": keep}
        if any(starts):
            kv_length = max(starts) + longest
            self.cache.begin(first_row, positions, kv_length)
            inputs["attention_mask"] = self._masks(positions, kv_length)
        else:
            self.cache.begin_fresh(first_row)
        logits = self._forward(inputs)
        return logits if every_position else logits[torch.arange(len(pieces), device=device), which]

    def decode(self, token_ids: Tensor, positions: np.ndarray) -> Tensor:
        """Adds one token to each of rows 0..B-1, at `positions`. Returns the logits after it, `[B, vocab]`."""
        at, kv_length = torch.from_numpy(positions).to(self._model.device)[:, None], int(positions.max()) + 1
        self.cache.begin(0, at, kv_length)
        inputs = {"input_ids": token_ids[:, None], "position_ids": at, "attention_mask": self._masks(at, kv_length)}
        return self._forward(inputs)[:, -1]

    def _forward(self, inputs: Mapping[str, object]) -> Tensor:
        self.forward_passes += 1
        logits = self._model(**inputs, **continuing(self.cache)).logits
        assert isinstance(logits, Tensor)
        return logits


def _power_of_two(number: int) -> int:
    """The least power of two that is not less."""
    return 1 << (number - 1).bit_length()
