"""A whole run's settings on a small random parent: for what is checked before any work, and for runs from end to end in seconds."""

from __future__ import annotations

from pathlib import Path

from byte_tokenizer import VOCAB_SIZE, byte_tokenizer
from small_models import save_parent

from jobs.run import Run
from puzzle_ray.config import load

SMALL = {  # `compress` in seconds
    "space": {"attention": ["parent", "gqa:1", "noop"], "ffn": ["parent", "ffn:24", "noop"]},
    "data": {"sequence_length": 16},
    "profile": {"scenario": {"batch_size": 2, "input_tokens": 16, "output_tokens": 4}, "repeats": 2, "stack": 1},
    "library": {
        "tokens": 512,
        "micro_batch_tokens": 64,
        "calibration_tokens": 128,
        "validation_tokens": 128,
        "checkpoint_every": 2,
    },
    "scoring": {"tokens": 128, "micro_batch_tokens": 64, "shortlist": "fisher"},
    "search": {"limits": {"speedup": None, "params_fraction": 0.9}, "candidates": 2, "measure_tokens": 128, "rivals": ["greedy"]},
    "gkd": {"tokens": 512, "micro_batch_tokens": 64, "checkpoint_every": 2},
    "evaluate": {"tokens": 128, "repeats": 1, "sample_tokens": 4, "prompt": "a text"},
}


def save_parent_with_text(folder: Path) -> tuple[Path, Path]:
    """A random Llama with a tokenizer, and a file of text."""
    save_parent(folder, vocab_size=VOCAB_SIZE + 7)
    byte_tokenizer().save_pretrained(folder)
    text = folder / "text.txt"
    text.write_text("a text of some length " * 50)
    return folder, text


def make_run(parent_with_text: tuple[Path, Path], store: Path, *overrides: str) -> Run:
    folder, text = parent_with_text
    plain = ("space.attention=[parent,'gqa:1',noop]", "space.ffn=[parent,'ffn:24',noop]", "data.sequence_length=16")
    sizes = ("profile.scenario.input_tokens=16", "profile.scenario.output_tokens=4", "search.sweep={speedup: [1.1]}")
    places = (f"parent={folder}", f"data.train={text}", f"store={store}")
    return Run(load(None, None, (*plain, *sizes, *places, *overrides)))
