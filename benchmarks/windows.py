"""Compare the speed of windowed attention as a reshape with alternatives, in one run on one machine.

1. One attention layer with its projections on a 72 x 72 grid: our folded windows, a Python loop
   over the windows, and global attention.
2. A ViT-B block on 64 x 64 tokens: ours against segment-anything's windowed block (which needs
   the extra `sam`), with the same weights, and with the relative positions that SAM adds.

Our times include reordering the tokens into windows and back, which a network does once and not in every
layer. Runs alternate (A B C A B C ...); medians and their ratios are printed.

    python benchmarks/windows.py [--rounds 15] [--threads 2] [--batch 1]
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from radio.errors import require
from radio.nn.vit import NORM_EPS, Attention, Block
from radio.ops import from_windows, to_windows

# Letters: B batch, T tokens, D width, H W grid, s window side.

Run = Callable[[], Tensor]

LAYER_GRID, LAYER_WINDOW = (72, 72), 8
WIDTHS = {128: 4, 384: 6, 1280: 16}  # width -> heads
BLOCK_GRID, BLOCK_WINDOWS = (64, 64), (16, 8)


def folded(layer: nn.Module, x: Tensor, grid: tuple[int, int], side: int) -> Tensor:
    """Apply the layer to all windows at once: [B, T, D] -> [B, T, D]."""
    windows = layer(to_windows(x, grid, side).reshape(-1, side * side, x.shape[-1]))
    return from_windows(windows.reshape(x.shape), grid, side)


def looped(layer: nn.Module, x: Tensor, grid: tuple[int, int], side: int) -> Tensor:
    """Apply the layer to one window after the other: [B, T, D] -> [B, T, D]."""
    plane = x.unflatten(1, grid)
    out = torch.empty_like(plane)
    for top in range(0, grid[0], side):
        for left in range(0, grid[1], side):
            window = plane[:, top : top + side, left : left + side]
            mixed = layer(window.flatten(1, 2))
            out[:, top : top + side, left : left + side] = mixed.unflatten(1, (side, side))
    return out.flatten(1, 2)


def take_turns(runs: dict[str, Run], rounds: int) -> dict[str, float]:
    """Measure the median seconds of each, alternating after one warm-up round."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in seconds.items()}


def attention_layer(width: int, heads: int, batch: int, rounds: int) -> None:
    """Print the times of our windows, of the loop and of global attention."""
    layer = Attention(width, heads).eval()
    x = torch.randn(batch, LAYER_GRID[0] * LAYER_GRID[1], width)
    runs: dict[str, Run] = {
        "folded": lambda: folded(layer, x, LAYER_GRID, LAYER_WINDOW),
        "looped": lambda: looped(layer, x, LAYER_GRID, LAYER_WINDOW),
        "global": lambda: layer(x),
    }
    torch.testing.assert_close(runs["folded"](), runs["looped"](), rtol=1e-4, atol=1e-5)
    times = take_turns(runs, rounds)
    _report(f"attention, width {width}, window {LAYER_WINDOW}", times, "folded")


def vit_b_block(side: int, batch: int, rounds: int) -> None:
    """Print the times of our block and of segment-anything's, plain and with relative positions."""
    sam = require("segment_anything.modeling.image_encoder", extra="sam")
    norm = functools.partial(nn.LayerNorm, eps=NORM_EPS)
    make = functools.partial(sam.Block, 768, 12, norm_layer=norm, window_size=side, input_size=BLOCK_GRID)
    plain, relative = make(use_rel_pos=False).eval(), make(use_rel_pos=True).eval()
    ours = Block(768, 12, 4 * 768).eval()
    ours.load_state_dict(
        {name.replace("mlp.lin", "mlp.fc"): tensor for name, tensor in plain.state_dict().items()}
    )
    x = torch.randn(batch, BLOCK_GRID[0] * BLOCK_GRID[1], 768)
    plane = x.unflatten(1, BLOCK_GRID)
    runs: dict[str, Run] = {
        "ours": lambda: folded(ours, x, BLOCK_GRID, side),
        "sam": lambda: plain(plane),
        "sam + relative positions": lambda: relative(plane),
    }
    torch.testing.assert_close(runs["ours"](), runs["sam"]().flatten(1, 2), rtol=1e-4, atol=1e-4)
    _report(f"ViT-B block, window {side}", take_turns(runs, rounds), "ours")


def _report(title: str, times: dict[str, float], ours: str) -> None:
    cells = [f"{name} {1e3 * seconds:.1f} ms" for name, seconds in times.items()]
    others = [name for name in times if name != ours]
    names = ", ".join(f"{name} / {ours}" for name in others)
    ratios = ", ".join(f"{times[name] / times[ours]:.2f}" for name in others)
    sys.stdout.write(f"{title}: {', '.join(cells)}\n")
    sys.stdout.write(f"| {title}: {names} | {ratios} | `python benchmarks/windows.py` |\n")
    sys.stdout.flush()


def main() -> None:
    """Run both comparisons and print the results."""
    parser = argparse.ArgumentParser(description="Windowed attention as a reshape, side by side.")
    parser.add_argument("--rounds", type=int, default=15, help="measured turns of each contestant")
    parser.add_argument("--threads", type=int, default=2, help="threads of PyTorch")
    parser.add_argument("--batch", type=int, default=1, help="images at a time")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    with torch.inference_mode():
        for width, heads in WIDTHS.items():
            attention_layer(width, heads, arguments.batch, arguments.rounds)
        for side in BLOCK_WINDOWS:
            vit_b_block(side, arguments.batch, arguments.rounds)


if __name__ == "__main__":
    main()
