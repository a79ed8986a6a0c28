"""A child is trained by TRL as any Hugging Face model is, by the documented command."""

import json
import shutil
from importlib.util import find_spec

import pytest
import torch
from byte_tokenizer import VOCAB_SIZE, byte_tokenizer
from small_models import save_parent

from jobs import app
from puzzle_ray.artifacts import LayerChoice
from puzzle_ray.models.child import choices_of, load_model, new_child, read_config, save_child

CHOICES = (LayerChoice("gqa:1", "ffn:24"), LayerChoice("noop", "parent"), LayerChoice("parent", "noop"))
QUICK = ["--max_steps", "2", "--per_device_train_batch_size", "2", "--max_length", "32", "--learning_rate", "0.01", "--use_cpu"]
QUICK += ["--report_to", "none", "--save_strategy", "no", "--bf16", "false", "--disable_tqdm", "true"]


@pytest.mark.skipif(find_spec("trl") is None, reason="TRL (the extra `align`) is not installed")
def test_sft_and_dpo_train_a_child(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    parent, child = save_parent(tmp_path / "parent", vocab_size=VOCAB_SIZE), tmp_path / "child"
    byte_tokenizer().save_pretrained(parent)
    torch.manual_seed(0)
    save_child(new_child(read_config(parent), CHOICES, torch.float32), parent, child)
    rows = {
        "sft": [{"text": f"a text with number {n}"} for n in range(4)],
        "dpo": [{"prompt": f"number {n} is", "chosen": " good", "rejected": " bad"} for n in range(4)],
    }
    before = child
    for method, lines in rows.items():
        data, after = tmp_path / f"{method}_data", tmp_path / method
        data.mkdir()
        (data / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        words = ["--model_name_or_path", str(before), "--dataset_name", str(data), "--output_dir", str(after), *QUICK]
        assert app.run(["align-child", method, "--", *words]) == 0
        old, new = (load_model(folder, torch.float32) for folder in (before, after))
        assert choices_of(new.config) == CHOICES and type(new) is type(old)
        changed = [name for name, value in new.state_dict().items() if not torch.equal(value, old.state_dict()[name])]
        assert len(changed) > len(new.state_dict()) / 2, "it was trained"
        before = after
        shutil.rmtree(data)


@pytest.mark.skipif(find_spec("trl") is not None, reason="TRL is installed")
def test_without_trl_the_extra_is_named(capsys):
    assert app.run(["align-child", "sft", "--", "--model_name_or_path", "x"]) == 2
    assert capsys.readouterr().err == "error: align-child: TRL is not installed; install the extra `align`\n"
