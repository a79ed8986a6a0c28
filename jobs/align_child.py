"""Train a child by TRL, as any Hugging Face model is: supervised fine-tuning (sft) or preferences (dpo)."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Literal

import typer

from jobs.command import RESULTS, Debug, Verb
from puzzle_ray.errors import ConfigError

Method = Annotated[Literal["sft", "dpo"], typer.Argument(help="Which of TRL's scripts.")]
Options = Annotated[list[str], typer.Argument(help="Behind --: TRL's own options, such as --model_name_or_path CHILD.")]


def align(method: Method, options: Options, debug: Debug = False) -> None:
    """Train a child by TRL (extra `align`), as any Hugging Face model is: supervised fine-tuning (sft) or preferences (dpo).

    puzzle-ray align-child sft -- --model_name_or_path runs/gkd-KEY/child --dataset_name DATA --output_dir OUT
    """
    if find_spec("trl") is None:
        raise ConfigError("align-child", "TRL is not installed", "install the extra `align`")
    from puzzle_ray.models.child_classes import register_children

    named = dict(zip(options, options[1:], strict=False)).get("--model_name_or_path", "")
    register_children(Path(named) if named else None)  # transformers then knows the child's type
    script = import_module(f"trl.scripts.{method}")
    script.main(*script.make_parser().parse_args_and_config(args=options, fail_with_unknown_args=True))


VERB = Verb("align-child", RESULTS, align)

if __name__ == "__main__":
    from jobs.app import main

    main(VERB.name)
