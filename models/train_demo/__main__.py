"""Make the demo model: ``python -m models.train_demo --device cuda --out models/demo``."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch

from . import dataset, export, tokenizer
from .train import train


def main() -> None:
    """Run every step, from generated text to the finished folder."""
    parser = argparse.ArgumentParser(prog="python -m models.train_demo", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("models/demo"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--batch-tokens", type=int, default=131_072)
    parser.add_argument("--rows", type=int, default=160_000, help="rows of 1,024 tokens")
    parser.add_argument("--long-rows", type=int, default=4_000, help="rows of 8,192 tokens")
    parser.add_argument("--tokenizer-documents", type=int, default=60_000)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--save-every", type=int, default=2_000)
    parser.add_argument("--log", type=Path, help="a file for the progress lines")
    parser.add_argument("--chat", action="store_true", help="only talk to the model in --out")
    args = parser.parse_args()
    if args.chat:
        for temperature in (0.0, 0.7):
            print(f"=== temperature {temperature}")
            export.chat(args.out, temperature)
        return
    made = tokenizer.train(args.seed, args.tokenizer_documents)
    print(f"tokenizer: {made.get_vocab_size()} tokens", flush=True)
    short = dataset.windows(made, args.seed + 1, args.rows, 1024, False, args.workers)
    long = dataset.windows(made, args.seed + 2, args.long_rows, 8192, True, args.workers)
    train(
        short,
        long,
        steps=args.steps,
        batch_tokens=args.batch_tokens,
        device=torch.device(args.device),
        seed=args.seed,
        save=lambda model: export.export(model, made, args.out),
        save_every=args.save_every,
        log=args.log,
    )
    export.chat(args.out)


if __name__ == "__main__":
    main()
