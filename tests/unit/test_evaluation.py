"""Evaluation reads one model at a time, in its own dtype, and says what whole logits say."""

import gc
import math
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from byte_tokenizer import VOCAB_SIZE, byte_tokenizer
from small_models import save_parent

from jobs import evaluate_child
from puzzle_ray.artifacts import Scenario
from puzzle_ray.errors import ConfigError
from puzzle_ray.evaluation import evaluate as evaluation
from puzzle_ray.evaluation.comparison import Comparison
from puzzle_ray.evaluation.evaluate import Models, check_prompt, evaluate, greedy_sample, predictions
from puzzle_ray.evaluation.settings import EvaluateConfig
from puzzle_ray.models.checkpoint import Checkpoint
from puzzle_ray.models.child import load_model, read_config
from puzzle_ray.progress import Quiet
from puzzle_ray.scoring.metrics import PredictionMetrics, compare_predictions, mean

BATCHES = [torch.randint(0, 96, (3, 16), generator=torch.Generator().manual_seed(n)) for n in range(2)]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Three models of the same family; the parent is in bfloat16."""
    root = tmp_path_factory.mktemp("models")
    found = {}
    for seed, name in enumerate(("parent", "child_before_gkd", "child")):
        folder = save_parent(root / name, seed=seed, vocab_size=VOCAB_SIZE + 7)
        if name == "parent":
            load_model(folder, torch.bfloat16).save_pretrained(folder)
        byte_tokenizer().save_pretrained(folder)
        found[name] = str(folder)
    return found


@pytest.mark.parametrize("dtype", [None, torch.float32], ids=str)
def test_predictions_are_those_of_whole_logits(folders, dtype):
    found = predictions(Models(folders, [CPU], dtype), BATCHES)
    models = {name: load_model(folder, dtype) for name, folder in folders.items()}
    with torch.no_grad():
        parts = {name: [] for name in models}
        for ids in BATCHES:
            reference = torch.log_softmax(models["parent"](ids).logits.float(), -1)
            for name, model in models.items():
                logits = reference if name == "parent" else model(ids).logits
                parts[name].append(compare_predictions(reference, logits, ids))
    for name, own in parts.items():
        joined = PredictionMetrics.joined(own)
        assert found[name]["kl"] == mean(joined.kl) and found[name]["heldout_loss"] == mean(joined.lm_loss)
        assert found[name]["top1_agreement"] == mean(joined.top1_agreement) and found[name]["heldout_tokens"] == 96
    assert list(found) == list(folders)


class Watched(Models):
    """Models that tell how many of them are alive."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.alive, self.most, self.dtypes = weakref.WeakSet(), 0, []

    def __getitem__(self, name):
        gc.collect()
        model = super().__getitem__(name)
        self.alive.add(model)
        self.most = max(self.most, len(self.alive))
        self.dtypes.append(model.dtype)
        return model


def test_one_model_is_in_memory_at_a_time_in_its_own_dtype(folders):
    models = Watched(folders, [CPU])
    predictions(models, BATCHES)
    assert models.most == 1 and models.dtypes == [torch.bfloat16, torch.float32, torch.float32]


def test_a_sample_is_text_whatever_the_parents_generation_config_asks_for(tmp_path):
    model = load_model(save_parent(tmp_path, vocab_size=VOCAB_SIZE), torch.float32)
    plain = greedy_sample(model, byte_tokenizer(), "a text", 6)
    model.generation_config.update(return_dict_in_generate=True, output_scores=True, num_return_sequences=1)
    assert greedy_sample(model, byte_tokenizer(), "a text", 6) == plain


@pytest.mark.parametrize("room", [None, 1 << 40, 1])
def test_models_are_timed_together_where_they_fit_and_else_alone(folders, room, monkeypatch):
    monkeypatch.setattr(evaluation, "available_bytes", lambda device: room)
    groups = []
    inner = evaluation.measure_side_by_side
    monkeypatch.setattr(evaluation, "measure_side_by_side", lambda m, *a: (groups.append(list(m)), inner(m, *a))[1])
    config = EvaluateConfig(tokens=96, repeats=1, prompt="ab", sample_tokens=2)
    scenario = Scenario(batch_size=1, input_tokens=4, output_tokens=2)
    found = evaluate(folders, BATCHES, Comparison(config, scenario), Quiet())
    assert groups == ([["parent"], ["child"]] if room == 1 else [["parent", "child"]])
    assert found["timed"].startswith("one after" if room == 1 else "alternately")
    assert set(found["models"]) == set(found["samples"]) == set(folders)
    before, after = found["models"]["child_before_gkd"], found["models"]["child"]
    assert before["memory_mib"] == after["memory_mib"] > 0 and before["kl"] != after["kl"]
    assert found["models"]["parent"]["measured_speedup"] == 1 and after["num_params"] == found["models"]["parent"]["num_params"]


@pytest.mark.parametrize(("of_profile", "timer"), [("puzzle", "puzzle"), ("torch", "torch"), ("roofline", "torch")])
def test_the_profiles_engine_times_models_where_it_is_the_servers(folders, of_profile, timer):
    scenario, config = Scenario(2, 4, 3), EvaluateConfig(tokens=96, repeats=1, prompt="ab", sample_tokens=2)
    found = evaluate(folders, BATCHES, Comparison(config, scenario, engine=of_profile), Quiet())
    assert found["measured_by"].startswith(f"{timer} on ") and found["measured_speedup"] > 0


@pytest.mark.parametrize(("less", "together"), [(0, True), (1, False)])
def test_models_whose_cache_has_no_room_beside_both_are_timed_alone(folders, less, together, monkeypatch):
    """As with a batch size that was chosen to fill the memory behind one of them."""
    two = {name: folders[name] for name in ("parent", "child")}
    config, scenario = read_config(Path(two["parent"])), Scenario(batch_size=64, input_tokens=30, output_tokens=10)
    cache = 64 * scenario.longest_tokens * config.num_hidden_layers * 2 * config.num_key_value_heads * config.head_dim * 4
    weights = sum(4 * math.prod(shape) for folder in two.values() for _, shape in Checkpoint(Path(folder)).headers.values())
    monkeypatch.setattr(evaluation, "available_bytes", lambda device: 1.25 * weights + cache - less)
    scenarios = {"parent": scenario, "child": replace(scenario, batch_size=8)}
    assert evaluation._fit_together(Models(two, [CPU], torch.float32), scenarios) == together


def test_a_prompt_that_passes_the_check_can_be_continued_and_no_longer_one(tmp_path):
    tokenizer, positions = byte_tokenizer(), 12
    folder = save_parent(tmp_path, "gpt2", vocab_size=VOCAB_SIZE, max_position_embeddings=positions, n_positions=positions)
    model = load_model(folder, torch.float32)
    model.generation_config.eos_token_id = None
    longest = EvaluateConfig(prompt="a text", sample_tokens=positions - 7 + 1)
    check_prompt(longest, tokenizer, positions)
    assert greedy_sample(model, tokenizer, longest.prompt, longest.sample_tokens).startswith("a text")
    with pytest.raises(ConfigError, match="sample_tokens: 7 tokens behind the 7 of evaluate.prompt do not fit the parent's 12"):
        check_prompt(EvaluateConfig(prompt="a text", sample_tokens=positions - 7 + 2), tokenizer, positions)
    with pytest.raises(
        ConfigError, match="evaluate.prompt: it has .*, and the parent's embedding of 60 rows none for that token"
    ):
        check_prompt(EvaluateConfig(prompt="a text"), tokenizer, None, vocab_size=60)
    check_prompt(EvaluateConfig(prompt="", sample_tokens=4), tokenizer, None)
    assert isinstance(greedy_sample(model, tokenizer, "", 4), str)
    tokenizer.bos_token = None
    with pytest.raises(ConfigError, match="evaluate.prompt: '' has no token, and the parent's tokenizer has none that begins"):
        check_prompt(EvaluateConfig(prompt=""), tokenizer, None)


def test_batches_have_so_many_tokens_and_at_least_one_sequence():
    config = EvaluateConfig(micro_batch_tokens=2048)
    assert [config.sequences(length) for length in (256, 1000, 2048, 8192)] == [8, 2, 1, 1]


@pytest.mark.parametrize(("value", "written"), [(-3e-9, "0.0000"), (-0.01, "-0.0100"), (0.25, "0.2500"), (None, "-")])
def test_what_is_rounded_to_nothing_has_no_sign(value, written):
    assert evaluate_child._written(value, "{:.4f}") == written
