"""The training loop: Muon for the matrices, AdamW for the rest, warm-up and linear decay to zero."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from .dataset import OTHER, REPLY, Windows
from .network import Llama

LEARNING_RATE = 4e-3
WARM_UP = 200  # steps
DECAY_FROM = 0.4  # fraction of the steps after which the learning rate falls
OTHER_WEIGHT = 0.05  # weight of prompt tokens in the loss; tokens of replies weigh 1
LONG_EVERY = 6  # every sixth step is one of long rows


def schedule(step: int, steps: int) -> float:
    """The learning rate as a fraction of its peak."""
    done = step / steps
    falling = 1.0 if done < DECAY_FROM else (1.0 - done) / (1.0 - DECAY_FROM)
    return min(1.0, (step + 1) / WARM_UP) * falling


class Feed:
    """Deals out random batches of rows, going through all of them before any repeats."""

    def __init__(self, data: Windows, rows: int, device: torch.device, seed: int) -> None:
        self.ids = torch.from_numpy(data.ids).to(device)
        self.kinds = torch.from_numpy(data.kinds).to(device)
        self.rows = min(rows, len(self.ids))
        self.generator = torch.Generator().manual_seed(seed)
        self.order = torch.empty(0, dtype=torch.int64)

    def next(self) -> tuple[Tensor, Tensor]:
        """The ids and loss weights of the next batch."""
        if len(self.order) < self.rows:
            self.order = torch.randperm(len(self.ids), generator=self.generator)
        picked, self.order = self.order[: self.rows], self.order[self.rows :]
        picked = picked.to(self.ids.device)
        kinds = self.kinds[picked]
        weights = (kinds == REPLY).float() + OTHER_WEIGHT * (kinds == OTHER).float()
        return self.ids[picked].long(), weights


def train(
    short: Windows,
    long: Windows,
    *,
    steps: int,
    batch_tokens: int,
    device: torch.device,
    seed: int,
    save: Callable[[Llama], None],
    save_every: int,
    log: Path | None = None,
) -> Llama:
    """Train a model from scratch; `save` is called now and then and at the end."""
    torch.manual_seed(seed)
    torch.set_float32_matmul_precision("high")
    model = Llama().to(device)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(matrices, lr=LEARNING_RATE, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    feeds = [
        Feed(short, batch_tokens // short.ids.shape[1], device, seed + 1),
        Feed(long, max(1, batch_tokens // long.ids.shape[1]), device, seed + 2),
    ]
    compute: Callable[[Tensor, Tensor], Tensor] = model.loss
    if device.type == "cuda":
        compute = torch.compile(model.loss, dynamic=False)
    began = last = time.monotonic()
    totals = [torch.zeros((), device=device), torch.zeros((), device=device)]
    counts = [0, 0]
    every = max(1, min(100, steps // 10))
    for step in range(steps):
        which = int(step % LONG_EVERY == LONG_EVERY - 1)
        ids, weights = feeds[which].next()
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = LEARNING_RATE * schedule(step, steps)
        with torch.autocast(device.type, torch.bfloat16):
            loss = compute(ids, weights)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        totals[which] += loss.detach()
        counts[which] += 1
        if (step + 1) % every == 0:
            means = [float(t) / c if c else math.nan for t, c in zip(totals, counts, strict=True)]
            now = time.monotonic()
            rate = sum(counts) * batch_tokens / (now - last)
            line = (
                f"step {step + 1}/{steps}  loss {means[0]:.4f}  long {means[1]:.4f}  "
                f"{rate / 1e6:.2f} M tokens/s  {now - began:.0f} s"
            )
            print(line, flush=True)
            if log:
                with log.open("a", encoding="utf-8") as file:
                    file.write(line + "\n")
            if any(math.isnan(float(total)) for total in totals):
                raise RuntimeError("the loss is no longer a number")
            totals, counts, last = [torch.zeros_like(t) for t in totals], [0, 0], now
        if (step + 1) % save_every == 0 or step + 1 == steps:
            save(model)
    return model
