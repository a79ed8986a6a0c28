"""Where a server finds its model, and whether the model is whole: known before a cluster is started."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import fsspec

from puzzle_ray.errors import ParentError
from puzzle_ray.models.checkpoint import first_line, locate
from puzzle_ray.serving.sampling_defaults import FILES, SamplingDefaults, sampling_defaults


def check_model(model: str) -> str:
    """The model's absolute path, or its URL. A URL is not fetched yet. Raises ParentError where there is no model."""
    if "://" not in model:
        folder = locate(model)
        return str(folder.absolute())
    filesystem, path = _open(model)
    try:
        has_config = filesystem.isfile(f"{path}/config.json")
    except Exception as error:  # every backend has errors of its own
        reason = f"{type(error).__name__}: {error}"
        raise ParentError("model", f"{model!r} cannot be read ({reason})", "check the URL and the credentials") from None
    if not has_config:
        raise ParentError("model", f"{model!r} has no config.json", "name a Hugging Face model folder")
    return model


def fetch_model(model: str) -> str:
    """A local folder with the model's files. What a URL names is kept on this machine, found again by its content. Raises ParentError."""
    if "://" in model:
        check_model(model)
    return str(locate(model))


def check_servable(folder: str, max_length: int) -> None:
    """What can be known without loading a model: config, length, kinds of layers, weights (whole, and those of the config), tokenizer.

    max_length: 0 is the model's own limit. Raises ParentError, ConfigError.
    """
    import torch

    from puzzle_ray.models.child import read_config
    from puzzle_ray.models.manifest import check_weights
    from puzzle_ray.models.tokenizer import check_tokenizer, read_tokenizer
    from puzzle_ray.serving.limits import check_length
    from puzzle_ray.serving.masks import AttentionMasks

    config = read_config(Path(folder))
    check_length(config, max_length or None)
    AttentionMasks(config, torch.float32)
    check_weights(Path(folder), config)
    check_tokenizer(read_tokenizer(Path(folder)), config)


def read_sampling_defaults(model: str) -> SamplingDefaults:
    """What a folder, or an fsspec URL, says of sampling. Raises ParentError, ConfigError."""
    for name in FILES:
        content = _content(model, name)
        if content is not None:
            file = f"{model.rstrip('/')}/{name}"
            try:
                said = json.loads(content)
            except (ValueError, RecursionError) as error:
                raise ParentError("model", f"{file} is no JSON ({first_line(error)})", "mend it or fetch it again") from None
            if not isinstance(said, dict):
                raise ParentError("model", f"{file} holds no JSON object but a {type(said).__name__}", "fetch it again")
            return sampling_defaults(said, file)
    return SamplingDefaults()


def _content(model: str, name: str) -> bytes | None:
    """The bytes of a file of the model's, None where there is none."""
    try:
        if "://" not in model:
            file = Path(model) / name
            return file.read_bytes() if file.is_file() else None
        filesystem, path = _open(model)
        return bytes(filesystem.cat_file(f"{path}/{name}")) if filesystem.isfile(f"{path}/{name}") else None
    except ParentError:
        raise
    except Exception as error:  # every backend has errors of its own
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise ParentError("model", f"{model}/{name} cannot be read ({reason})", "check the path and the credentials") from None


def _open(url: str) -> tuple[Any, str]:
    try:
        filesystem, path = fsspec.core.url_to_fs(url.rstrip("/"))
    except Exception as error:  # some backends connect at once, and each has errors of its own
        raise ParentError("model", f"{url!r} cannot be opened ({error})", "name a folder or an fsspec URL") from None
    return filesystem, path
