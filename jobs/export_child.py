"""Write a child in the format of other engines.

python -m jobs.export_child --child runs/gkd-KEY/child --format nemotron_nas --out DIR
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from jobs.command import RESULTS, Debug, Verb
from puzzle_ray.errors import ConfigError

_FORMATS = ("native", "nemotron_nas")


def export_child(
    child: Annotated[str, typer.Option(help="The child's folder: a path or an fsspec URL.")],
    out: Annotated[str, typer.Option(help="The folder to write, which must be empty or absent.")],
    format_: Annotated[
        str, typer.Option("--format", help="native (transformers, vLLM) or nemotron_nas (DeciLM: also TensorRT-LLM, llama.cpp).")
    ] = "nemotron_nas",
    engine: Annotated[
        list[str] | None,
        typer.Option(help="For nemotron_nas, by whose rules to check; may be repeated. vllm if not given."),
    ] = None,
    untie: Annotated[bool, typer.Option(help="For nemotron_nas, write the head though it is the embedding.")] = False,
    debug: Debug = False,
) -> None:
    """Write a child as a checkpoint that stock engines load; what one of them could not run is refused, with what to do instead."""
    from puzzle_ray.export.folders import export_to

    if "://" in out:
        raise ConfigError("out", f"{out!r} is a URL", "name a folder of this machine, and copy it from there")
    if format_ not in _FORMATS:
        raise ConfigError("format", f"is {format_!r}", f"give one of {', '.join(_FORMATS)}")
    if format_ == "native" and (untie or engine):
        raise ConfigError("format", "native has no --engine and no --untie", "leave them out")
    for line in export_to(child, Path(out), format_, tuple(engine or ("vllm",)), untie):
        typer.echo(line)


VERB = Verb("export-child", RESULTS, export_child)

if __name__ == "__main__":
    from jobs.app import main

    main(VERB.name)
