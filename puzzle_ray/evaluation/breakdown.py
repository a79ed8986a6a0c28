"""Where a child differs from its parent: by position, by the length of the document, and by how frequent the predicted token is."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

# S sequences, T tokens
Answers = Mapping[str, Mapping[str, npt.NDArray[Any]]]  # of every model: `loss` and `best`, both [sequences, tokens - 1]
Table = list[dict[str, Any]]  # rows of `bucket`, `tokens` and `models`: name -> `loss`, `perplexity`, `agreement`
PARENT = "parent"
FREQUENCIES = ((1e-2, "at least 1 %"), (1e-3, "0.1 to 1 %"), (1e-4, "0.01 to 0.1 %"), (0.0, "below 0.01 %"))
UNSEEN = "not in the training text"


def windows(sequences_ST: npt.NDArray[np.int64], tokens: int) -> npt.NDArray[np.int64]:
    """Consecutive sequences joined to longer ones of `tokens`; what is left over at the end is dropped. One window at least."""
    whole = sequences_ST.reshape(-1)
    count = max(1, len(whole) // tokens)
    return whole[: count * tokens].reshape(count, -1)


def by_position(answers: Answers, ids_ST: npt.NDArray[np.int64], separator: int | None = None) -> Table:
    """Buckets of how many tokens a model sees before the predicted one, each twice as long as the one before it.

    With `separator`, which documents begin with, these are the tokens of one document alone (see `puzzle_ray.data.packing`).
    """
    places = np.broadcast_to(np.arange(ids_ST.shape[1] - 1), (len(ids_ST), ids_ST.shape[1] - 1))
    begins = np.zeros_like(places) if separator is None else np.where(ids_ST[:, :-1] == separator, places, 0)
    before = 1 + places - np.maximum.accumulate(begins, axis=1)
    return _table(answers, np.frexp(before / 16)[1].clip(min=0), lambda b: _range(8 << b if b else 1, (16 << b) - 1))


def by_document_length(answers: Answers, ids_ST: npt.NDArray[np.int64], separator: int | None) -> Table:
    """Buckets of the length of the document that the predicted token belongs to, in tokens, as far as it lies in this text.

    Documents begin with `separator`. Consecutive sequences are consecutive text. Empty where there is no separator in it.
    """
    flat = ids_ST.reshape(-1)
    if separator is None or not (flat == separator).any():
        return []
    document = np.cumsum(flat == separator)
    length = np.bincount(document)[document].reshape(ids_ST.shape)[:, 1:]
    return _table(
        answers, np.ceil(np.log2(np.maximum(length, 64) / 64)), lambda b: _range(1 if b == 0 else (32 << b) + 1, 64 << b)
    )


def by_frequency(answers: Answers, ids_ST: npt.NDArray[np.int64], counts_V: npt.NDArray[np.int64]) -> Table:
    """Buckets of the predicted token's share of the training text, where token v is `counts_V[v]` times."""
    share = counts_V / max(1, counts_V.sum())
    bucket_V = np.full(len(counts_V), len(FREQUENCIES))
    for number, (least, _) in reversed(list(enumerate(FREQUENCIES))):  # from the widest to the narrowest, which stays
        bucket_V[(share >= least) & (counts_V > 0)] = number
    names = [name for _, name in FREQUENCIES] + [UNSEEN]
    return _table(answers, bucket_V[ids_ST[:, 1:]], lambda b: names[b])


def _table(answers: Answers, bucket: npt.NDArray[Any], name_of: Callable[[int], str]) -> Table:
    best = answers[PARENT]["best"]
    rows: Table = []
    for number in np.unique(bucket).astype(int).tolist():
        inside = bucket == number
        models = {}
        for name, answer in answers.items():
            loss = float(answer["loss"][inside].mean(dtype=np.float64))
            agreement = float((answer["best"][inside] == best[inside]).mean())
            models[name] = {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "agreement": agreement}
        rows.append({"bucket": name_of(number), "tokens": int(inside.sum()), "models": models})
    return rows


def _range(low: int, high: int) -> str:
    return f"{low} to {high}"
