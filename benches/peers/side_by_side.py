"""Training steps of EmberLM, plain Burn and PyTorch beside each other: in turn, several rounds, medians and ratios.

    cargo build --release -p emberlm-bench
    python side_by_side.py --preset tiny
    python side_by_side.py --preset llama --compiled      # also PyTorch under torch.compile

Each round times every contender in a process of its own, so that a machine whose speed drifts treats all alike. The
ratio is the median over the rounds of a contender's time over emberlm's. Cores are processor time over time on the
clock; PyTorch's threads wait in a loop, so that much less than their number says that something else was running.
Memory is what the steps need beyond model and optimizer state. GFLOP/s count the same operations for all, see
`flops_per_step` in decoder.py.
"""

import argparse
import json
import statistics
import sys

from common import HERE, THREADS, last_json, median_of, program
from decoder import PRESETS


def contenders(preset, steps, compiled):
    """The command of each, which prints its figures as a line of JSON."""
    ours = [program("emberlm-bench", "-p emberlm-bench"), "--json", "--preset", preset, "--steps", str(steps), "--only"]
    torch = [sys.executable, str(HERE / "decoder.py"), "--json", "--preset", preset, "--time-only", str(steps)]
    torch += ["--threads", str(THREADS)]
    commands = {"emberlm": [*ours, "emberlm"]}
    if not PRESETS[preset].llama:  # burn-nn's encoder has no RMS norm, rotary positions or SwiGLU
        commands["plain burn"] = [*ours, "plain-burn"]
    commands["pytorch"] = torch
    if compiled:
        commands["pytorch compiled"] = [*torch, "--compile"]
    return commands


def summary(name, rounds, reference, preset):
    """The figures of a contender over all rounds."""
    times = [figures["median_step_ms"] for figures in rounds]
    step = statistics.median(times)
    peak = median_of(rounds, "peak_bytes")
    return {
        "contender": name,
        "step_ms": step,
        "min_step_ms": min(times),
        "max_step_ms": max(times),
        "tokens_per_second": preset.tokens_per_step / step * 1e3,
        "ratio": statistics.median(a / b["median_step_ms"] for a, b in zip(times, reference)),
        "cpu_utilisation": median_of(rounds, "cpu_utilisation"),
        "peak_mib": None if peak is None else peak / 2**20,
        "gflops": median_of(rounds, "gflops"),
    }


HEADER = (
    f"{'':<16} {'ms a step':>9} {'least to most':>18} {'tokens/s':>8} {'ratio':>5} {'cores':>5} {'peak MiB':>8} "
    f"{'GFLOP/s':>7}"
)


def row(figures):
    def cell(key, width, digits):
        value = figures[key]
        return f"{'-' if value is None else format(value, f'.{digits}f'):>{width}}"

    least, most = f"{figures['min_step_ms']:.1f}", f"{figures['max_step_ms']:.1f}"
    return (
        f"{figures['contender']:<16} {cell('step_ms', 9, 1)} {f'{least} to {most}':>18} "
        f"{cell('tokens_per_second', 8, 0)} {cell('ratio', 5, 2)} {cell('cpu_utilisation', 5, 2)} "
        f"{cell('peak_mib', 8, 0)} {cell('gflops', 7, 1)}"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="tiny")
    parser.add_argument("--steps", type=int, default=10, help="counted steps of each contender a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--compiled", action="store_true", help="also PyTorch under torch.compile")
    parser.add_argument("--json", action="store_true", help="lines of JSON instead of the table")
    args = parser.parse_args()
    preset = PRESETS[args.preset]
    commands = contenders(args.preset, args.steps, args.compiled)
    rounds = {name: [] for name in commands}
    for _ in range(args.rounds):
        for name, command in commands.items():
            rounds[name].append(last_json(command))
    if not args.json:
        print(
            f"{args.preset}: {preset.batch_size} x {preset.seq_length} = {preset.tokens_per_step} tokens a step, "
            f"{args.rounds} rounds of {args.steps} steps, {THREADS} threads"
        )
        print(HEADER)
    for name, figures in rounds.items():
        line = summary(name, figures, rounds["emberlm"], preset)
        print(json.dumps({"preset": args.preset, **line}) if args.json else row(line))


if __name__ == "__main__":
    main()
