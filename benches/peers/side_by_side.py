"""Training steps of EmberLM, plain Burn and PyTorch beside each other: in turn, several rounds, medians and ratios.

    cargo build --release -p emberlm-bench
    python side_by_side.py --preset tiny

Each round times every contender in a process of its own, so that a machine whose speed drifts treats all alike.
"""

import argparse
import os
import re
import statistics
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
TARGET = Path(os.environ.get("CARGO_TARGET_DIR", HERE.parent.parent / "target"))
BENCH = TARGET / "release" / "emberlm-bench"


def milliseconds(command):
    """The median step that a contender prints."""
    two_threads = {**os.environ, "RAYON_NUM_THREADS": "2"}
    output = subprocess.run(command, check=True, capture_output=True, text=True, env=two_threads).stdout
    return float(re.search(r"([\d.]+) ms (?:a|per) step", output).group(1))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=["tiny", "small"], default="tiny")
    parser.add_argument("--steps", type=int, default=10, help="counted steps of each contender a round")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    if not BENCH.exists():
        sys.exit(f"{BENCH} does not exist: run cargo build --release -p emberlm-bench first")
    ours = [str(BENCH), "--preset", args.preset, "--steps", str(args.steps), "--only"]
    contenders = {
        "emberlm": [*ours, "emberlm"],
        "plain burn": [*ours, "plain-burn"],
        "pytorch": [
            sys.executable,
            str(HERE / "decoder.py"),
            "--preset",
            args.preset,
            "--time-only",
            str(args.steps),
        ],
    }
    times = {name: [] for name in contenders}
    for _ in range(args.rounds):
        for name, command in contenders.items():
            times[name].append(milliseconds(command))
    for name, values in times.items():
        step = statistics.median(values)
        ratio = statistics.median(a / b for a, b in zip(values, times["emberlm"]))
        print(
            f"{args.preset} {name:<10} {step:8.1f} ms a step ({min(values):.1f} to {max(values):.1f}), "
            f"{8 * 256 / step * 1e3:6.0f} tokens/s, {ratio:.2f} times emberlm's time"
        )


if __name__ == "__main__":
    main()
