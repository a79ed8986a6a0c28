"""Engine `puzzle`: what it times is the server at work, and what HTTP adds counts for parent and child alike."""

import itertools

import pytest
import torch
from small_models import tiny_config

from puzzle_ray.artifacts import LayerChoice, Scenario
from puzzle_ray.errors import ConfigError, ProfileError
from puzzle_ray.models.child import choices_of, new_child
from puzzle_ray.profiling import measure
from puzzle_ray.profiling.engine import find_engine
from puzzle_ray.profiling.engines.puzzle_engine import PuzzleEngine, among_parents, word_tokenizer
from puzzle_ray.profiling.measure import Measurement, check_shapes, measure_task, profile_of, profile_serially, profile_tasks
from puzzle_ray.profiling.settings import ProfileConfig
from puzzle_ray.progress import Quiet
from puzzle_ray.search.tables import predicted_costs
from puzzle_ray.serving.engine import Engine
from puzzle_ray.store import Store
from puzzle_ray.variants.space import search_space

SCENARIO = Scenario(3, 6, 4)
CONFIG = ProfileConfig(engine="puzzle", scenario=SCENARIO, repeats=2, stack=1)


def child(*choices):
    return new_child(tiny_config(), list(choices), torch.float32).eval()


@pytest.mark.parametrize("first", [LayerChoice(), LayerChoice("noop", "noop"), LayerChoice("linear", "ffn:24")])
def test_the_server_computes_every_token_of_the_batch(first):
    model, seen, clock = child(first, LayerChoice(), LayerChoice("gqa:1")), [], itertools.count()
    handle = model.register_forward_hook(
        lambda module, args, kwargs, out: seen.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    prefill_ms, decode_ms = PuzzleEngine(lambda: float(next(clock))).time_once(model, SCENARIO)
    handle.remove()
    served = seen[2:]  # behind the trial of a new engine
    assert sum(shape.numel() for shape in served if shape[1] > 1) == 3 * 6
    assert sum(shape.numel() for shape in served if shape[1] == 1) == 3 * 3
    # The clock is asked at the start, once by every stream, and at the end: so all of a batch's time is in one of the two.
    assert prefill_ms == 3000.0 and prefill_ms + 3 * decode_ms == pytest.approx(4000.0)


def test_answers_of_one_token_need_no_decode_step():
    prefill_ms, decode_ms = find_engine("puzzle").time_once(child(*[LayerChoice()] * 3), Scenario(2, 6, 1))
    assert prefill_ms > 0 and decode_ms == 0


def test_its_tokenizer_has_a_text_for_every_token():
    tokenizer = word_tokenizer(96)
    assert len(tokenizer) == 96 and tokenizer.decode([0, 95]) == "w0 w95"


def test_every_stack_has_layers_of_the_parents_own_and_costs_are_those_of_the_rest():
    """On a machine where costs add up, they are found whatever stands among them."""
    choice, own = LayerChoice("noop", "linear"), LayerChoice()
    for depth, base in ((1, 0), (2, 1), (4, 2), (8, 2), (3, 3)):
        layers = among_parents(choice, depth, base)
        assert layers[0] == choice and layers.count(own) == base and len(layers) == depth + base
    costs = {own: 7.0, choice: 1.5, LayerChoice("noop", "noop"): 1.0, LayerChoice("noop"): 3.0}

    class Additive(PuzzleEngine):
        name = "additive"

        def time_once(self, model, scenario):
            cost = 20.0 + sum(costs[each] for each in choices_of(model.config))
            return cost, 2 * cost

    additive = Additive()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "engine_of", lambda config: additive)
        space = search_space(tiny_config(), ("noop",), ("linear", "noop"), 8)
        (task,) = profile_tasks(space, CONFIG)
        measured = measure_task(task, tiny_config(), CONFIG)
    assert measured.base_layers == 2
    profile = profile_of([measured], CONFIG)
    for choices in ((own,) * 3, (own, choice, LayerChoice("noop", "noop")), (choice,) * 3):
        assert predicted_costs(space, profile, SCENARIO, choices).prefill_ms == pytest.approx(
            20.0 + sum(costs[each] for each in choices)
        )


def test_what_a_request_costs_besides_is_a_constant_of_every_prediction(tmp_path):
    config = tiny_config()
    space = search_space(config, ("gqa:1", "noop"), ("noop",), 8)
    artifact = Store(str(tmp_path)).artifact("profile", {}, {})
    profile = profile_serially(config, space, CONFIG, artifact, Quiet())
    assert profile.engine == "puzzle" and "puzzle_ray" in profile.engine_version
    more = CONFIG.model_copy(update={"request_ms": 5.0})
    costly = profile_of([Measurement.from_json(artifact.read(task.name)) for task in profile_tasks(space, CONFIG)], more)
    assert [row for row in costly.rows if row.subblock != "fixed"] == [row for row in profile.rows if row.subblock != "fixed"]
    for choices in ((LayerChoice(),) * 3, (LayerChoice("noop", "noop"),) * 3):
        before, after = (predicted_costs(space, each, SCENARIO, choices) for each in (profile, costly))
        assert after.runtime_ms == pytest.approx(before.runtime_ms + 3 * 5.0) and after.decode_ms == before.decode_ms
    assert "request_ms" not in CONFIG.identity() and more.identity()["request_ms"] == 5.0


def test_what_the_server_refuses_is_refused_before_anything_runs(monkeypatch):
    config = tiny_config()
    space = search_space(config, (), (), 8)
    check_shapes(space, config, CONFIG)
    local = tiny_config("gpt_neo", attention_types=[[["global", "local"], 1], [["global"], 1]])
    with pytest.raises(ConfigError, match="puzzle cannot serve this parent.*layers of type local.*use engine torch"):
        check_shapes(search_space(local, (), (), 8), local, CONFIG)
    monkeypatch.setattr(Engine, "make_room", lambda *_: False)
    with pytest.raises(ProfileError, match="does not hold 3 requests of 10 tokens.*lower the batch size"):
        find_engine("puzzle").time_once(child(*[LayerChoice()] * 3), SCENARIO)
