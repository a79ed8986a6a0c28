"""The DeciLM config of a child: what transformers reads back gives engines the child's own shapes; what does not fit is refused by name."""

import json

import pytest
import torch
from small_models import tiny_config
from transformers import AutoConfig, LlamaConfig

from puzzle_ray.artifacts import LayerChoice
from puzzle_ray.errors import ConfigError, ParentError
from puzzle_ray.export.nemotron_nas import WIDTH_MULTIPLE, ffn_mult, nas_config, write_nas_config
from puzzle_ray.models.child import new_child

LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 512,
}  # fmt: skip
CHOICES = [
    LayerChoice(),
    LayerChoice("gqa:2", "ffn:256"),
    LayerChoice("gqa_prune:1", "ffn_iterative:512"),
    LayerChoice("noop", "linear"),
    LayerChoice("linear", "noop"),
]


def parent(model_type="llama", **changes):
    shapes = {"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 8, "intermediate_size": 768}
    return tiny_config(model_type, **(shapes | {"num_hidden_layers": len(CHOICES), "max_position_embeddings": 4096} | changes))


@pytest.fixture
def read_back(tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))

    def read(config, choices=CHOICES, dtype="bfloat16"):
        write_nas_config(tmp_path / "child", config, choices, dtype)
        return AutoConfig.from_pretrained(tmp_path / "child", trust_remote_code=True)

    return read


def engines_width(mult, hidden_size):
    """The engines' arithmetic, as vLLM and TensorRT-LLM write it."""
    n = int(2 * mult * hidden_size / 3)
    return n if n % 256 == 0 else n + 256 - n % 256


def test_engines_see_the_shapes_of_the_childs_own_modules(read_back):
    config = parent()
    found, child = read_back(config), new_child(config, CHOICES, torch.float32)
    assert found.model_type == "nemotron-nas" and found.architectures == ["DeciLMForCausalLM"]
    assert found.num_hidden_layers == len(found.block_configs) == len(CHOICES)
    for block, layer in zip(found.block_configs, child.model.layers, strict=True):
        names = {name for name, _ in layer.named_parameters()}
        assert block.attention.no_op == (not any(name.startswith("self_attn") for name in names))
        assert block.ffn.no_op == (not any(name.startswith("mlp") for name in names))
        assert block.attention.replace_with_linear == ("self_attn.linear_attn.weight" in names)
        assert block.ffn.replace_with_linear == ("mlp.linear_mlp.weight" in names)
        if "self_attn.k_proj.weight" in names:
            kv_heads = found.num_attention_heads // block.attention.n_heads_in_group
            assert kv_heads * found.head_dim == layer.self_attn.k_proj.out_features
        else:
            assert block.attention.n_heads_in_group is None
        if "mlp.up_proj.weight" in names:
            assert engines_width(block.ffn.ffn_mult, found.hidden_size) == layer.mlp.up_proj.out_features
        else:
            assert block.ffn.ffn_mult is None


def test_everything_else_is_the_parents(read_back):
    config = parent(rope_parameters=dict(LLAMA3), rms_norm_eps=1e-5, tie_word_embeddings=False, vocab_size=96)
    found = read_back(config)
    assert found.dtype == torch.bfloat16
    names = (
        "vocab_size",
        "hidden_size",
        "num_attention_heads",
        "head_dim",
        "hidden_act",
        "max_position_embeddings",
        "rms_norm_eps",
    )
    for name in (*names, "tie_word_embeddings", "bos_token_id", "eos_token_id", "attention_bias", "mlp_bias"):
        assert getattr(found, name) == getattr(config, name), name
    assert found.rope_parameters == dict(config.rope_parameters) == LLAMA3
    written = nas_config(config, CHOICES, "bfloat16")  # for readers of transformers 4
    assert written["rope_theta"] == 500000.0 and written["rope_scaling"] == {k: v for k, v in LLAMA3.items() if k != "rope_theta"}
    assert nas_config(parent(), CHOICES, "float16")["rope_scaling"] is None


def test_the_config_can_be_written_again(read_back, tmp_path):
    found = read_back(parent())
    found.save_pretrained(tmp_path / "again")
    blocks = json.loads((tmp_path / "again/config.json").read_text())["block_configs"]
    assert blocks == nas_config(parent(), CHOICES, "bfloat16")["block_configs"]
    assert json.loads(found.to_json_string())["block_configs"] == blocks and found.block_configs[0].ffn.no_op is False


@pytest.mark.parametrize("hidden_size", [64, 2048, 3584, 4096, 5120, 8192, 16384])
def test_every_multiple_of_256_comes_back_as_itself(hidden_size):
    for width in range(WIDTH_MULTIPLE, 4 * hidden_size + 1, WIDTH_MULTIPLE):
        assert engines_width(ffn_mult(width, hidden_size), hidden_size) == width
    with pytest.raises(ConfigError, match="an FFN of 1100 channels: .*multiples of 256 only; set space.ffn_multiple_of=256"):
        ffn_mult(1100, hidden_size)


def test_qwen2_keeps_its_biases_for_engines_that_have_them():
    written = nas_config(parent("qwen2"), CHOICES, "bfloat16")
    assert written["qkv_bias"] is True and "attention_bias" not in written  # the output projection has none
    with pytest.raises(ParentError, match="qwen2 with biases in its query, key and value projections, and this engine"):
        nas_config(parent("qwen2"), CHOICES, "bfloat16", biases=False)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (lambda: parent("qwen3"), "qwen3 is not one of llama, mistral, qwen2, phi3: it has norms over queries and keys"),
        (lambda: parent("granite"), "granite is not one of"),
        (lambda: parent("gemma2", num_hidden_layers=3), "gemma2 is not one of"),
        (
            lambda: parent("phi3", rope_parameters={"rope_theta": 1e4, "partial_rotary_factor": 0.5}),
            "phi3 with partial_rotary_factor=0.5",
        ),
        (
            lambda: parent(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}),
            "llama with rope_type='dynamic'",
        ),
        (lambda: parent("mistral", sliding_window=16), "mistral with sliding_window=16"),
        (lambda: parent("qwen2", use_sliding_window=True, sliding_window=16), "qwen2 with sliding_window=16"),
        (lambda: parent(hidden_act="gelu"), "llama with hidden_act='gelu'"),
    ],
)
def test_parents_that_decilm_cannot_compute_are_refused(config, words):
    with pytest.raises(ParentError, match=words):
        nas_config(config(), CHOICES, "bfloat16")


def test_biases_are_refused_where_the_engine_has_none():
    for name in ("attention_bias", "mlp_bias"):
        config = parent(**{name: True})
        assert nas_config(config, CHOICES, "bfloat16")[name] is True
        with pytest.raises(ParentError, match=f"llama with {name}, and this engine builds every projection without a bias"):
            nas_config(config, CHOICES, "bfloat16", biases=False)


@pytest.mark.parametrize(
    ("choice", "words"),
    [
        (
            LayerChoice("window:64"),
            "space.attention: the nemotron-nas format has no 'window:64'; it has parent, gqa:N, gqa_prune:N",
        ),
        (LayerChoice(ffn="ours.thin:VARIANT:4"), "space.ffn: the nemotron-nas format has no 'ours.thin:VARIANT:4'"),
        (LayerChoice(ffn="ffn:100"), "an FFN of 100 channels"),
    ],
)
def test_variants_the_format_lacks_are_refused(choice, words):
    with pytest.raises(ConfigError, match=words):
        nas_config(parent(), [choice], "bfloat16")


def test_a_parents_own_width_must_fit():
    with pytest.raises(ConfigError, match="an FFN of 700 channels"):
        nas_config(LlamaConfig(hidden_size=64, intermediate_size=700, num_attention_heads=8), [LayerChoice()], "bfloat16")
