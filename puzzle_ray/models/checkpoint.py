"""Hugging Face checkpoints: finding one, identifying its content, and reading single tensors straight from safetensors.

Whatever a library raises over the bytes of a file leaves here as a ParentError that names the file.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from puzzle_ray.errors import ParentError, PuzzleError
from puzzle_ray.models.other_folders import why_no_config, why_no_folder, why_no_weights
from puzzle_ray.store import local_copy, verified_folder

if TYPE_CHECKING:
    from torch import Tensor

_WHOLE_FILE_BYTES = 64 << 20
_SAMPLE_BYTES = 1 << 20
_SAMPLES = 32
_COMPARED_ROWS = 4096
_IDENTIFYING = {".json", ".safetensors", ".model", ".jinja", ".tiktoken", ".py"}
_TOKENIZER_TEXTS = {"merges.txt", "vocab.txt"}
_HUB_PAGE = re.compile(r"(?:https?://(?:www\.)?(?:huggingface\.co|hf\.co)/|hf://)(?:models/)?([^/]+/[^/]+)(?:/tree/[^/]+)?/?")
_LFS_POINTER = b"version https://git-lfs"
FLOATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}  # what weights may be: safetensors' names and torch's
AGAIN = "fetch or save the model again"


def locate(parent: str, revision: str | None = None, trusted: bool = False) -> Path:
    """The local folder of a parent: a path as it is, or an fsspec URL or hub id, fetched once into a cache on this machine.

    What lies in a finished artifact of a store is compared with its record. `trusted`: the code of a hub id is fetched, too.

    Raises ParentError where there is no such folder, or where the hub cannot be reached or does not know the id; Damaged where a file
    is not as the stage wrote it.
    """
    if "://" in parent:
        return _fetched(parent)
    try:
        folder = Path(parent).expanduser()
        if folder.is_dir():
            verified_folder(parent)
            if not (folder / "config.json").is_file():
                raise ParentError("parent", *why_no_config(folder, parent))
            return folder
        if folder.is_file():
            raise ParentError("parent", *why_no_folder(folder, parent))
    except (OSError, RuntimeError) as error:  # no permission, or no such user's home
        raise ParentError("parent", f"{parent!r} cannot be looked into ({first_line(error)})", "name a readable folder") from None
    parent, _, commit = parent.partition("@")
    revision = revision or commit or None
    if parent.startswith((".", "/", "~")) or parent.count("/") != 1:
        raise ParentError("parent", f"there is no folder {parent!r}", "name an existing folder, or a hub id such as org/model")
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", *(["*.py", "*.tiktoken"] if trusted else [])]
    try:
        return Path(snapshot_download(parent, revision=revision, allow_patterns=patterns))
    except (OSError, ValueError) as error:  # every hub and connection error derives from one of these
        problem = f"{parent!r} is no folder here and the hub did not give it ({first_line(error)})"
        raise ParentError("parent", problem) from None


def _fetched(url: str) -> Path:
    import fsspec

    try:
        filesystem, path = fsspec.core.url_to_fs(url)
    except Exception as error:  # some backends connect at once, and each has errors of its own
        raise ParentError(
            "parent", f"{url!r} cannot be opened ({first_line(error)})", "name a folder, an fsspec URL or a hub id"
        ) from None
    try:
        verified = verified_folder(url)
        if verified is not None:
            return verified
        if not filesystem.exists(f"{path}/config.json"):
            hub = _HUB_PAGE.fullmatch(url)
            remedy = f"write its hub id, {hub[1]}" if hub else "name a folder or URL that holds config.json"
            raise ParentError("parent", f"there is no model folder at {url!r}", remedy)
        listing = sorted(filesystem.find(path, detail=True).items())
        state = [(name, entry.get("size"), str(entry.get("ETag") or entry.get("mtime") or "")) for name, entry in listing]
        return local_copy(filesystem, path, hashlib.sha256(repr((url, state)).encode()).hexdigest()[:16])
    except (PuzzleError, MemoryError):
        raise
    except Exception as error:  # whatever the filesystem raises
        raise ParentError("parent", f"{url!r} cannot be read ({first_line(error)})", "check the address and the rights") from None


def first_line(error: BaseException) -> str:
    """An exception in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or ["no reason given"]
    text = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    return text if isinstance(error, OSError | ValueError | RuntimeError) else f"{type(error).__name__}: {text}"


def broken(path: Path, error: BaseException, remedy: str = AGAIN) -> ParentError:
    """The error for a file of the parent that a library could not read: which file, and what is wrong with it."""
    if isinstance(error, PermissionError):
        return ParentError("parent", f"{path} may not be read (permission denied)", "give this user the right to read it")
    try:
        if path.is_dir():
            return ParentError("parent", f"{path} is a folder where a file belongs", remedy)
        if not path.exists():
            return ParentError("parent", f"{path} is not there", remedy)
        with path.open("rb") as file:
            if file.read(len(_LFS_POINTER)) == _LFS_POINTER:
                return ParentError("parent", f"{path} is a Git LFS pointer, not the file itself", "fetch it: git lfs pull")
    except OSError as second:
        error = second
    return ParentError("parent", f"{path} cannot be read ({first_line(error)})", remedy)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file of the parent. Raises ParentError."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise broken(path, error, "mend it or fetch it again") from None
    if not isinstance(found, dict):
        raise ParentError("parent", f"{path} holds no JSON object but a {type(found).__name__}", "fetch it again")
    return found


def fingerprint(folder: Path) -> str:
    """A hash of the checkpoint's files. Of a file over 64 MiB it reads the size and 32 evenly spaced MiB."""
    digest = hashlib.sha256()
    path = folder
    try:
        for path in sorted(
            p for p in folder.iterdir() if (p.suffix in _IDENTIFYING or p.name in _TOKENIZER_TEXTS) and p.is_file()
        ):
            size = path.stat().st_size
            digest.update(f"{path.name}:{size}:".encode())
            with path.open("rb") as file:
                if size <= _WHOLE_FILE_BYTES:
                    digest.update(file.read())
                    continue
                for sample in range(_SAMPLES):
                    file.seek((size - _SAMPLE_BYTES) * sample // (_SAMPLES - 1))
                    digest.update(file.read(_SAMPLE_BYTES))
    except OSError as error:
        raise broken(path, error) from None
    return digest.hexdigest()


class Checkpoint:
    """Tensors of one folder by name, read one at a time: nothing holds the whole checkpoint.

    Names are the model's. A file that was saved from the model without its head (GPT-2 as published: `h.0.ln_1.weight`) leaves out
    their first part; such names are found, too.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def present(self) -> bool:
        """Whether the folder has weights at all."""
        return any((self.folder / name).exists() for name in ("model.safetensors", "model.safetensors.index.json"))

    @cached_property
    def index(self) -> dict[str, Path]:
        """Stored tensor name -> file, as the index of a sharded checkpoint says; empty where one file holds all.

        Like transformers, a folder that has both `model.safetensors` and an index is read from the former.
        """
        path = self.folder / "model.safetensors.index.json"
        if (self.folder / "model.safetensors").exists() or not path.exists():
            return {}
        weight_map = read_json(path).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
            raise ParentError("parent", f"{path} has no weight_map of names to files", AGAIN)
        return {name: self.folder / file for name, file in weight_map.items()}

    @cached_property
    def files(self) -> dict[str, Path]:
        """Stored tensor name -> the safetensors file it lives in."""
        if self.index:
            return self.index
        single = self.folder / "model.safetensors"
        if not single.exists():
            raise ParentError("parent", *why_no_weights(self.folder))
        with _opened(single) as opened:
            return dict.fromkeys(opened.keys(), single)

    @cached_property
    def headers(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Stored tensor name -> (dtype, shape), from the headers of all files. Raises ParentError where an index says otherwise."""
        found: dict[str, tuple[str, tuple[int, ...]]] = {}
        for path in sorted(set(self.files.values())):
            listed = {name for name, file in self.files.items() if file == path}
            with _opened(path) as opened:
                held = set(opened.keys())
                if held != listed:
                    name = min(held ^ listed)
                    verb = "lists" if name in listed else "does not list"
                    problem = f"model.safetensors.index.json {verb} {name!r} in {path.name}, the file says otherwise"
                    raise ParentError("parent", f"{self.folder}: {problem}", AGAIN)
                for name in sorted(held):
                    part = opened.get_slice(name)
                    found[name] = part.get_dtype(), tuple(part.get_shape())
        return found

    def stored_name(self, name: str) -> str | None:
        """What the file calls one of the model's weights; None where it has no such weight."""
        short = name.partition(".")[2]
        return next((n for n in (name, short) if n in self.files and "." in n), None)

    def __contains__(self, name: str) -> bool:
        return self.stored_name(name) is not None

    def read(self, names: Iterable[str], rows: Mapping[str, slice] | None = None) -> Iterator[tuple[str, Tensor]]:
        """The named tensors, file by file; of those in `rows` these rows alone.

        Raises ParentError for a name the checkpoint lacks, and for weights that are no floats or no finite ones.
        """
        part = rows or {}
        by_file: dict[Path, list[tuple[str, str]]] = {}
        for name in names:
            stored = self.stored_name(name)
            if stored is None:
                raise ParentError("parent", f"{self.folder} has no tensor {name!r}", AGAIN)
            by_file.setdefault(self.files[stored], []).append((name, stored))
        for path, wanted in by_file.items():
            with _opened(path) as opened:
                for name, stored in wanted:
                    try:
                        found = opened.get_slice(stored)
                        dtype, value = found.get_dtype(), found[part[name]] if name in part else opened.get_tensor(stored)
                    except Exception as error:  # whatever the library raises
                        raise broken(path, error) from None
                    if dtype not in FLOATS:
                        raise not_floats(path, [f"{name} is {dtype}"])
                    if value.numel() and not all(map(math.isfinite, map(float, value.aminmax()))):
                        raise ParentError("parent", f"{path}: {name} holds NaN or infinite numbers", AGAIN)
                    yield name, value

    def same(self, one: str, other: str) -> bool:
        """Whether two matrices are equal, number by number. Reads a few thousand rows at a time, up to the first difference."""
        with (
            _opened(self.files[str(self.stored_name(one))]) as first,
            _opened(self.files[str(self.stored_name(other))]) as second,
        ):
            parts = first.get_slice(str(self.stored_name(one))), second.get_slice(str(self.stored_name(other)))
            if parts[0].get_shape() != parts[1].get_shape():
                return False
            starts = range(0, parts[0].get_shape()[0], _COMPARED_ROWS)
            return all(bool((parts[0][i : i + _COMPARED_ROWS] == parts[1][i : i + _COMPARED_ROWS]).all()) for i in starts)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A safetensors file. Raises ParentError for one that is none."""
    from safetensors import safe_open

    try:
        file = safe_open(path, framework="pt")
    except Exception as error:  # whatever the library raises
        raise broken(path, error) from None
    with file as opened:
        yield opened


def some(names: Iterable[str]) -> str:
    """At most three names, and how many there are."""
    listed = sorted(names)
    return ", ".join(listed[:3]) + (f" and {len(listed) - 3} more" if len(listed) > 3 else "")


def not_floats(where: Path, names: Iterable[str]) -> ParentError:
    """The error for quantized weights, and others that are no plain floats."""
    remedy = f"give a checkpoint whose weights are {', '.join(FLOATS.values())}"
    return ParentError("parent", f"{where} holds weights of another dtype: {some(names)}", remedy)


def check_floats(checkpoint: Checkpoint, ignored: Sequence[str] = ()) -> None:
    """Raises ParentError for quantized weights and the like. `ignored`: patterns of names that nobody reads."""
    found = [f"{name} is {dtype}" for name, (dtype, _) in checkpoint.headers.items() if dtype not in FLOATS]
    if found := [words for words in found if not is_ignored(words.split()[0], ignored)]:
        raise not_floats(checkpoint.folder, found)


def is_ignored(name: str, patterns: Iterable[str]) -> bool:
    return any(re.search(pattern, name) for pattern in patterns)


def check_names(where: Path, missing: Iterable[str], unexpected: Iterable[str]) -> None:
    """Raises ParentError for weights that the model of config.json has and the files lack, or the other way round."""
    remedy = "take config.json and weights from the same model, saved whole"
    if missing := list(missing):
        raise ParentError("parent", f"{where} lacks weights that its config.json asks for: {some(missing)}", remedy)
    if unexpected := list(unexpected):
        problem = f"{where} holds weights that the model of its config.json does not have: {some(unexpected)}"
        raise ParentError("parent", problem, remedy)


def as_stored(config: Any, checkpoint: Checkpoint) -> Any:
    """The config with `tie_word_embeddings` as `tied` has it; a copy where that changes it."""
    decided = tied(config, checkpoint)
    if decided == bool(getattr(config, "tie_word_embeddings", False)):
        return config
    config = copy.deepcopy(config)
    config.tie_word_embeddings = decided
    return config


def tied(config: Any, checkpoint: Checkpoint) -> bool:
    """Whether head and embedding are one matrix. Every reader asks here; the answer is transformers' own.

    It is what `tie_word_embeddings` says, unless the file holds both matrices and they differ: then each is what the file says.
    Raises ParentError for a config that says untied and a file without a head, which transformers would draw at random.
    """
    import transformers

    from puzzle_ray.families.registry import descriptor_of, families

    said = bool(getattr(config, "tie_word_embeddings", False))
    names = getattr(getattr(transformers, descriptor_of(config).model_class), "_tied_weights_keys", None) or {}
    head, embedding = next(iter(names.items()), ("", ""))
    if embedding not in checkpoint:  # laid out in another way; `check_weights` says how
        return said
    if head not in checkpoint:
        if said or descriptor_of(config).model_type not in families():  # of others the names are checked later
            return said
        problem = f"{checkpoint.folder} has no {head}, and its config.json says tie_word_embeddings=false"
        remedy = "write true if the embedding is the head, or save the model with its head"
        raise ParentError("parent", problem, remedy)
    return said and checkpoint.same(head, embedding)
