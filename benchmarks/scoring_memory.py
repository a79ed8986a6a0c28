"""Peak memory of replace-one scoring against the amount of text: python -m benchmarks.scoring_memory --out FILE.json [--quick]

Each row is a process of its own that loads the parent, scores `--candidates` replacements in every layer on so many tokens, as the
product does without Ray, and ends. Its peak is the resident memory that the operating system saw at the most (getrusage), in MiB;
`start_mib` is what it had when the parent was loaded. The variants' weights are those that they start from, read from a block library
in a store, which is made first. `growth` is the peak at the most tokens over that at the fewest.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.record import write
from puzzle_ray.artifacts import LayerChoice, SearchSpace
from puzzle_ray.data.order import Tokens
from puzzle_ray.data.settings import DataConfig
from puzzle_ray.data.tokenising import tokenise
from puzzle_ray.distill.library import Library, build_serially
from puzzle_ray.distill.settings import LibraryConfig
from puzzle_ray.models.blocks import load_stack
from puzzle_ray.models.checkpoint import locate
from puzzle_ray.models.child import read_config
from puzzle_ray.models.describe import describe
from puzzle_ray.models.tokenizer import read_tokenizer
from puzzle_ray.process import compute_with
from puzzle_ray.progress import Quiet
from puzzle_ray.scoring.replacements import all_replacements
from puzzle_ray.scoring.serial import SerialScorer
from puzzle_ray.scoring.settings import ScoringConfig
from puzzle_ray.store import Artifact, Store
from puzzle_ray.variants.space import search_space

TOKENS = (8_192, 16_384, 32_768, 65_536)
VARIANTS = ("gqa:50%", "noop"), ("ffn:50%", "noop")


def peak_mib() -> float:
    """Of this process since it started. Linux counts in KiB, macOS in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20 if sys.platform == "darwin" else 1 << 10)


def text(parent: str, data: str, tokens: int, length: int) -> Tokens:
    config = DataConfig(
        train=data, sequence_length=length, max_train_tokens=tokens, max_heldout_tokens=tokens, heldout_fraction=0.5
    )
    return tokenise(config, read_tokenizer(locate(parent)), None)[1]


def library_of(parent: str, sequences: np.ndarray[Any, Any], store: str) -> tuple[Artifact, SearchSpace]:
    """A library that has hardly been trained: its files are as large as any."""
    config = read_config(locate(parent))
    space = search_space(config, *VARIANTS, 8)
    size = sequences.shape[1]
    how = LibraryConfig(
        tokens=4 * size,
        calibration_tokens=4 * size,
        validation_tokens=2 * size,
        micro_batch_tokens=2 * size,
        checkpoint_every=1000,
    )
    artifact = Store(store).artifact("library", {"of": parent}, {})
    build_serially(parent, space, how, Tokens(sequences), 0, artifact, Quiet())
    return artifact, space


def score(parent: str, store: str, tokens: int, candidates: int, micro_batch_tokens: int, dtype: str) -> dict[str, Any]:
    """Scores in this process. What it reads was prepared in the store."""
    compute_with(1)
    folder, config = locate(parent), read_config(locate(parent))
    sequences = np.load(Path(store) / "tokens.npy", mmap_mode="r")
    space = search_space(config, *VARIANTS, 8)
    library = Library(Store(store).artifact("library", {"of": parent}, {}))
    stack = load_stack(folder, describe(config), config, 0, config.num_hidden_layers, getattr(torch, dtype))
    start = peak_mib()
    texts = Tokens(sequences).first(tokens, micro_batch_tokens // sequences.shape[1])
    by_layer: dict[int, int] = {}
    chosen = []
    for replacement in all_replacements(space, "subblock"):
        by_layer[replacement.layer] = by_layer.get(replacement.layer, 0) + 1
        if by_layer[replacement.layer] <= candidates and replacement.choice != LayerChoice():
            chosen.append(replacement)
    artifact = Store(store).artifact("scores", {"tokens": tokens, "dtype": dtype}, {})
    scoring = ScoringConfig.model_validate({"tokens": tokens, "micro_batch_tokens": micro_batch_tokens, "dtype": dtype})
    scorer = SerialScorer(stack, texts, scoring, artifact, library.states, Quiet())
    chunks = len(scorer.chunks([tuple(range(len(texts)))]))
    rows = scorer.score(chosen)
    read = max(row.tokens for row in rows if row.metric == "kl")
    return {"tokens": read, "dtype": dtype, "chunks": chunks, "scored": len(chosen), "start_mib": start, "peak_mib": peak_mib()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--out", required=True)
    parser.add_argument("--parent", default="../shared/data/gutenberg7m")
    parser.add_argument("--data", default="../shared/data/gutenberg")
    parser.add_argument("--candidates", type=int, default=1, help="replacements of every layer")
    parser.add_argument("--micro-batch-tokens", type=int, default=2048)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--length", type=int, default=256, help="tokens of a sequence")
    parser.add_argument("--quick", action="store_true", help="the fewest and the most tokens only")
    parser.add_argument("--one", nargs=2, metavar=("STORE", "TOKENS"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    how = (arguments.candidates, arguments.micro_batch_tokens, arguments.dtype)
    if arguments.one:
        print(json.dumps(score(arguments.parent, arguments.one[0], int(arguments.one[1]), *how)))
        return
    rows = []
    with tempfile.TemporaryDirectory() as store:
        found = text(arguments.parent, arguments.data, 2 * TOKENS[-1], arguments.length).sequences
        np.save(Path(store) / "tokens.npy", found)
        library_of(arguments.parent, np.asarray(found[:64]), store)
        for tokens in (TOKENS[0], TOKENS[-1]) if arguments.quick else TOKENS:
            words = [sys.executable, "-m", "benchmarks.scoring_memory", *sys.argv[1:], "--one", store, str(tokens)]
            done = subprocess.run(words, check=True, capture_output=True, text=True)
            rows.append(json.loads(done.stdout.splitlines()[-1]))
            print("  ".join(f"{name} {value}" for name, value in rows[-1].items()), flush=True)
    summary = {
        "growth": rows[-1]["peak_mib"] / rows[0]["peak_mib"],
        "growth_beside_start": (rows[-1]["peak_mib"] - rows[-1]["start_mib"]) / (rows[0]["peak_mib"] - rows[0]["start_mib"]),
        "peak_mib": rows[-1]["peak_mib"],
        "fewest_tokens": rows[0]["tokens"],
        "most_tokens": rows[-1]["tokens"],
        "parent": Path(arguments.parent).name,
    }
    for name, value in summary.items():
        print(f"{name:20} {value}")
    write(arguments.out, rows, summary)


if __name__ == "__main__":
    main()
