"""Hugging Face checkpoints: finds one, identifies its content, and reads single tensors straight from safetensors."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from puzzle_ray.errors import ParentError

if TYPE_CHECKING:
    from torch import Tensor

_WHOLE_FILE_BYTES = 64 << 20
_SAMPLE_BYTES = 1 << 20
_SAMPLES = 32


def locate(parent: str, revision: str | None = None) -> Path:
    """The local folder of a parent: a path as it is, or an fsspec URL or hub id, fetched once into a cache on this machine.

    Raises ParentError where there is no such folder, or where the hub cannot be reached or does not know the id.
    """
    if "://" in parent:
        return _fetched(parent)
    folder = Path(parent).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ParentError("parent", f"{parent!r} has no config.json", "name a Hugging Face model folder")
        return folder
    parent, _, commit = parent.partition("@")
    revision = revision or commit or None
    if parent.startswith((".", "/", "~")) or parent.count("/") != 1:
        raise ParentError("parent", f"there is no folder {parent!r}", "name an existing folder, or a hub id such as org/model")
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
    try:
        return Path(snapshot_download(parent, revision=revision, allow_patterns=patterns))
    except (OSError, ValueError) as error:  # every hub and connection error derives from one of these
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ParentError("parent", f"{parent!r} is no folder here and the hub did not give it ({reason})") from None


def _fetched(url: str) -> Path:
    import fsspec

    from puzzle_ray.store import local_copy

    try:
        filesystem, path = fsspec.core.url_to_fs(url)
    except (ValueError, ImportError) as error:
        raise ParentError("parent", f"{url!r} cannot be opened ({error})", "name a folder, an fsspec URL or a hub id") from None
    if not filesystem.exists(f"{path}/config.json"):
        raise ParentError("parent", f"there is no model folder at {url!r}", "name a folder or URL that holds config.json")
    listing = filesystem.find(path, detail=True)
    state = [
        (name, entry.get("size"), str(entry.get("ETag") or entry.get("mtime") or "")) for name, entry in sorted(listing.items())
    ]
    return local_copy(filesystem, path, hashlib.sha256(repr((url, state)).encode()).hexdigest()[:16])


def fingerprint(folder: Path) -> str:
    """A hash of the checkpoint's files. Of a file over 64 MiB it reads the size and 32 evenly spaced MiB."""
    digest = hashlib.sha256()
    names = sorted(p for p in folder.iterdir() if p.suffix in {".json", ".safetensors", ".model"} and p.is_file())
    for path in names:
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}:".encode())
        with path.open("rb") as file:
            if size <= _WHOLE_FILE_BYTES:
                digest.update(file.read())
                continue
            for sample in range(_SAMPLES):
                file.seek((size - _SAMPLE_BYTES) * sample // (_SAMPLES - 1))
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()


class Checkpoint:
    """The tensors of one folder by name. They are read one at a time, so that memory never has the whole checkpoint."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @cached_property
    def files(self) -> dict[str, Path]:
        """Tensor name -> the safetensors file that has it. Raises ParentError where the folder has none."""
        from safetensors import safe_open

        index = self.folder / "model.safetensors.index.json"
        if index.is_file():
            weight_map: dict[str, str] = json.loads(index.read_text())["weight_map"]
            return {name: self.folder / file for name, file in weight_map.items()}
        single = self.folder / "model.safetensors"
        if not single.is_file():
            raise ParentError("parent", f"{self.folder} has no model.safetensors", "save it with safe_serialization")
        with safe_open(single, framework="pt") as opened:
            return {name: single for name in opened.keys()}  # noqa: SIM118  (not a dict)

    def __contains__(self, name: str) -> bool:
        return name in self.files

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """The named tensors, file by file. Raises ParentError for a name that the checkpoint lacks."""
        from safetensors import safe_open

        by_file: dict[Path, list[str]] = {}
        for name in names:
            if name not in self.files:
                raise ParentError("parent", f"{self.folder} has no tensor {name!r}")
            by_file.setdefault(self.files[name], []).append(name)
        for path, wanted in by_file.items():
            with safe_open(path, framework="pt") as opened:
                for name in wanted:
                    yield name, opened.get_tensor(name)
