"""Documents in packed sequences: which token begins one, and where in its document every token stands.

With `data.document_mask` every document is read as if it were a sequence of its own. What says so to a model is one number for each token,
its position in its document: positions start anew at every document, and a token sees those tokens before it that its positions join it
to. These are the `position_ids` of transformers' packed sequences. They are a function of a row's token ids alone, so that whoever reads
tokens knows them. A row that begins in the middle of a document begins at position 0: what stands before it is not in the row.

The last token of a document still predicts the separator behind it. So as many tokens count in a loss as without the mask. Text that has
the separator in it is cut there, as tokens alone do not tell one from the other; `puzzle_ray.data.documents.check_separators` looks for
that before any work.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from puzzle_ray.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

SETTING = "data.document_mask"


def separator_of(tokenizer: Any) -> int | None:
    """The token that every document of packed text begins with: the tokenizer's beginning of text, else its end of text; or None."""
    found: int | None = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    return found


def masked_by(tokenizer: Any) -> int:
    """The same for text that is read document by document. Raises ConfigError for a tokenizer without such a token."""
    found = separator_of(tokenizer)
    if found is None:
        problem = "the parent's tokenizer has no token that begins or ends a text, so nothing says where documents begin"
        raise ConfigError(SETTING, problem, f"write {SETTING}: false, or give the tokenizer an eos_token")
    return found


def positions_in_documents(input_ids: Tensor, separator: int | None) -> Tensor | None:
    """The position of every token in its document, `[sequences, tokens]` int64 for ids of that shape.

    None without a separator: then every row is one document, and models count positions themselves.
    """
    if separator is None:
        return None
    import torch

    places = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
    begins = torch.where(input_ids == separator, places, 0).cummax(dim=1).values
    return places - begins
