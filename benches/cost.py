"""How the cost of attention grows with the length: times and memory by pattern, and the fitted exponent.

    cargo build --release -p emberlm-bench
    python cost.py
    python cost.py --longest 65536 --step     # also training steps of a decoder with a window
    python cost.py --peers --json cost.json   # also PyTorch's and Hugging Face's, by benches/peers/alone.py
    python cost.py --draw cost.json cost.svg  # the curves of what was measured; needs matplotlib

Forward and backward pass of 8 heads of 64, batch 1, float32. The exponent is the slope of a line through the logarithms of
lengths and median times. Strided and fixed patterns take a stride of the square root of the length, as in Child et al.
2019. Memory is the peak of a call over the bytes of query, key and value; of a training step, the peak beyond model and
optimizer state. Ours is counted by the allocator, PyTorch's is what is resident.
"""

import argparse
import json
import math
import sys
from pathlib import Path

PEERS_FOLDER = Path(__file__).resolve().parent / "peers"
sys.path.insert(0, str(PEERS_FOLDER))
from common import last_json, program  # noqa: E402

PATTERNS = ["window:256", "dilated:256:2", "bigbird:64:3", "strided:{}", "fixed:{}:8", "causal"]
# By the name that `alone.py` knows: what a reader should see, and the longest length measured. SDPA's time grows with the
# square; Hugging Face's BigBird writes a tensor [heads, length, length].
PEERS = {
    "sdpa": ("PyTorch, causal", 8192),
    "longformer": ("Hugging Face, Longformer", 65536),
    "bigbird": ("Hugging Face, BigBird", 8192),
}
INPUT_BYTES = 3 * 8 * 64 * 4  # Of query, key and value, for each position.


def slope(points):
    """Of the least-squares line through (log x, log y)."""
    xs, ys = zip(*[(math.log(x), math.log(y)) for x, y in points])
    mean_x, mean_y = sum(xs) / len(xs), sum(ys) / len(ys)
    return sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys)) / sum((x - mean_x) ** 2 for x in xs)


def figures(name, *arguments):
    """What a program of ours measures."""
    return last_json([program(name, "-p emberlm-bench"), "--json", *map(str, arguments)])


def report(name, times, cells):
    """Prints the exponent of (length, time) pairs, and what each length took."""
    exponent = f"exponent {slope(times):.2f}" if len(times) > 1 else "no exponent of one length"
    print(f"{name:<24} {exponent}   " + "; ".join(cells), flush=True)


def attention(name, lengths, measure):
    """Measures each length, prints the line and returns the figures; `measure` gives `median_ms` and `peak_bytes`."""
    points = []
    for length in lengths:
        measured = measure(length)
        points.append({"name": name, "length": length, **{key: measured[key] for key in ("median_ms", "peak_bytes")}})
    ratio = lambda point: point["peak_bytes"] / (INPUT_BYTES * point["length"])
    cells = [f"{p['length']}: {p['median_ms']:.0f} ms, memory {ratio(p):.2f}" for p in points]
    if points:
        report(name, [(p["length"], p["median_ms"]) for p in points], cells)
    return points


def ours(pattern, length, repeats):
    word = pattern.format(round(math.sqrt(length)))
    return figures("attention", "--backward", "--pattern", word, "--seq", length, "--repeats", repeats)


def training_step(lengths, args):
    times, cells = [], []
    for length in lengths:
        measured = figures("sparse", "--step", "--length", length, "--repeats", args.repeats)
        times.append((length, measured["median_s"]))
        cells.append(f"{length}: {measured['median_s']:.2f} s, {measured['peak_bytes'] / 2**20:.0f} MiB")
    report("step", times, cells)


def draw(source, target):
    """Time and memory against the length, ours in full lines and the others' broken."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.fonttype"] = "none"  # Text as text, in the reader's font.
    from matplotlib import pyplot

    by_name = {}
    for point in json.loads(Path(source).read_text()):
        by_name.setdefault(point["name"], []).append(point)
    theirs = {shown for shown, _ in PEERS.values()}
    figure, panels = pyplot.subplots(1, 2, figsize=(12, 5.4), layout="constrained")
    for panel, key, scale, title in [
        (panels[0], "median_ms", 1.0, "forward and backward, ms"),
        (panels[1], "peak_bytes", 2.0**-20, "peak beyond query, key and value, MiB"),
    ]:
        for name, points in by_name.items():
            style = {"linestyle": "--", "marker": "s"} if name in theirs else {"linestyle": "-", "marker": "o"}
            xs, ys = zip(*[(p["length"], p[key] * scale) for p in points])
            panel.plot(xs, ys, markersize=4, label=name, **style)
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        lengths = sorted({p["length"] for points in by_name.values() for p in points})
        panel.set_xticks(lengths, [f"{length:,}" for length in lengths], minor=False)
        panel.set_xlabel("length")
        panel.set_title(title)
        panel.grid(True, alpha=0.3)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(target, dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--longest", type=int, default=32768, help="lengths from 2048 on, doubling (%(default)s)")
    parser.add_argument("--lengths", type=lambda text: [int(x) for x in text.split(",")], help="these instead")
    parser.add_argument("--longest-dense", type=int, default=8192, help="causal attention up to this length")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--patterns", type=lambda text: text.split(","), default=PATTERNS)
    parser.add_argument("--step", action="store_true", help="also the training step of sparse --step")
    parser.add_argument("--peers", action="store_true", help="also PyTorch and Hugging Face, after ours")
    parser.add_argument("--json", metavar="FILE", help="the measured points as JSON")
    parser.add_argument("--draw", nargs=2, metavar=("FILE.json", "PICTURE"), help="draw what --json wrote; measures nothing")
    args = parser.parse_args()
    if args.draw:
        draw(*args.draw)
        return
    lengths = args.lengths or [length for length in (2048 << i for i in range(20)) if length <= args.longest]
    if not lengths:
        parser.error("--longest is at least 2048")
    points = []
    for pattern in args.patterns:
        name = pattern.replace("{}", "√n")
        up_to = args.longest_dense if pattern == "causal" else math.inf
        points += attention(name, [n for n in lengths if n <= up_to], lambda n: ours(pattern, n, args.repeats))
    for what, (name, longest) in PEERS.items() if args.peers else []:
        command = [sys.executable, str(PEERS_FOLDER / "alone.py"), "--what", what, "--repeats", str(args.repeats)]
        points += attention(name, [n for n in lengths if n <= longest], lambda n: last_json([*command, "--length", str(n)]))
    if args.json:
        Path(args.json).write_text(json.dumps(points, indent=1) + "\n")
    if args.step:
        training_step(lengths, args)


if __name__ == "__main__":
    main()
