"""Which requests a forward pass serves: prefill in pieces between decode steps, rows within the memory there is, and failures kept apart.

Everything here runs on the engine's thread.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf

import numpy as np
import torch
from torch import Tensor

from puzzle_ray.serving.choosing import NOT_A_TOKEN, Chooser, Chosen, TokenLogprob, token_logprobs
from puzzle_ray.serving.output import Outcome, Output, Step
from puzzle_ray.serving.prefixes import PrefixCache
from puzzle_ray.serving.rows import Rows
from puzzle_ray.serving.sequences import Batch, Endings, Sequence, chooser_for
from puzzle_ray.serving.waiting import Waiting

_log = logging.getLogger(__name__)

# A prefill pass takes waiting prompts in order, as long as padding them to the longest one wastes at most this share.
_MAX_PADDING = 0.25
# A request is taken in beside others where every row has room for so many tokens more. So it is not put back at once.
_SPARE_TOKENS = 64
# So many passes that fail one after the other are no request's fault.
_MAX_FAILURES = 3


class Scheduler:
    """Serves the requests of `waiting`, one step after the other.

    Requests being decoded are in rows 0..n-1 of the cache. Those whose prompts are being read are in rows from `prefill_row` on.
    """

    def __init__(
        self, rows: Rows, prefixes: PrefixCache, waiting: Waiting, output: Output, *, max_rows: int, max_length: int,
        prefill_tokens: int, eos_ids: frozenset[int], vocab_size: int, device: torch.device,
    ) -> None:  # fmt: skip
        self._rows, self._prefixes, self._waiting, self._output = rows, prefixes, waiting, output
        self._max_rows, self._max_length, self._prefill_tokens = max_rows, max_length, prefill_tokens
        self._eos_ids, self._vocab_size, self._device = eos_ids, vocab_size, device
        self._decoding: list[Sequence] = []
        self._batch: Batch | None = None  # of those; None when they have changed
        self._prefilling: list[Sequence] = []
        self._prefill_row = 0
        self._prompt_logprobs: dict[int, list[TokenLogprob | None]] = {}  # of those being read, by place in the group
        self._failures = 0
        self.finished = self.prompt_tokens = self.cached_tokens = self.generated_tokens = self.preemptions = 0

    @property
    def running(self) -> int:
        """The number of requests in rows."""
        return len(self._decoding) + len(self._prefilling)

    @property
    def kv_tokens(self) -> int:
        """Tokens in the rows of requests."""
        batch = self._batch
        decoded = [len(sequence.token_ids) for sequence in list(self._decoding)] if batch is None else batch.lengths.tolist()
        return sum(decoded) + sum(sequence.computed for sequence in list(self._prefilling))

    def step(self) -> None:
        """A piece of a prompt where one waits, then a token for every request being decoded."""
        self._drop_unwanted()
        if not self._prefilling:
            self._admit()
        if self._prefilling:
            self._guarded(self._prefill, self._prefilling)
        if self._decoding:
            self._guarded(self._decode, self._decoding)

    def end_all(self, reason: str) -> None:
        """Every request gets `reason` as its failure."""
        for sequence in [*self._decoding, *self._prefilling]:
            self._output.end(sequence.generation, reason)
        self._decoding, self._prefilling, self._batch = [], [], None

    # Who is served.

    def _drop_unwanted(self) -> None:
        for sequence in self._waiting.drop_unwanted():
            self._output.end(sequence.generation)
            self.finished += 1
        gone = [row for row, sequence in enumerate(self._decoding) if sequence.generation.unwanted]
        if gone:
            for row in gone:
                self._output.end(self._decoding[row].generation)
            self._retire(gone)
        if self._prefilling and all(sequence.generation.unwanted for sequence in self._prefilling):
            for sequence in self._prefilling:
                self._output.end(sequence.generation)
            self.finished += len(self._prefilling)
            self._prefilling = []

    def _admit(self) -> None:
        """Takes waiting requests in, as many as one pass reads and as memory has room for."""
        first_row = len(self._decoding)
        group: list[Sequence] = []
        longest = total = latest_start = 0
        while first_row + len(group) < self._max_rows and (candidate := self._waiting.first()) is not None:
            start = 0 if candidate.reports_prompt else self._prefixes.known(candidate.token_ids)
            piece = len(candidate.token_ids) - start
            padded = max(longest, piece) * (len(group) + 1)
            end = max(latest_start, start) + max(longest, piece)
            wasteful = padded > self._prefill_tokens or total + piece < padded * (1 - _MAX_PADDING) or end > self._max_length
            alone = not self._decoding and not group
            if group and wasteful:
                break
            if not self._has_room(first_row + len(group) + 1, end, 0 if alone else _SPARE_TOKENS):
                if alone:  # less memory was there than was promised at the start
                    self._output.end(self._waiting.take().generation, f"no memory for a request of {end} tokens")
                break
            longest, total, latest_start = max(longest, piece), total + piece, max(latest_start, start)
            group.append(self._waiting.take())
            if piece > self._prefill_tokens:
                break
        self._prefilling, self._prefill_row, self._prompt_logprobs = group, first_row, {}
        for index, sequence in enumerate(group):
            if not sequence.reports_prompt:
                sequence.computed = self._prefixes.restore(sequence.token_ids, first_row + index)
            if len(sequence.token_ids) == sequence.prompt_length:  # otherwise it was put back, and is counted already
                sequence.generation.cached_tokens = sequence.computed
                self.prompt_tokens += sequence.prompt_length
                self.cached_tokens += sequence.computed

    def _has_room(self, num_rows: int, length: int, spare: int = 0) -> bool:
        in_use = [len(sequence.token_ids) for sequence in self._prefilling]
        if self._decoding:
            in_use.append(int(self._current_batch().lengths.max()))
        return self._rows.room(num_rows, max([length, *in_use]), spare)

    def _make_room(self) -> None:
        """Sees to a place for each row's next token. Where there is none, the latest requests are put back into the queue."""
        while self._decoding:
            used = max(len(self._decoding), self._prefill_row + len(self._prefilling) if self._prefilling else 0)
            if self._has_room(used, 0):
                return
            if self._prefilling:
                for sequence in reversed(self._prefilling):
                    self._put_back(sequence)
                self._prefilling = []
            elif len(self._decoding) > 1:
                row = max(range(len(self._decoding)), key=lambda row: self._decoding[row].generation.submitted_at)
                sequence = self._decoding[row]
                self._retire([row], finished=False)
                self._put_back(sequence)
            else:
                raise MemoryError("no memory for the next token of the only request")

    def _put_back(self, sequence: Sequence) -> None:
        sequence.computed = 0
        self.preemptions += 1
        self._waiting.put_back(sequence)

    def _retire(self, rows: SequenceOf[int], failed: frozenset[int] = frozenset(), finished: bool = True) -> None:
        """Requests leave their rows. The last row moves into each freed row, so that the others stay in rows 0..n-1."""
        self._settle()
        for row in sorted(rows, reverse=True):
            leaving = self._decoding[row]
            if row in failed:
                self._rows.cache.clear(row)
            else:
                self._prefixes.keep(leaving.token_ids[: leaving.computed], row)
            last = self._decoding.pop()
            if row < len(self._decoding):
                self._rows.cache.move(source=len(self._decoding), target=row, length=last.computed)
                self._decoding[row] = last
            self.finished += finished

    # What is computed for them.

    def _prefill(self) -> None:
        """Reads the next piece of each prompt. After its last piece a request gets its first token, and joins those being decoded."""
        group = self._prefilling
        pieces = [sequence.token_ids[sequence.computed : sequence.computed + self._prefill_tokens] for sequence in group]
        reports = any(sequence.reports_prompt for sequence in group)
        logits = self._rows.prefill(self._prefill_row, pieces, [sequence.computed for sequence in group], every_position=reports)
        if reports:
            self._note_prompts(group, pieces, logits)
            last = torch.tensor([len(piece) - 1 for piece in pieces], device=logits.device)
            logits = logits[torch.arange(len(group), device=logits.device), last]
        for sequence, piece in zip(group, pieces, strict=True):
            sequence.computed += len(piece)
        if not any(sequence.left for sequence in group):
            self._begin_answers(group, logits)

    def _note_prompts(self, group: SequenceOf[Sequence], pieces: SequenceOf[SequenceOf[int]], logits: Tensor) -> None:
        """Log-probabilities of the prompt's tokens. The logits at a position are about the next one."""
        for index, (sequence, piece) in enumerate(zip(group, pieces, strict=True)):
            if not sequence.reports_prompt:
                continue
            following = sequence.token_ids[sequence.computed + 1 : sequence.computed + len(piece) + 1]
            found = self._prompt_logprobs.setdefault(index, [None])
            if following:
                ids = torch.tensor(following, device=logits.device)
                found += token_logprobs(logits[index, : len(following)], ids, [sequence.params.logprobs] * len(following))
            if len(found) == len(sequence.token_ids):
                sequence.generation.prompt_logprobs = found[: sequence.prompt_length]
                sequence.reports_prompt = False

    def _begin_answers(self, group: SequenceOf[Sequence], logits: Tensor) -> None:
        lengths = np.array([len(sequence.token_ids) for sequence in group], np.int64)
        chosen, ids = self._chosen(chooser_for(group, self._vocab_size, self._device), logits, lengths, group)
        outcomes = Endings(group, self._eos_ids).outcomes(ids, lengths + 1)
        asks = [len(sequence.token_ids) < sequence.limit for sequence in group]
        for index, sequence in enumerate(group):
            row = self._prefill_row + index
            if outcomes[index] == Outcome.FAILED:
                self._rows.cache.clear(row)
            else:
                self._prefixes.keep(sequence.token_ids, row)
        tokens = [int(token_id) if asked else None for token_id, asked in zip(ids, asks, strict=True)]
        kinds = [
            int(outcome) if asked or outcome == Outcome.FAILED else Outcome.LENGTH
            for outcome, asked in zip(outcomes, asks, strict=True)
        ]
        self._settle()
        self._prefilling = []
        for index, sequence in enumerate(group):
            if kinds[index] == Outcome.GOES_ON:
                if (row := self._prefill_row + index) != len(self._decoding):
                    self._rows.cache.move(row, len(self._decoding), sequence.computed)
                sequence.token_ids.append(int(ids[index]))
                self._decoding.append(sequence)
            else:
                self.finished += 1
        self.generated_tokens += sum(token is not None and token != NOT_A_TOKEN for token in tokens)
        logprobs = (
            None
            if chosen.logprobs is None
            else [each if asked else None for each, asked in zip(chosen.logprobs, asks, strict=True)]
        )
        self._output.put(Step([sequence.generation for sequence in group], tokens, kinds, logprobs))

    def _decode(self) -> None:
        """Gives every request one more token."""
        self._make_room()
        batch = self._current_batch()
        logits = self._rows.decode(batch.next_ids, batch.lengths - 1)
        chosen, ids = self._chosen(batch.chooser, logits, batch.lengths, batch.sequences)
        batch.note(chosen.token_ids, ids)
        outcomes = batch.endings.outcomes(ids, batch.lengths)
        ended = np.flatnonzero(outcomes).tolist()
        if ended:
            self._retire(ended, failed=frozenset(np.flatnonzero(outcomes == Outcome.FAILED).tolist()))
        self.generated_tokens += int((ids != NOT_A_TOKEN).sum())
        self._output.put(Step(batch.generations, ids.tolist(), outcomes.tolist(), chosen.logprobs))

    def _chosen(
        self, chooser: Chooser, logits: Tensor, positions: np.ndarray, sequences: SequenceOf[Sequence]
    ) -> tuple[Chosen, np.ndarray]:
        """A token per row of `logits`, also as an array. Where that raises, the rows are tried one by one, and only one's own fails."""
        try:
            chosen = chooser.choose(logits, positions)
            return chosen, chosen.token_ids.cpu().numpy()
        except Exception:
            _log.exception("no tokens can be chosen for all requests together")
        ids, logprobs = np.full(len(sequences), NOT_A_TOKEN, np.int64), []
        for row, sequence in enumerate(sequences):
            entry = None
            try:
                one = chooser_for([sequence], self._vocab_size, self._device).choose(
                    logits[row : row + 1], positions[row : row + 1]
                )
                ids[row] = int(one.token_ids[0])
                entry = None if one.logprobs is None else one.logprobs[0]
            except Exception:
                _log.exception("no token can be chosen for a request with %s", sequence.params)
            logprobs.append(entry)
        return Chosen(torch.from_numpy(ids).to(logits.device), tuple(logprobs)), ids

    def _current_batch(self) -> Batch:
        if self._batch is None:
            self._batch = Batch(self._decoding, self._eos_ids, self._vocab_size, self._device)
        return self._batch

    def _settle(self) -> None:
        """The members of the batch are about to change."""
        if self._batch is not None:
            self._batch.settle()
            self._batch = None

    def _guarded(self, work: Callable[[], None], concerned: list[Sequence]) -> None:
        """What a pass raises ends the requests that it was for, and no others. Raises it where passes do nothing but fail."""
        try:
            work()
            self._failures = 0
        except Exception as error:
            self._failures += 1
            if self._failures >= _MAX_FAILURES:
                raise
            _log.exception("a forward pass failed, and the requests in it with it")
            self._fail(list(concerned), f"{type(error).__name__}: {error}")

    def _fail(self, concerned: SequenceOf[Sequence], reason: str) -> None:
        """These requests end. They are all that are being decoded, or those whose prompts are read, wherever these are by now."""
        self._settle()
        for sequence in concerned:
            self._output.end(sequence.generation, reason)
        rows = [row for row, sequence in enumerate(self._decoding) if sequence in concerned]
        if any(sequence in concerned for sequence in self._prefilling):
            rows += range(self._prefill_row, self._prefill_row + len(self._prefilling))
        self._prefilling = [sequence for sequence in self._prefilling if sequence not in concerned]
        self._decoding = [sequence for sequence in self._decoding if sequence not in concerned]
        self.finished += len(concerned)
        for row in rows:
            self._rows.cache.clear(row)
