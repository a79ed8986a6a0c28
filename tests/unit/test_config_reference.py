"""The configuration reference: every setting stands in it as it is, and what it advises loads."""

from __future__ import annotations

import json
import re

import pytest
import yaml
from pydantic import BaseModel

from jobs.app import run
from puzzle_ray.config import RunConfig, load, recipes
from puzzle_ray.config_reference import AIMS, MEANINGS, reference, sections
from puzzle_ray.errors import ConfigError

REFERENCE = reference()
ROWS = {
    cells[0].strip("`"): cells for line in REFERENCE.splitlines() if (cells := re.split(r" (?<!\\)\| ", line.strip("| ")))[1:]
}


def leaves(values, prefix=""):
    """Dotted names of everything in nested settings."""
    for name, value in values.items():
        yield f"{prefix}{name}"
        if isinstance(value, BaseModel):
            yield from leaves({field: getattr(value, field) for field in type(value).model_fields}, f"{prefix}{name}.")


def test_every_setting_stands_in_the_reference_with_its_default():
    config = RunConfig()
    names = set(leaves({name: getattr(config, name) for name in RunConfig.model_fields}))
    names -= {name for name, field in RunConfig.model_fields.items() if isinstance(getattr(config, name), BaseModel)}
    listed = [setting for section in sections() for setting in section.settings]
    assert names <= {setting.name for setting in listed} and len(listed) == len({setting.name for setting in listed})
    for setting in listed:
        assert setting.name in ROWS, setting.name
    assert ROWS["library.micro_batch_tokens"][1] == f"`{config.library.micro_batch_tokens}`"
    assert ROWS["gkd.learning_rate"][2] == "number or `auto`" and ROWS["gkd.gradient_clip"][2] == "number above 0"
    assert ROWS["scoring.granularity"][2] == "`block`, `subblock`"
    assert ROWS["search.limits.speedup"][3].startswith("`speedup`: the child's predicted throughput")
    assert ROWS["library.early_stop.window"][3] == "optimizer steps"
    assert MEANINGS.keys() <= {setting.name for setting in listed}, "a setting that there is not is explained"


def test_every_setting_has_a_meaning_of_its_own_that_a_cell_holds():
    for setting in (setting for section in sections() for setting in section.settings):
        assert 0 < len(setting.meaning) <= 160, (setting.name, setting.meaning)
        assert "None" not in setting.meaning, (setting.name, "a file of settings says null")


def test_the_defaults_of_the_reference_are_those_that_a_run_has():
    seen = 0
    for setting in (setting for section in sections() for setting in section.settings):
        value, name = RunConfig(), setting.name
        for part in name.split("."):
            value = getattr(value, part, None)
        if value is None or isinstance(value, BaseModel) or name.startswith(("profile.scenario", "search.limits.")):
            continue  # sections have rows of their own; a limit is null where others are given
        assert json.loads(setting.default) == json.loads(json.dumps(value)), name
        seen += 1
    assert seen > 80


@pytest.mark.parametrize("aim", AIMS, ids=lambda aim: aim[0])
def test_what_is_advised_loads_and_changes_something(aim):
    plain = load(overrides=("gkd.tokens=99999",))
    assert load(overrides=("gkd.tokens=99999", *aim[1])) != plain


def test_the_command_shows_the_reference_and_the_settings_of_a_run(capsys):
    assert run(["config", "--markdown"]) == 0
    assert capsys.readouterr().out == REFERENCE
    assert run(["config", "--recipe", "tiny", "--set", "seed=3"]) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert RunConfig.model_validate(shown) == load("tiny", overrides=("seed=3",))
    assert run(["config", "--recipe", "tinny"]) == 2


def test_recipes_are_there_and_a_share_of_a_gpu_is_a_whole_part():
    assert set(recipes()) >= {"tiny", "llama31_8b"}
    with pytest.raises(ConfigError, match="gpus_per_shard"):
        load("llama31_8b", overrides=("cluster.gpus_per_shard=0.4",))


def test_a_printed_config_leaves_to_the_hardware_what_was_left_to_it(tmp_path):
    from typer.testing import CliRunner

    from jobs.app import application
    from puzzle_ray.planning.draft import DECIDED, is_set

    words = ["--recipe", "llama31_8b", "--set", "library.compute_dtype=float32"]
    shown = CliRunner().invoke(application(), ["config", *words])
    (tmp_path / "my.yaml").write_text(shown.stdout)
    asked, again = load("llama31_8b", None, ("library.compute_dtype=float32",)), load(None, str(tmp_path / "my.yaml"))
    assert again == asked
    assert [name for name in DECIDED if is_set(again, name)] == [name for name in DECIDED if is_set(asked, name)]
    assert is_set(again, "library.compute_dtype") and not is_set(again, "gkd.num_workers")
