"""How the cost of attention grows with the length: times and memory by pattern, and the fitted exponent.

    cargo build --release -p emberlm-bench
    python cost.py
    python cost.py --longest 65536 --step     # also training steps of a decoder with a window

The exponent is the slope of a line through the logarithms of lengths and median times. Strided and fixed patterns take
a stride of the square root of the length, as in Child et al. 2019. Memory is the peak of a call over the bytes of query,
key and value; of a training step, the peak beyond model and optimizer state.
"""

import argparse
import json
import math
import os
import subprocess
import sys
from pathlib import Path

TARGET = Path(os.environ.get("CARGO_TARGET_DIR", Path(__file__).resolve().parent.parent / "target"))
PATTERNS = ["window:256", "dilated:256:2", "bigbird:64:3", "strided:{}", "fixed:{}:8", "causal"]


def slope(points):
    """Of the least-squares line through (log x, log y)."""
    xs, ys = zip(*[(math.log(x), math.log(y)) for x, y in points])
    mean_x, mean_y = sum(xs) / len(xs), sum(ys) / len(ys)
    return sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys)) / sum((x - mean_x) ** 2 for x in xs)


def figures(program, *arguments):
    """What a program of ours measures."""
    path = TARGET / "release" / program
    if not path.exists():
        sys.exit(f"{path} does not exist: run cargo build --release -p emberlm-bench first")
    return json.loads(subprocess.run([str(path), "--json", *map(str, arguments)], check=True, capture_output=True).stdout)


def report(name, times, cells):
    """Prints the exponent of (length, time) pairs, and what each length took."""
    exponent = f"exponent {slope(times):.2f}" if len(times) > 1 else "no exponent of one length"
    print(f"{name:<14} {exponent}   " + "; ".join(cells), flush=True)


def attention(pattern, lengths, args):
    times, cells = [], []
    for length in lengths:
        if pattern == "causal" and length > args.longest_dense:
            continue
        word = pattern.format(round(math.sqrt(length)))
        measured = figures("attention", "--backward", "--pattern", word, "--seq", length, "--repeats", args.repeats)
        times.append((length, measured["median_ms"]))
        cells.append(f"{length}: {measured['median_ms']:.0f} ms, memory {measured['peak_ratio']:.2f}")
    report(pattern, times, cells)


def training_step(lengths, args):
    times, cells = [], []
    for length in lengths:
        measured = figures("sparse", "--step", "--length", length, "--repeats", args.repeats)
        times.append((length, measured["median_s"]))
        cells.append(f"{length}: {measured['median_s']:.2f} s, {measured['peak_bytes'] / 2**20:.0f} MiB")
    report("step", times, cells)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--longest", type=int, default=32768, help="lengths from 2048 on, doubling (%(default)s)")
    parser.add_argument("--lengths", type=lambda text: [int(x) for x in text.split(",")], help="these instead")
    parser.add_argument("--longest-dense", type=int, default=8192, help="causal attention up to this length")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--patterns", type=lambda text: text.split(","), default=PATTERNS)
    parser.add_argument("--step", action="store_true", help="also the training step of sparse --step")
    args = parser.parse_args()
    lengths = args.lengths or [length for length in (2048 << i for i in range(20)) if length <= args.longest]
    if not lengths:
        parser.error("--longest is at least 2048")
    for pattern in args.patterns:
        attention(pattern, lengths, args)
    if args.step:
        training_step(lengths, args)


if __name__ == "__main__":
    main()
