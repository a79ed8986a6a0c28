"""The parent's tokenizer, read without questions."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from puzzle_ray.errors import ParentError
from puzzle_ray.models.checkpoint import first_line, locate, read_json, some

_JSON_FILES = ("tokenizer_config.json", "special_tokens_map.json", "tokenizer.json")
_SENTENCEPIECE_FILES = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
_NO_TEXT = ("image", "video", "audio", "boi", "eoi", "pad")  # their tokens stand for pictures and sounds, or fill up


def read_tokenizer(folder: Path, trust_remote_code: bool = False) -> Any:
    """The tokenizer in a model's folder. Raises ParentError where there is none that can be read.

    Runs none of the folder's own code unless `trust_remote_code` says so, and never asks the user.
    """
    from transformers import AutoTokenizer

    remedy = "save the tokenizer there, too"
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except MemoryError:
        raise
    except Exception as error:  # whatever the library raises
        for name in _JSON_FILES:
            if (folder / name).exists():
                read_json(folder / name)  # raises for the file that is to blame, if it is no JSON
        absent = str(error).startswith("Couldn't instantiate the backend tokenizer")
        reason = "no tokenizer.json, nor files to make one from" if absent else first_line(error)
        pieces = [name for name in _SENTENCEPIECE_FILES if (folder / name).exists()]
        if pieces and not (folder / "tokenizer.json").exists() and find_spec("sentencepiece") is None:
            reason = f"{pieces[0]} is sentencepiece's, which is not installed here"  # the library asks for tiktoken, which does not help
            remedy = "pip install sentencepiece protobuf, or save the tokenizer's tokenizer.json there, too"
        if "trust_remote_code" in str(error) and not trust_remote_code:
            reason = "it asks for code of its own"
            remedy = "set trust_remote_code: true (for a run; servers never run it), or save it as a tokenizer of transformers"
        raise ParentError("parent", f"{folder} has no tokenizer that can be read ({reason})", remedy) from None
    if tokenizer.get_vocab().keys() <= set(tokenizer.all_special_tokens):  # made without a file, in some families
        raise ParentError("parent", f"{folder} has no tokenizer that can be read (it knows special tokens only)", remedy)
    return tokenizer


def tokenizer_of(address: str, trusted: bool) -> Any:
    """The tokenizer of a model's folder, URL or hub id. `trusted`: its own code may run."""
    return read_tokenizer(locate(address, trusted=trusted), trusted)


def check_tokenizer(tokenizer: Any, config: Any) -> None:
    """Raises ParentError for a tokenizer with ids that have no row in the embedding.

    Tokens for media and padding are let through: published models have them behind the embedding, and hardly any text holds their
    names. A text that does is refused when it is tokenised.
    """
    no_text = {getattr(tokenizer, f"{kind}_token", None) for kind in _NO_TEXT}
    beyond = {token: i for token, i in tokenizer.get_vocab().items() if i >= config.vocab_size and token not in no_text}
    if beyond:
        names = some(f"{token!r} is {i}" for token, i in beyond.items())
        problem = f"the tokenizer has ids that an embedding of {config.vocab_size} rows does not ({names})"
        remedy = "take the tokenizer that the model was trained with, or resize the model's embedding and save both"
        raise ParentError("parent", problem, remedy)
