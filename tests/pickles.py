"""Which files of a folder are pickles, or archives of them as torch.save writes."""

import pickletools
from pathlib import Path


def pickles_in(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and _is_pickle(path.read_bytes())]


def _is_pickle(data: bytes) -> bool:
    if data[:4] == b"PK\3\4":
        return True
    if data[:1] != b"\x80":  # what every protocol since 2 begins with; so may a safetensors file
        return False
    try:
        return bool(list(pickletools.genops(data)))
    except Exception:  # no pickle
        return False
