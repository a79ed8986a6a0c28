"""Settings: recipe, file and overrides on top of each other; what is wrong is said with its place, value and remedy."""

import pytest

from puzzle_ray.config import load, recipes
from puzzle_ray.errors import ConfigError, DataError


def test_every_recipe_loads():
    assert {load(name).parent for name in recipes()}
    assert "tiny" in recipes()


def test_overrides_win_over_the_file_and_the_file_over_the_recipe(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("seed: 5\nlibrary: {tokens: 4096}\n")
    config = load("tiny", str(file), ("seed=7", "search.limits.memory_mib=10.5", "data.train='a.txt'"))
    assert (config.seed, config.library.tokens, config.search.limits.memory_mib, config.data.train) == (7, 4096, 10.5, "a.txt")
    assert config.library.learning_rate == load("tiny").library.learning_rate


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("librari.tokens=1", "did you mean 'library'"),
        ("library.tokns=1", "did you mean 'tokens'"),
        ("library.early_stop.windw=1", "did you mean 'window'"),
        ("library.tokens=0", "library.tokens: .* greater than or equal to 1 .given: 0"),
        ("library.tokens=many", "given: 'many'"),
        ("library.micro_batch_tokens=1000", "1000 is no multiple of data.sequence_length=256"),
        ("search.limits={}", "no limit is given"),
        ("profile.scenario.batch=3", "profile.scenario"),
        ("gkd={kl_weight: 0, cosine_weight: 0}", "all loss weights are 0"),
        ("cluster.gpus_per_shard=0.4", "whole part of one GPU; write 0, 1, 0.5"),
        ("cluster.gpus_per_trainer=2", "less than or equal to 1"),
        ("seed", "is no assignment"),
        ("library.tokens=yes", "library.tokens: write a number .given: True"),
        ("search.limits.speedup=on", "search.limits.speedup: write a number"),
        ("search.sweep={speedup: [true]}", "search.sweep: write a number"),
        ("search.limits.speedup=.inf", "search.limits.speedup: Input should be a finite number"),
        ("search.limits={at_least: 3, params: 5}", "search.limits.at_least: Input should be a valid dictionary"),
        ("library.window=0", "^library.window: Input should be greater than or equal to 1 or 'auto' .given: 0.$"),
        ("profile.batch_sizes=4", r"^profile.batch_sizes: Input should be a list: write \[4\] or 'auto'"),
        ("space.attention=parent", r"^space.attention: Input should be a list: write \[parent\] .given: 'parent'.$"),
        ("data.train=5", "^data.train: "),
        ("store=''", "^store: .* at least 1 character"),
        ("parent=''", "^parent: .* at least 1 character"),
    ],
)
def test_wrong_settings_are_explained(override, words):
    with pytest.raises(ConfigError, match=words):
        load(None, None, (override,))


def test_counts_may_be_written_with_an_exponent():
    assert load(None, None, ("evaluate.retrieval_tokens=[1e3]",)).evaluate.retrieval_tokens == (1000,)
    config = load(None, None, ("library.tokens=1e6", "gkd.tokens=2.5E3", "gkd.learning_rate=1e-4", "revision='1e10'"))
    assert (config.library.tokens, config.gkd.tokens, config.gkd.learning_rate, config.revision) == (10**6, 2500, 1e-4, "1e10")
    with pytest.raises(ConfigError, match="library.tokens: .*unable to parse"):
        load(None, None, ("library.tokens=1.5e0",))


def test_a_section_of_comments_alone_is_no_section(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("library:\n  # tokens: 5\nsearch:\n  limits:\n    speedup: 2\n")
    assert load(None, str(file)).library == load().library and load("tiny", str(file)).library == load("tiny").library


def test_a_micro_batch_that_stages_do_not_read_is_not_asked_for():
    longer = ("data.sequence_length=4096", "library.micro_batch_tokens=4096", "scoring.micro_batch_tokens=4096")
    stages = "gkd.stages=[{sequence_length: 4096, tokens: 8192, micro_batch_tokens: 4096}]"
    assert load(None, None, (*longer, stages)).gkd.largest_micro_batch == 4096
    reads_it = "search={candidates: 2, distil_tokens: 8192}"
    for more in ((), (stages, reads_it)):
        with pytest.raises(ConfigError, match="gkd.micro_batch_tokens=2048 is no multiple of data.sequence_length=4096"):
            load(None, None, (*longer, *more))


def test_missing_file_and_recipe():
    with pytest.raises(ConfigError, match="no file"):
        load(None, "nowhere.yaml")
    with pytest.raises(ConfigError, match="did you mean 'tiny'"):
        load("tinny")


def test_a_file_that_is_not_a_mapping(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("- 1\n")
    with pytest.raises(ConfigError, match="holds a list"):
        load(None, str(file))


def test_in_a_notebook_a_path_is_as_good_as_its_text(tmp_path):
    import puzzle_ray

    with pytest.raises(DataError, match=f"no .txt, .jsonl or .parquet file at '{tmp_path / 'a.txt'}'"):
        puzzle_ray.compress(tmp_path, tmp_path / "a.txt", store=tmp_path / "store", settings={"data.heldout": tmp_path / "b.txt"})
    with pytest.raises(ConfigError, match=r"^gkd.tokens: \{1\} is a set; give text, a path, a number"):
        puzzle_ray.compress(settings={"gkd.tokens": {1}})


def test_a_gpu_that_only_the_last_stage_asks_for_is_missed_before_the_first(tmp_path, monkeypatch):
    import puzzle_ray

    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ConfigError, match="gkd.use_gpu: a GPU is asked for, but PyTorch sees none here"):
        puzzle_ray.compress(store=tmp_path / "store", settings={"gkd.use_gpu": True, "search.limits.speedup": 1.5})

    def as_noted(config, store):
        return config.model_copy(update={"hardware": None, "gkd": config.gkd.model_copy(update={"use_gpu": True})})

    monkeypatch.setattr("puzzle_ray.pipeline.for_this_machine", as_noted)
    with pytest.raises(ConfigError, match="gkd.use_gpu: a GPU is asked for"):
        puzzle_ray.compress(store=tmp_path / "store", settings={"hardware": "auto", "search.limits.speedup": 1.5})
    assert not (tmp_path / "store").exists()
