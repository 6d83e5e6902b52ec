"""Each operator of a layer in EmberLM and in PyTorch: in turn, several rounds, medians and ratios.

    cargo build --release -p emberlm-bench
    python layers.py                                      # all operators, [2048, 384] and [8192, 1024]
    python layers.py --rows 2048 --width 384 --ops gelu,layer_norm
    python layers.py --alone                              # PyTorch only, as lines of JSON

Float32, two threads; forward alone, then forward and backward. The gradient that comes in is ones, which are written in
the timed part, as Burn's `backward` does. Burn begins at one tensor: `add_norm` has two outputs and ends with their sum
on both sides, which `bytes` leaves out. Ours is the program `layers`, called as

    layers --op layer_norm --rows 2048 --width 384 --repeats 20 --backward --json

It prints one line of JSON with the fields op, rows, width, backward, median_ms, min_ms, bytes and gb_per_s.

`bytes` is what has to be read and written at least: each pass reads its inputs once and writes its results once, and
nothing stays in a cache from the forward to the backward pass. `gb_per_s` is that over the median time. For
x = [rows, width], n = rows * width, in numbers of 4 bytes, indices too:

    op               forward                            backward, in addition
    layer_norm       x, weight; y: 2 n + w              x, dy, weight; dx, dweight: 3 n + 2 w
    rms_norm         the same                           the same
    add_norm         x, y, weight; x + y, its norm:     x + y, its gradient, dy, weight; dx, which is y's too,
                     4 n + w                            dweight: 4 n + 2 w
    gelu, gelu_tanh, x; y: 2 n                          x, dy; dx: 3 n
    silu, relu,
    squared_relu
    swiglu           a, b; y: 3 n                       a, b, dy; da, db: 5 n
    cross_entropy    logits, targets: n + r             logits, targets; dlogits: 2 n + r
    projected_       hidden, table, targets:            hidden, table, targets; dhidden, dtable:
    cross_entropy    n + v w + r                        2 n + 2 v w + r
    linear           x, weight; y: 2 n + w^2            x, dy, weight; dx, dweight: 3 n + 2 w^2
    embedding        indices, rows of the table; y:     indices, dy; dtable:
                     r + min(r, w) w + n                r + n + w^2
    rotary           x, cos, sin; y: 2 n + 64 r         dy, cos, sin; dx: 2 n + 64 r
    dropout          x, y; x + dropout(y): 3 n          dy; dx, which is dy for the residual: 2 n
    adamw            p, g, m, v; p, m, v: 7 n           (a step is one pass)

Inputs and results of [2048, 384] take 3 MB each and may stay in a cache from one repeat to the next, so that `gb_per_s`
passes what memory gives.

By default glibc gets tensors of 32 MiB, which [8192, 1024] are, from the system for each call and gives them back, and
the system fills them with zeros. Our programs tell it not to. `--keep-freed-memory` tells it for PyTorch too: then the
ratios are those of the operators, else those of two programs as they come.

Norms have a weight and no bias, epsilon 1e-5. GELU is the exact one. `swiglu` is silu(a) * b. `cross_entropy` has
`width` classes and gives the mean; `projected_cross_entropy` gives it from hidden states and a table of `--vocab` (v)
rows, whose scores ours computes in chunks; the table is divided by the root of the width, since larger scores have
probabilities so small that arithmetic is slow on them. `linear` is square, without bias. `embedding` has a table [width, width].
`rotary` turns [1, width / 64, rows, 64] by halves; PyTorch's tables are made before, as a model makes them once for all
its layers, and ours makes its own. `dropout` is x + dropout(y) at rate 0.1; PyTorch draws a mask each time, ours is a
function of a key. `adamw` updates one parameter [rows, width] with torch.optim.AdamW as it is by default, which on CPUs
is neither foreach nor fused; `adamw_foreach` and `adamw_fused` ask for those, and are compared with the same `adamw` of
ours.
"""

import argparse
import json
import statistics

import torch
import torch.nn.functional as F

from common import THREADS, keep_freed_memory, last_json, program, timed
from decoder import Rotary

D_HEAD = 64


def uniform(*shape):
    return torch.rand(*shape) * 2 - 1


def layer_norm(rows, width):
    return [uniform(rows, width), uniform(width)], lambda x, weight: F.layer_norm(x, (width,), weight, eps=1e-5)


def rms_norm(rows, width):
    return [uniform(rows, width), uniform(width)], lambda x, weight: F.rms_norm(x, (width,), weight, eps=1e-5)


def add_norm(rows, width):
    def call(x, y, weight):
        total = x + y
        normed = F.layer_norm(total, (width,), weight, eps=1e-5)
        return total + normed if torch.is_grad_enabled() else (total, normed)

    return [uniform(rows, width), uniform(rows, width), uniform(width)], call


def activation(function):
    return lambda rows, width: ([uniform(rows, width)], function)


def swiglu(rows, width):
    return [uniform(rows, width), uniform(rows, width)], lambda a, b: F.silu(a) * b


def cross_entropy(rows, width):
    targets = torch.randint(width, (rows,))
    return [uniform(rows, width)], lambda logits: F.cross_entropy(logits, targets)


def projected_cross_entropy(rows, width, vocab):
    targets = torch.randint(vocab, (rows,))
    leaves = [uniform(rows, width), uniform(vocab, width) / width**0.5]
    return leaves, lambda hidden, table: F.cross_entropy(F.linear(hidden, table), targets)


def linear(rows, width):
    return [uniform(rows, width), uniform(width, width)], F.linear


def embedding(rows, width):
    indices = torch.randint(width, (rows,))
    return [uniform(width, width)], lambda table: F.embedding(indices, table)


def rotary(rows, width):
    return [uniform(1, width // D_HEAD, rows, D_HEAD)], Rotary(D_HEAD, rows)


def dropout(rows, width):
    return [uniform(rows, width), uniform(rows, width)], lambda x, y: x + F.dropout(y, 0.1)


# The inputs that get gradients and the function; the numbers that forward and backward move at least.
OPS = {
    "layer_norm": (layer_norm, lambda n, r, w: 2 * n + w, lambda n, r, w: 3 * n + 2 * w),
    "rms_norm": (rms_norm, lambda n, r, w: 2 * n + w, lambda n, r, w: 3 * n + 2 * w),
    "add_norm": (add_norm, lambda n, r, w: 4 * n + w, lambda n, r, w: 4 * n + 2 * w),
    **{
        name: (activation(function), lambda n, r, w: 2 * n, lambda n, r, w: 3 * n)
        for name, function in {
            "gelu": F.gelu,
            "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
            "silu": F.silu,
            "relu": F.relu,
            "squared_relu": lambda x: F.relu(x).square(),
        }.items()
    },
    "swiglu": (swiglu, lambda n, r, w: 3 * n, lambda n, r, w: 5 * n),
    "cross_entropy": (cross_entropy, lambda n, r, w: n + r, lambda n, r, w: 2 * n + r),
    "linear": (linear, lambda n, r, w: 2 * n + w * w, lambda n, r, w: 3 * n + 2 * w * w),
    "embedding": (embedding, lambda n, r, w: r + min(r, w) * w + n, lambda n, r, w: r + n + w * w),
    "rotary": (rotary, lambda n, r, w: 2 * n + D_HEAD * r, lambda n, r, w: 2 * n + D_HEAD * r),
    "dropout": (dropout, lambda n, r, w: 3 * n, lambda n, r, w: 2 * n),
}
# Besides rows and width it needs the vocabulary.
PROJECTED = "projected_cross_entropy"
OPTIMIZERS = {"adamw": {}, "adamw_foreach": {"foreach": True}, "adamw_fused": {"fused": True}}


def n_bytes(op, rows, width, backward, vocab):
    n = rows * width
    if op in OPTIMIZERS:
        return 4 * 7 * n
    if op == PROJECTED:
        forward, further = n + vocab * width + rows, 2 * (n + vocab * width) + rows
        return 4 * (forward + (further if backward else 0))
    _, forward, further = OPS[op]
    return 4 * (forward(n, rows, width) + (further(n, rows, width) if backward else 0))


def peer(op, rows, width, backward, vocab):
    """A function that runs the operator once in PyTorch."""
    torch.manual_seed(0)
    if op in OPTIMIZERS:
        parameter = torch.nn.Parameter(uniform(rows, width))
        parameter.grad = uniform(rows, width)
        return torch.optim.AdamW([parameter], lr=1e-3, weight_decay=0.1, **OPTIMIZERS[op]).step
    leaves, call = projected_cross_entropy(rows, width, vocab) if op == PROJECTED else OPS[op][0](rows, width)
    if not backward:

        def forward():
            with torch.no_grad():
                call(*leaves)

        return forward
    leaves = [leaf.requires_grad_() for leaf in leaves]

    def both():
        y = call(*leaves)
        torch.autograd.grad(y, leaves, torch.ones_like(y))

    return both


def figures(op, rows, width, backward, vocab, median_ms, min_ms):
    moved = n_bytes(op, rows, width, backward, vocab)
    return {
        "op": op,
        "rows": rows,
        "width": width,
        "backward": backward,
        "median_ms": round(median_ms, 4),
        "min_ms": round(min_ms, 4),
        "bytes": moved,
        "gb_per_s": round(moved / median_ms / 1e6, 2),
    }


def ours(command, op, rows, width, backward, vocab, repeats):
    # Ours has one AdamW.
    name = "adamw" if op in OPTIMIZERS else op
    arguments = ["--op", name, "--rows", str(rows), "--width", str(width), "--repeats", str(repeats), "--json"]
    if op == PROJECTED:
        arguments += ["--vocab", str(vocab)]
    return last_json([command, *arguments, *(["--backward"] if backward else [])])


def over(rounds):
    """The median of the rounds' medians, and the least of all."""
    return statistics.median(a for a, _ in rounds), min(b for _, b in rounds)


def compare(command, case, args):
    """Times one case; prints it."""
    op, rows, width, backward, _ = case
    run = peer(*case)
    here, there = [], []
    for _ in range(args.rounds):
        if command:
            line = ours(command, *case, args.repeats)
            here.append((line["median_ms"], line["min_ms"]))
        times = timed(run, args.repeats)
        there.append((statistics.median(times), min(times)))
    theirs = figures(*case, *over(there))
    if not command:
        print(json.dumps(theirs), flush=True)
        return
    mine = figures(*case, *over(here))
    ratio = statistics.median(b / a for (a, _), (b, _) in zip(here, there))
    if args.json:
        print(json.dumps({"emberlm": mine, "pytorch": theirs, "ratio": round(ratio, 2)}), flush=True)
        return
    both = "forward and backward" if backward else "step" if op in OPTIMIZERS else "forward"
    print(
        f"{op:<23} [{rows}, {width}] {both:<21} {mine['median_ms']:>9.3f} ms {mine['gb_per_s']:>6.1f} GB/s, PyTorch "
        f"{theirs['median_ms']:>9.3f} ms {theirs['gb_per_s']:>6.1f} GB/s: {ratio:.2f} times as fast",
        flush=True,
    )


def cases(args):
    for rows, width in args.shapes:
        for op in args.ops:
            for backward in [False] if op in OPTIMIZERS else [False, True]:
                yield op, rows, width, backward, args.vocab


def arguments():
    known = [*OPS, PROJECTED, *OPTIMIZERS]

    def op_list(text):
        unknown = [op for op in text.split(",") if op not in known]
        if unknown:
            raise argparse.ArgumentTypeError(f"no {unknown[0]} among {', '.join(known)}")
        return text.split(",")

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int)
    parser.add_argument("--width", type=int, help="a multiple of 64")
    parser.add_argument("--vocab", type=int, default=2048, help="classes of projected_cross_entropy (%(default)s)")
    parser.add_argument("--ops", type=op_list, default=known, metavar="OP,OP", help="all if absent")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=20, help="counted repeats of each side a round")
    parser.add_argument("--alone", action="store_true", help="PyTorch only, as lines of JSON")
    parser.add_argument("--keep-freed-memory", action="store_true", help="the allocator's setting of ours for PyTorch too")
    parser.add_argument("--json", action="store_true", help="lines of JSON instead of the table")
    args = parser.parse_args()
    if (args.rows is None) != (args.width is None):
        parser.error("give --rows and --width, or neither")
    args.shapes = [(args.rows, args.width)] if args.rows else [(2048, 384), (8192, 1024)]
    if "rotary" in args.ops and any(width % D_HEAD for _, width in args.shapes):
        parser.error(f"rotary has heads of {D_HEAD}: --width must be a multiple of it")
    return args


def main():
    args = arguments()
    command = None if args.alone else program("layers", "-p emberlm-bench")
    torch.set_num_threads(THREADS)
    if args.keep_freed_memory:
        keep_freed_memory()
    for case in cases(args):
        compare(command, case, args)


if __name__ == "__main__":
    main()
