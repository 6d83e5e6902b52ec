"""How the cost of attention grows with the length: times and memory by pattern, and the fitted exponent.

    cargo build --release -p emberlm-bench
    python cost.py

The exponent is the slope of a line through the logarithms of lengths and median times. Strided and fixed patterns take
a stride of the square root of the length, as in Child et al. 2019.
"""

import argparse
import json
import math
import os
import subprocess
import sys
from pathlib import Path

TARGET = Path(os.environ.get("CARGO_TARGET_DIR", Path(__file__).resolve().parent.parent / "target"))
BENCH = TARGET / "release" / "attention"
PATTERNS = ["window:256", "dilated:256:2", "bigbird:64:3", "strided:{}", "fixed:{}:8", "causal"]


def slope(points):
    """Of the least-squares line through (log x, log y)."""
    xs, ys = zip(*[(math.log(x), math.log(y)) for x, y in points])
    mean_x, mean_y = sum(xs) / len(xs), sum(ys) / len(ys)
    return sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys)) / sum((x - mean_x) ** 2 for x in xs)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", default="2048,4096,8192,16384,32768")
    parser.add_argument("--longest-dense", type=int, default=8192, help="causal attention up to this length")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--patterns", default=",".join(PATTERNS))
    args = parser.parse_args()
    if not BENCH.exists():
        sys.exit(f"{BENCH} does not exist: run cargo build --release -p emberlm-bench first")
    for pattern in args.patterns.split(","):
        times, cells = [], []
        for length in map(int, args.lengths.split(",")):
            if pattern == "causal" and length > args.longest_dense:
                continue
            word = pattern.format(round(math.sqrt(length)))
            command = [str(BENCH), "--json", "--backward", "--pattern", word, "--seq", str(length)]
            command += ["--repeats", str(args.repeats)]
            figures = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            times.append((length, figures["median_ms"]))
            cells.append(f"{length}: {figures['median_ms']:.0f} ms, memory {figures['peak_ratio']:.2f}")
        exponent = f"exponent {slope(times):.2f}" if len(times) > 1 else "no exponent of one length"
        print(f"{pattern:<14} {exponent}   " + "; ".join(cells), flush=True)


if __name__ == "__main__":
    main()
