"""Show the settings of a run, or with --markdown the reference of all settings. Does nothing."""

from __future__ import annotations

from typing import Annotated

import typer

from jobs.command import SEARCHES, Config, Data, Debug, ParentName, Recipe, Settings, StoreRoot, Verb, configured, loaded
from puzzle_ray.errors import ConfigError

Markdown = Annotated[bool, typer.Option("--markdown", help="The reference: every setting, its default, its values, its meaning.")]

Resolved = Annotated[bool, typer.Option("--resolved", help="With what hardware: auto decides, on the cluster that is there.")]
Cluster = Annotated[str | None, typer.Option(help='With --resolved: on this one instead, such as "8x8 H100-80GB".')]


def config(
    recipe: Recipe = None,
    config: Config = None,
    set_: Settings = None,
    parent: ParentName = None,
    data: Data = None,
    store: StoreRoot = None,
    markdown: Markdown = False,
    resolved: Resolved = False,
    cluster: Cluster = None,
    debug: Debug = False,
) -> None:
    """Show the settings of a run as YAML, or with --markdown the reference of all settings. Does nothing.

    What hardware: auto decides is left out. With --resolved it is there, for the hardware, and no cluster decides anything any more where
    the settings are read.
    """
    if markdown:
        from puzzle_ray.config_reference import reference

        print(reference(), end="")
        return
    import yaml

    if cluster is not None and not resolved:
        raise ConfigError("--cluster", "says for which hardware settings are resolved", "add --resolved")
    found = loaded(recipe, config, set_, parent, data, store)
    if resolved and found.hardware is not None:
        from jobs.hardware import resolved_on

        found = resolved_on(configured(recipe, config, set_, parent, data, store), cluster)
    shown = found.model_dump(mode="json")
    if found.hardware is not None:  # what is written down counts as set
        from puzzle_ray.planning.draft import DECIDED, is_set

        print("# left out: what the hardware decides; --resolved shows it")
        for section, _, key in (name.partition(".") for name in DECIDED if not is_set(found, name)):
            del shown[section][key]
    print(yaml.safe_dump(shown, sort_keys=False), end="")


VERB = Verb("config", SEARCHES, config)

if __name__ == "__main__":
    from jobs.app import main

    main(VERB.name)
