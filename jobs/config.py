"""Show the settings of a run, or with --markdown the reference of all settings. Does nothing."""

from __future__ import annotations

from typing import Annotated

import typer

from jobs.command import SEARCHES, Config, Data, Debug, ParentName, Recipe, Settings, StoreRoot, Verb, loaded

Markdown = Annotated[bool, typer.Option("--markdown", help="The reference: every setting, its default, its values, its meaning.")]


def config(
    recipe: Recipe = None,
    config: Config = None,
    set_: Settings = None,
    parent: ParentName = None,
    data: Data = None,
    store: StoreRoot = None,
    markdown: Markdown = False,
    debug: Debug = False,
) -> None:
    """Show the settings of a run as YAML, or with --markdown the reference of all settings. Does nothing."""
    if markdown:
        from puzzle_ray.config_reference import reference

        print(reference(), end="")
        return
    import yaml

    found = loaded(recipe, config, set_, parent, data, store)
    print(yaml.safe_dump(found.model_dump(mode="json"), sort_keys=False), end="")


VERB = Verb("config", SEARCHES, config)

if __name__ == "__main__":
    from jobs.app import main

    main(VERB.name)
