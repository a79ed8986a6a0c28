"""Long prompts in pieces, beginnings shared, rows within a budget: none of it changes a token."""

import pytest
import torch
from byte_tokenizer import VOCAB_SIZE
from serving_models import (
    ENDLESS,
    GREEDY,
    TOKENIZER,
    WAIT_S,
    gated,
    generated,
    longrope_model,
    random_weights,
    some_prompts,
    tiny_model,
)
from small_models import tiny_config

from puzzle_ray.artifacts import LayerChoice
from puzzle_ray.errors import ConfigError
from puzzle_ray.models.child import new_child
from puzzle_ray.serving.engine import Engine
from puzzle_ray.serving.sampling import SamplingParams

LONG = [(7 * i * i + 3 * i) % 250 + 1 for i in range(100)]


@pytest.mark.parametrize("kind", ["llama", "child", "gpt2", "mistral", "gemma3_text", "windowed"])
def test_prompts_read_in_pieces_give_the_same_tokens(kind):
    if kind == "windowed":
        choices = [LayerChoice("window:6", "parent"), LayerChoice("noop", "parent"), LayerChoice("parent", "ffn:24")]
        model = random_weights(new_child(tiny_config(vocab_size=VOCAB_SIZE, eos_token_id=0), choices, torch.float32))
    else:
        model = tiny_model(kind)
    prompts = [LONG, *some_prompts(5), LONG[:70]]
    with Engine(model, TOKENIZER, max_batch_size=4, prefill_tokens=16) as engine:
        results = [engine.submit(prompt, GREEDY) for prompt in prompts]
        assert [each.result(WAIT_S).token_ids for each in results] == [generated(model, prompt, 20) for prompt in prompts]


def test_a_long_prompt_does_not_stop_those_who_are_being_answered():
    """With 100 tokens in pieces of 10, a running request gets a token between every two pieces."""
    model = tiny_model("llama")
    with Engine(model, TOKENIZER, max_batch_size=2, prefill_tokens=10, prefix_cache=False) as engine:
        gate = gated(model)
        running = engine.submit([1, 2], ENDLESS)
        gate.release(2)  # its prefill and a token
        while len(running.token_ids) < 2:
            pass
        engine.submit(LONG, GREEDY)
        gate.release(2 * 9 - 1)  # nine of ten pieces; the first pass may be the running request's
        while len(running.token_ids) < 2 + 8:
            pass
        assert engine.stats().forward_passes >= 3 + 2 * 7  # a third pass may have begun before the long prompt came
        gate.release(1000)


def test_a_common_beginning_is_computed_once():
    model = tiny_model("llama")
    system, turns = LONG[:90], [[5, 6], [7], [9, 10, 11]]
    with Engine(model, TOKENIZER, max_batch_size=2) as engine:
        for turn in turns:
            result = engine.submit(system + turn, GREEDY).result(WAIT_S)
            assert result.token_ids == generated(model, system + turn, 20)
            assert result.cached_tokens == (0 if turn == turns[0] else 64)
        whole = engine.submit(LONG[:64], GREEDY).result(WAIT_S)  # the last token is computed: its logits are needed
        assert (whole.cached_tokens, whole.token_ids) == (0, generated(model, LONG[:64], 20))
        assert engine.stats().cached_tokens == 2 * 64
        other = engine.submit([1, *system], GREEDY).result(WAIT_S)
        assert (other.cached_tokens, other.token_ids) == (0, generated(model, [1, *system], 20))


def test_an_answer_is_a_beginning_for_the_next_turn():
    model = tiny_model("llama")
    with Engine(model, TOKENIZER) as engine:
        first = engine.submit(LONG[:50], SamplingParams(max_tokens=30, temperature=0, ignore_eos=True)).result(WAIT_S)
        turn = [*LONG[:50], *first.token_ids, 8]
        second = engine.submit(turn, GREEDY).result(WAIT_S)
    assert (second.cached_tokens, second.token_ids) == (64, generated(model, turn, 20))


def test_what_was_not_used_for_longest_makes_room():
    model = tiny_model("llama")
    mib = (
        2 * 4 * 3 * 2 * 8 * (128 + 128) / 0.75 / 2**20
    )  # two rows, and a quarter of the whole: 85 tokens of beginnings, one block
    with Engine(model, TOKENIZER, max_batch_size=2, kv_cache_mib=mib) as engine:
        ask = [SamplingParams(max_tokens=1, temperature=0)]
        first, second = LONG[:70], LONG[20:90]
        cached = [engine.submit(prompt, *ask).result(WAIT_S).cached_tokens for prompt in (first, first, second, first, first)]
    assert cached == [0, 64, 0, 0, 64]


def test_rows_stay_within_their_budget_and_requests_that_lack_room_wait_or_come_back():
    model = tiny_model("llama")
    prompts = some_prompts(9)
    per_token = 2 * 4 * 3 * 2 * 8
    with Engine(model, TOKENIZER, max_batch_size=8, kv_cache_mib=per_token * 150 / 2**20, prefix_cache=False) as engine:
        results = [engine.submit(prompt, SamplingParams(max_tokens=90, temperature=0, ignore_eos=True)) for prompt in prompts]
        model.generation_config.eos_token_id = None
        assert [each.result(WAIT_S).token_ids for each in results] == [generated(model, prompt, 90) for prompt in prompts]
        stats = engine.stats()
    assert stats.preemptions > 0 and stats.kv_capacity_tokens == 150
    assert stats.kv_cache_mib * 2**20 <= per_token * 150
    assert stats.prompt_tokens == sum(map(len, prompts)) and stats.generated_tokens == 9 * 90


def test_a_request_that_was_put_back_draws_on_as_if_it_had_not_been():
    model = tiny_model("llama")
    asked = [
        SamplingParams(max_tokens=100, temperature=0.9, seed=seed, ignore_eos=True, presence_penalty=1.0) for seed in range(6)
    ]

    def tokens(**memory):
        with Engine(model, TOKENIZER, max_batch_size=6, **memory) as engine:
            results = [engine.submit([1, 2, 3], params) for params in asked]
            return [each.result(WAIT_S).token_ids for each in results], engine.stats().preemptions

    (roomy, none), (tight, some) = tokens(), tokens(kv_cache_mib=2 * 4 * 3 * 2 * 8 * 170 / 2**20, prefix_cache=False)
    assert roomy == tight and none == 0 < some


def test_memory_that_is_too_little_is_said_at_the_start():
    model = tiny_model("llama")
    with pytest.raises(ConfigError, match="kv_cache_mib: .* max_length is 100"):
        Engine(model, TOKENIZER, max_length=100, kv_cache_mib=0.01)
    engine = Engine(model, TOKENIZER, kv_cache_mib=2 * 4 * 3 * 2 * 8 * 80 / 2**20, prefix_cache=False)
    assert engine.max_length == 80  # nobody has asked for the model's own 128
    with pytest.raises(ConfigError, match="maximum context length is 80"):
        engine.submit(LONG, GREEDY)
    engine.close()


def test_frequencies_that_depend_on_the_longest_row_are_kept_from_changing():
    model = longrope_model()
    with pytest.raises(ConfigError, match="rotary frequencies .longrope. of others; give 2 to 32"):
        Engine(model, TOKENIZER, max_length=64)
    prompts = [[1, 2, 3], LONG[:25]]
    with Engine(model, TOKENIZER) as engine:
        assert engine.max_length == 32
        asked = [SamplingParams(max_tokens=7, temperature=0, ignore_eos=True)] * 2
        results = engine.submit_all(list(zip(prompts, asked, strict=True)))
        model.generation_config.eos_token_id = None
        assert [each.result(WAIT_S).token_ids for each in results] == [generated(model, prompt, 7) for prompt in prompts]
        with pytest.raises(ConfigError, match="give at most 7"):
            engine.submit(LONG[:25], SamplingParams(max_tokens=8))


def test_a_prompt_is_scored_without_being_continued():
    model = tiny_model("llama")
    prompt = LONG[:60]
    asked = SamplingParams(max_tokens=0, temperature=0, logprobs=2, prompt_logprobs=True)
    with torch.no_grad():
        truth = model(torch.tensor([prompt])).logits[0].log_softmax(-1)
    with Engine(model, TOKENIZER, prefill_tokens=16) as engine:
        for _ in range(2):  # the second time the beginning is known, and computed nevertheless
            result = engine.submit(prompt, asked).result(WAIT_S)
            assert (result.token_ids, result.finish_reason, len(result.prompt_logprobs)) == ([], "length", 60)
            assert result.prompt_logprobs[0] is None
            for position, entry in enumerate(result.prompt_logprobs[1:], start=1):
                assert entry.token_id == prompt[position]
                assert entry.logprob == pytest.approx(float(truth[position - 1, prompt[position]]), abs=1e-4)
                assert entry.top[0][1] == pytest.approx(float(truth[position - 1].max()), abs=1e-4)
