"""The serving engine says what `generate` says, whoever else is being served, and never leaves a caller waiting."""

import asyncio
import pickle
import threading
from dataclasses import replace

import pytest
import torch
from byte_tokenizer import VOCAB_SIZE
from hypothesis import given, settings
from hypothesis import strategies as st
from serving_models import ENDLESS, GREEDY, TOKENIZER, WAIT_S, gated, generated, some_prompts, tiny_model
from tokenizers import Tokenizer, decoders, models
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from puzzle_ray.errors import ConfigError
from puzzle_ray.models.child import load_model
from puzzle_ray.serving.engine import Engine
from puzzle_ray.serving.generation import EngineBusy, EngineFailed
from puzzle_ray.serving.sampling import SamplingParams
from puzzle_ray.serving.text import TextStream


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


@pytest.fixture
def engine(model):
    with Engine(model, TOKENIZER, max_batch_size=3) as engine:
        yield engine


# `gemma3_text` mixes full and sliding-window layers, `mistral` has windows only; the child lacks attention in layer 0.
@pytest.mark.parametrize("kind", ["llama", "child", "gpt2", "mistral", "gemma3_text"])
def test_greedy_tokens_are_those_of_each_prompt_alone(kind):
    model = tiny_model(kind)
    requests = list(zip(some_prompts(9), [1, 30, 7, 40, 25, 2, 33, 3, 12], strict=True))
    engine = Engine(model, TOKENIZER, max_batch_size=3)

    def submit(prompt, max_tokens):
        return engine.submit(prompt, SamplingParams(max_tokens=max_tokens, temperature=0))

    generations = [submit(*request) for request in requests[:5]]
    with engine:
        reader = iter(generations[4])
        next(reader)  # the others join while the fifth is being decoded
        generations += [submit(*request) for request in requests[5:]]
        results = [generation.result(WAIT_S) for generation in generations]
    for (prompt, max_tokens), result in zip(requests, results, strict=True):
        assert result.token_ids == generated(model, prompt, max_tokens)


def test_a_trained_model_tells_its_story(shared_data):
    model, tokenizer = load_model(shared_data / "stories260K"), AutoTokenizer.from_pretrained(shared_data / "stories260K")
    asked = SamplingParams(max_tokens=28, temperature=0)
    with Engine(model, tokenizer) as engine:
        result = engine.submit(tokenizer("Once upon a time").input_ids, asked).result(WAIT_S)
    assert result.text.startswith(", there was a little girl named Lily. She loved to play outside in the park.")


def test_layers_keep_only_the_heads_they_have():
    """Layers 0 and 2 have no attention: a stub of one number per token; layer 1 has one KV head of 8."""
    with Engine(tiny_model("child"), TOKENIZER, max_batch_size=4, max_length=64, prefix_cache=False) as engine:
        assert engine.stats().kv_cache_mib == 2 * 4 * 64 * (1 + 8 + 1) / 2**20  # one row; more when they are needed
        for generation in [engine.submit([1, 2, 3], GREEDY) for _ in range(4)]:
            generation.result(WAIT_S)
        assert engine.stats().kv_cache_mib == 2 * 4 * 4 * 64 * (1 + 8 + 1) / 2**20


def test_requests_waiting_together_are_prefilled_and_decoded_together(model):
    prompts = [[200 + length] + [7] * length for length in (9, 7, 8, 9)]  # little padding: one pass for all
    engine = Engine(model, TOKENIZER, max_batch_size=4)
    generations = [engine.submit(prompt, SamplingParams(max_tokens=6, temperature=0)) for prompt in prompts]
    with engine:
        tokens = [generation.result(WAIT_S).token_ids for generation in generations]
    assert tokens == [generated(model, prompt, 6) for prompt in prompts]
    stats = engine.stats()
    assert (stats.forward_passes, stats.finished, stats.prompt_tokens, stats.generated_tokens) == (6, 4, 37, 24)
    assert (stats.running, stats.waiting) == (0, 0)


def test_a_seed_draws_the_same_tokens_in_any_company(model):
    asked = SamplingParams(max_tokens=20, temperature=0.8, top_p=0.9, seed=7)
    prompt, *others = some_prompts(6, seed=3)
    with Engine(model, TOKENIZER, max_batch_size=4) as engine:
        alone = engine.submit(prompt, asked).result(WAIT_S).token_ids
        company = [engine.submit(other, SamplingParams(max_tokens=30)) for other in others]
        again = engine.submit(prompt, asked).result(WAIT_S).token_ids
        other_seed = engine.submit(prompt, replace(asked, seed=8)).result(WAIT_S).token_ids
        for generation in company:
            generation.result(WAIT_S)
    assert alone == again != other_seed


def test_the_answer_ends_where_asked(engine, model):
    prompt = some_prompts(1)[0]
    whole = engine.submit(prompt, ENDLESS).result(WAIT_S)
    assert (whole.finish_reason, len(whole.token_ids)) == ("length", 128 - len(prompt))
    text = engine.submit(prompt, GREEDY).result(WAIT_S).text
    stop = text[5:7]
    stopped = engine.submit(prompt, SamplingParams(max_tokens=20, temperature=0, stop=("never this", stop))).result(WAIT_S)
    assert (stopped.text, stopped.finish_reason) == (text.split(stop)[0], "stop")


def test_requests_with_and_without_stop_strings_are_decoded_together(model):
    """The text of some is looked at token by token, that of the others at the end."""
    prompts = some_prompts(4)
    with Engine(model, TOKENIZER, max_batch_size=8) as engine:
        plain, stopping = (
            [engine.submit(prompt, replace(GREEDY, stop=stop, logprobs=0)) for prompt in prompts]
            for stop in ((), ("never this",))
        )
        for prompt, *both in zip(prompts, plain, stopping, strict=True):
            one, other = (generation.result(WAIT_S) for generation in both)
            assert one.token_ids == other.token_ids == generated(model, prompt, 20)
            assert (one.text, one.finish_reason, len(one.logprobs)) == (other.text, other.finish_reason, len(other.logprobs))


def test_it_stops_after_the_end_of_text_token():
    model = tiny_model("llama")
    prompt = some_prompts(1)[0]
    tokens = generated(model, prompt, 20)
    model.generation_config.eos_token_id = [255, tokens[6]]
    with Engine(model, TOKENIZER) as engine:
        result = engine.submit(prompt, GREEDY).result(WAIT_S)
        on = engine.submit(prompt, SamplingParams(max_tokens=20, temperature=0, ignore_eos=True)).result(WAIT_S)
    assert (result.token_ids, result.finish_reason) == (tokens[: tokens.index(tokens[6]) + 1], "stop")
    assert (len(on.token_ids), on.finish_reason) == (20, "length")


def test_the_token_that_ends_an_answer_is_no_part_of_its_text(model):
    """Whether the tokenizer calls it special or not: end-of-turn tokens of some chat models are plain to their tokenizers."""
    prompt = [5, 9, 77]
    tokens = generated(model, prompt, 8)
    end = next(token for token in tokens[2:] if token not in tokens[:2])
    number = tokens.index(end) + 1

    def text(tokens):
        stream = TextStream(TOKENIZER, prompt)
        return stream.push_all(tokens) + stream.finish()

    model.generation_config.eos_token_id = [0, end]
    try:
        with Engine(model, TOKENIZER) as engine:
            ended = engine.submit(prompt, SamplingParams(max_tokens=number + 1, temperature=0)).result(WAIT_S)
            kept = engine.submit(prompt, SamplingParams(max_tokens=number, temperature=0, ignore_eos=True)).result(WAIT_S)
    finally:
        model.generation_config.eos_token_id = 0
    assert (ended.text, ended.token_ids, ended.finish_reason) == (text(tokens[: number - 1]), tokens[:number], "stop")
    assert (kept.text, kept.token_ids) == (text(tokens[:number]), tokens[:number])


def test_cancelling_frees_the_slot():
    model = tiny_model("llama")
    expected = generated(model, [4, 5], 20)
    with Engine(model, TOKENIZER, max_batch_size=1) as engine:
        gate = gated(model)
        long, queued, after = engine.submit([1, 2], ENDLESS), engine.submit([3], ENDLESS), engine.submit([4, 5], GREEDY)
        gate.release(2)  # prefill and one decode step
        for _ in long:
            break
        queued.cancel()
        gate.release(1000)
        assert after.result(WAIT_S).token_ids == expected
        assert long.result(WAIT_S).finish_reason == queued.result(WAIT_S).finish_reason == "cancelled"
        assert queued.token_ids == [] and 1 <= len(long.token_ids) <= 3


def test_what_cannot_be_served_is_refused(engine):
    for prompt, params, said in [
        ([], GREEDY, "prompt: is empty"),
        ([VOCAB_SIZE], GREEDY, "ids go from 0 to 256"),
        ([1] * 128, GREEDY, "prompt: has 128 tokens"),
        ([1] * 120, GREEDY, "give at most 8"),
    ]:
        with pytest.raises(ConfigError, match=said):
            engine.submit(prompt, params)
    wrong = {"max_tokens": [-1], "temperature": [-1, float("nan")], "top_p": [0, 1.1], "top_k": [-1], "stop": [("",)]}
    for name, value in [(name, value) for name, values in wrong.items() for value in values]:
        with pytest.raises(ConfigError, match=name):
            replace(GREEDY, **{name: value})


def test_models_it_would_serve_wrongly_are_refused(model):
    neo = AutoConfig.for_model(
        "gpt_neo", hidden_size=32, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]], vocab_size=VOCAB_SIZE
    )
    mamba = AutoConfig.for_model("mamba", hidden_size=32, num_hidden_layers=2, vocab_size=VOCAB_SIZE)
    for config, said in [(neo, "layers of type local"), (mamba, "no max_position_embeddings")]:
        with pytest.raises(ConfigError, match=said):
            Engine(AutoModelForCausalLM.from_config(config), TOKENIZER)
    with pytest.raises(ConfigError, match="give 2 to 128"):
        Engine(model, TOKENIZER, max_length=129)


def test_a_full_queue_is_said_at_once(model):
    engine = Engine(model, TOKENIZER, max_waiting=2)
    waiting = [engine.submit([1], GREEDY) for _ in range(2)]
    with pytest.raises(EngineBusy, match="2 requests wait"):
        engine.submit([1], GREEDY)
    with engine:
        assert all(generation.result(WAIT_S).finish_reason for generation in waiting)


def failing_passes(model, wanted):
    """From now on the forward passes whose number `wanted` says yes to fail."""
    passes = iter(range(10**6))

    def fail(*_):
        if wanted(next(passes)):
            raise RuntimeError("the device fell off")

    model.register_forward_pre_hook(fail)


def test_a_forward_pass_that_fails_ends_its_own_requests_only():
    model = tiny_model("llama")
    prompts = some_prompts(4)
    expected = [generated(model, prompt, 20) for prompt in prompts]
    engine = Engine(model, TOKENIZER, max_batch_size=2)
    failing_passes(model, lambda number: number == 4)
    generations = [engine.submit(prompt, GREEDY) for prompt in prompts]
    with engine:
        for generation in generations[:2]:
            with pytest.raises(EngineFailed, match="the device fell off"):
                generation.result(WAIT_S)
        assert [generation.result(WAIT_S).token_ids for generation in generations[2:]] == expected[2:]
        engine.check()


def test_passes_that_do_nothing_but_fail_end_every_request_and_the_engine():
    model = tiny_model("llama")
    engine = Engine(model, TOKENIZER, max_batch_size=2)
    failing_passes(model, lambda number: number >= 4)
    generations = [engine.submit([1, 2], ENDLESS) for _ in range(12)]
    with engine:
        for generation in generations:
            with pytest.raises(EngineFailed, match="the device fell off"):
                generation.result(WAIT_S)
        with pytest.raises(EngineFailed, match="the device fell off"):
            list(generations[0])
        with pytest.raises(EngineFailed, match="the device fell off"):
            while True:  # until the engine's thread has said so
                engine.submit([1], GREEDY)


def test_a_forward_pass_that_does_not_end_is_noticed():
    model = tiny_model("llama")
    with Engine(model, TOKENIZER, stall_timeout_s=0.05) as engine:
        engine.submit([1, 2], GREEDY).result(WAIT_S)
        gate = gated(model)
        generation = engine.submit([1, 2], GREEDY)
        with pytest.raises(EngineFailed, match="has not ended"):
            while not generation.done:
                engine.check()
        gate.release(1000)
        generation.result(WAIT_S)
        engine.check()


def test_a_request_whose_logits_are_nan_fails_alone():
    model = tiny_model("llama")
    with torch.no_grad():
        model.get_input_embeddings().weight[9] = float("nan")
        model.lm_head.weight = torch.nn.Parameter(torch.randn(VOCAB_SIZE, 32))
    with Engine(model, TOKENIZER) as engine:
        broken, sound = engine.submit([3, 9], GREEDY), engine.submit([3, 4], SamplingParams(max_tokens=1, temperature=0))
        with pytest.raises(EngineFailed, match="not finite numbers"):
            broken.result(WAIT_S)
        assert len(sound.result(WAIT_S).token_ids) == 1
        scored = engine.submit([3, 9], SamplingParams(max_tokens=0, temperature=0, logprobs=0, prompt_logprobs=True))
        with pytest.raises(EngineFailed, match="not finite numbers"):
            scored.result(WAIT_S)
        for _ in range(3):  # in the rows that the broken request has left, beside longer ones
            others = [engine.submit(prompt, GREEDY) for prompt in ([5, 6], [3, 4, 5, 6, 7])]
            assert all(len(other.result(WAIT_S).token_ids) >= 1 for other in others)


def test_closing_ends_every_wait():
    model = tiny_model("llama")
    engine = Engine(model, TOKENIZER, max_batch_size=1).start()
    gate = gated(model)
    generations = [engine.submit([1], ENDLESS) for _ in range(3)]
    closer = threading.Thread(target=engine.close)
    closer.start()
    with pytest.raises(EngineFailed, match="closed"):
        while True:  # until the close is under way
            engine.check()
    gate.release(1000)
    closer.join(WAIT_S)
    for generation in generations:
        with pytest.raises(EngineFailed, match="closed"):
            generation.result(WAIT_S)


def test_closing_an_engine_that_never_started_ends_waits_too(model):
    engine = Engine(model, TOKENIZER)
    generation = engine.submit([1], GREEDY)
    engine.close()
    with pytest.raises(EngineFailed, match="closed"):
        generation.result(WAIT_S)


def test_async_readers_get_the_same_and_free_their_slot_when_cancelled():
    model, prompts = tiny_model("llama"), some_prompts(5)
    expected = [generated(model, prompt, 20) for prompt in prompts]

    async def read(generation):
        return [token_id async for delta in generation for token_id in delta.token_ids]

    async def run(engine, gate):
        abandoned = engine.submit([1, 2], ENDLESS)
        reader = asyncio.create_task(read(abandoned))
        gate.release(2)
        while len(abandoned.token_ids) < 2:
            await asyncio.sleep(0.001)
        reader.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reader
        gate.release(1000)
        tokens = await asyncio.gather(*(read(engine.submit(prompt, GREEDY)) for prompt in prompts))
        return abandoned.result(WAIT_S).finish_reason, tokens

    with Engine(model, TOKENIZER, max_batch_size=2) as engine:
        assert asyncio.run(asyncio.wait_for(run(engine, gated(model)), WAIT_S)) == ("cancelled", expected)


@given(
    text=st.text(st.characters(exclude_characters="\N{REPLACEMENT CHARACTER}", exclude_categories=["Cs"]), max_size=40),
    stop=st.text("aé€😀 ", min_size=1, max_size=3),
    filler=st.text("aé€😀 ", max_size=12),
)
@settings(max_examples=200, deadline=None)
def test_text_comes_in_whole_characters_and_ends_before_the_stop_string(text, stop, filler):
    text = text[:20] + filler + text[20:]
    stream = TextStream(TOKENIZER, [0], [stop])
    pieces = []
    for token_id in TOKENIZER(text, add_special_tokens=False).input_ids:
        pieces.append(stream.push(token_id))
        if stream.stopped:
            break
    else:
        pieces.append(stream.finish())
    assert "".join(pieces) == text.split(stop)[0]
    assert stream.stopped == (stop in text)
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


@pytest.mark.parametrize("stop", [(), ("never this",)])
def test_tokens_of_which_no_text_can_be_made_end_their_own_request_only(model, stop):
    prompt = some_prompts(1)[0]
    tokens = generated(model, prompt, 20)
    bad = next(token for token in tokens if token not in [*tokens[:2], *prompt])

    class Broken:
        all_special_ids, added_tokens_decoder = TOKENIZER.all_special_ids, {}

        def decode(self, ids, **options):
            if bad in ids:
                raise RuntimeError("no such piece")
            return TOKENIZER.decode(ids, **options)

    asked = replace(GREEDY, stop=stop)
    with Engine(model, Broken(), max_batch_size=2) as engine:
        whole, streamed = (engine.submit(prompt, asked) for _ in range(2))
        with pytest.raises(EngineFailed, match="no such piece"):
            whole.result(WAIT_S)
        with pytest.raises(EngineFailed, match="no such piece"):
            list(streamed)
        assert engine.submit(prompt, replace(asked, max_tokens=2)).result(WAIT_S).token_ids == tokens[:2]
        engine.check()


def test_an_unfinished_character_is_shown_only_at_the_end():
    *ids, _ = TOKENIZER("ab€", add_special_tokens=False).input_ids
    stream = TextStream(TOKENIZER, [0])
    assert [stream.push(token_id) for token_id in ids] == ["a", "b", "", ""]
    assert set(stream.finish()) == {"\N{REPLACEMENT CHARACTER}"}


def test_spacing_is_that_of_prompt_and_answer_in_one(shared_data):
    """A tokenizer whose decoder drops the first space, and spells rare characters in bytes."""
    tokenizer = AutoTokenizer.from_pretrained(shared_data / "stories260K")
    ids = tokenizer("Once upon a time naïve 😀 dogs ran. é€😀!").input_ids
    stream = TextStream(tokenizer, ids[:5])
    pieces = [stream.push(token_id) for token_id in ids[5:]]
    assert "".join([*pieces, stream.finish()]) == " naïve 😀 dogs ran. é€😀!"
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)
    for size in range(1, 20):
        stream = TextStream(tokenizer, ids[:5])
        pieces = [stream.push_all(ids[start : start + size]) for start in range(5, len(ids), size)]
        assert "".join([*pieces, stream.finish()]) == " naïve 😀 dogs ran. é€😀!"


def test_text_goes_on_behind_a_special_token_that_has_no_role():
    """Special and no bos, eos or pad: `<|end|>` of Phi-3. A decoder that drops the first space must not begin anew there."""
    vocab = {"▁once": 0, "▁upon": 1, "▁a": 2, "<unk>": 3}
    inner = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    inner.decoder = decoders.Metaspace()
    inner.add_special_tokens(["<|end|>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner)
    assert tokenizer.all_special_ids == []
    ids = [1, 4, 2, 4, 4, 0]
    whole = tokenizer.decode([0, *ids], skip_special_tokens=True)
    assert whole == "once upon a once"
    one_by_one, together = TextStream(tokenizer, [0]), TextStream(tokenizer, [0])
    assert "once" + "".join(map(one_by_one.push, ids)) + one_by_one.finish() == whole
    assert "once" + together.push_all(ids[:3]) + together.push_all(ids[3:]) + together.finish() == whole


def ids_of(text: str) -> list[int]:
    return list(TOKENIZER(text, add_special_tokens=False).input_ids)


@given(
    st.lists(
        st.one_of(st.text("aé€😀 ", max_size=6).map(ids_of), st.lists(st.integers(1, VOCAB_SIZE - 1), max_size=3)), max_size=8
    ),
    st.lists(st.integers(1, 9), min_size=40),
    st.sampled_from([(), ("é ",)]),
)
@settings(max_examples=200, deadline=None)
def test_several_tokens_at_once_are_shown_as_one_after_the_other(parts, sizes, stop):
    """Also where the bytes are no text at all."""
    ids, together, alone = sum(parts, []), TextStream(TOKENIZER, [0], stop), TextStream(TOKENIZER, [0], stop)
    for size in sizes:
        some, ids = ids[:size], ids[size:]
        assert together.push_all(some) == "".join(alone.push(token_id) for token_id in some if not alone.stopped)
        assert together.stopped == alone.stopped
        if alone.stopped:
            break
    assert together.finish() == alone.finish()


@pytest.mark.parametrize("error", [EngineBusy(3), EngineFailed("why")])
def test_errors_survive_the_trip(error):
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
