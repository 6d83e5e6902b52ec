"""A mixture of experts in EmberLM and in PyTorch beside each other: in turn, several rounds, medians and ratios.

    cargo build --release -p emberlm-bench
    python moe.py                                   # all cases, forward alone, then both passes
    python moe.py --cases 8 --keep-freed-memory     # one of them, with PyTorch's memory kept as ours is
    python moe.py --alone --cases one               # PyTorch only, as lines of JSON
    python moe.py --check                           # PyTorch's contenders beside the formula, on a small case; seconds

A layer of gated experts of width 512 with a softmax router whose best scores are divided by their sum, in float32 with two
threads. The cases, by --cases:

    8      8 experts of d_ff 1024, top 2, 2048 tokens
    fine   64 experts of d_ff 128, top 16, 2048 tokens
    64     64 experts of d_ff 1024, top 2, 2048 tokens; their weights are 403 MB
    one    8 experts of d_ff 1024, top 2, 1 token, forward alone

Three contenders stand beside ours. Hugging Face's MixtralSparseMoeBlock with the experts one after the other, `eager`, and
with one grouped product, `grouped_mm`, which is what transformers takes by default; the block asks its config for the
implementation in each call. And our own dense gated feed-forward layer of inner width top_k * d_ff, which has as many
operations without any routing: `dense` in the table, by the same program with `--dense`. Weights are uniform, tokens too,
so that experts get about equal numbers. The gradient that comes in is ones, written in the timed part as Burn's `backward`
does; the gradients are of the tokens, the router and all experts, and none of any balance loss, which no side computes.
The backward pass of `eager` makes, for each expert, a gradient as large as all experts' weights; that is its time as
released.

Ours is the program `moe`, called as

    moe --d-model 512 --d-ff 1024 --experts 8 --top-k 2 --tokens 2048 --repeats 5 --json [--backward] [--dense]

It prints one line of JSON with median_ms, min_ms, gflops and peak_bytes among its fields. A ratio is the other's time over
ours: above 1 ours is faster. For `dense` it is ours over dense, the cost of routing: 1.15 means 15 % more.
"""

import argparse
import json
import statistics
import sys

import torch
import torch.nn.functional as F

from common import THREADS, keep_freed_memory, last_json, program, timed

D_MODEL = 512
# d_ff, experts, top_k, tokens
CASES = {
    "8": (1024, 8, 2, 2048),
    "fine": (128, 64, 16, 2048),
    "64": (1024, 64, 2, 2048),
    "one": (1024, 8, 2, 1),
}
IMPLEMENTATIONS = ["eager", "grouped_mm"]
DENSE = "dense"


def uniform(*shape):
    return torch.rand(*shape) * 2 - 1


class Mixtral:
    """Hugging Face's block. `leaves` get gradients."""

    def __init__(self, d_model, d_ff, n_experts, top_k, n_tokens):
        from transformers import MixtralConfig
        from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

        self.config = MixtralConfig(
            hidden_size=d_model, intermediate_size=d_ff, num_local_experts=n_experts, num_experts_per_tok=top_k
        )
        self.block = MixtralSparseMoeBlock(self.config).eval()
        with torch.no_grad():
            for parameter in self.block.parameters():
                parameter.copy_(uniform(*parameter.shape) * (3 / parameter.shape[-1]) ** 0.5)
        self.x = uniform(1, n_tokens, d_model) * 3**0.5
        self.leaves = [self.x, *self.block.parameters()]

    def __call__(self, implementation):
        self.config._experts_implementation = implementation
        return self.block(self.x)

    def definition(self):
        """The layer by its formula: every expert on every token, and the weights of those not chosen are zero."""
        p = dict(self.block.named_parameters())
        probabilities = (self.x @ p["gate.weight"].T).softmax(-1)
        values, chosen = probabilities.topk(self.config.num_experts_per_tok, -1)
        weights = torch.zeros_like(probabilities).scatter(-1, chosen, values / values.sum(-1, keepdim=True))
        gate, up = torch.einsum("btd,efd->ebtf", self.x, p["experts.gate_up_proj"]).chunk(2, -1)
        outputs = torch.einsum("ebtf,edf->ebtd", F.silu(gate) * up, p["experts.down_proj"])
        return torch.einsum("ebtd,bte->btd", outputs, weights)


def passes(peer, implementation, backward):
    """A function that runs one pass or both."""
    if not backward:

        def forward():
            with torch.no_grad():
                peer(implementation)

        return forward
    leaves = [leaf.requires_grad_() for leaf in peer.leaves]

    def both():
        y = peer(implementation)
        torch.autograd.grad(y, leaves, torch.ones_like(y))

    return both


def gflops(sizes, backward, median_ms):
    """Of the products alone, those of the router and of the chosen experts; the backward pass has twice as many."""
    d_model, d_ff, n_experts, top_k, n_tokens = sizes
    forward = 2 * n_tokens * d_model * (n_experts + 3 * top_k * d_ff)
    return forward * (3 if backward else 1) / median_ms / 1e6


def ours(command, sizes, backward, repeats, dense=False):
    names = ["--d-model", "--d-ff", "--experts", "--top-k", "--tokens"]
    options = [text for pair in zip(names, map(str, sizes)) for text in pair]
    switches = [*(["--backward"] if backward else []), *(["--dense"] if dense else [])]
    return last_json([command, *options, "--repeats", str(repeats), "--json", *switches])


def measure(command, sizes, backward, args):
    """By contender, the median milliseconds of each round; and the peak of ours."""
    peer = Mixtral(*sizes)
    runs = {name: passes(peer, name, backward) for name in IMPLEMENTATIONS}
    medians, peaks = {}, []
    for _ in range(args.rounds):
        if command:
            for name, dense in (("emberlm", False), (DENSE, True)):
                line = ours(command, sizes, backward, args.repeats, dense)
                medians.setdefault(name, []).append(line["median_ms"])
                if not dense:
                    peaks.append(line["peak_bytes"])
        for name, run in runs.items():
            medians.setdefault(name, []).append(statistics.median(timed(run, args.repeats)))
    return medians, max(peaks, default=None)


def compare(command, case, backward, args):
    sizes = (args.d_model, *CASES[case])
    if args.tiny:
        sizes = (16, 24, min(CASES[case][1], 8), 2, min(CASES[case][3], 32))
    medians, peak = measure(command, sizes, backward, args)
    figures = dict(zip(["d_model", "d_ff", "experts", "top_k", "tokens"], sizes)) | {"case": case, "backward": backward}
    for name, times in medians.items():
        figures[f"{name}_ms"] = round(statistics.median(times), 3)
        figures[f"{name}_gflops"] = round(gflops(sizes, backward, statistics.median(times)), 1)
    if command:
        mine = medians["emberlm"]
        for name in IMPLEMENTATIONS:
            figures[f"{name}_ratio"] = round(statistics.median(b / a for a, b in zip(mine, medians[name])), 2)
        figures["over_dense"] = round(statistics.median(a / b for a, b in zip(mine, medians[DENSE])), 2)
        figures["emberlm_peak_bytes"] = peak
    if args.json or not command:
        print(json.dumps(figures), flush=True)
        return
    both = "forward and backward" if backward else "forward"
    print(
        f"{case:<5} {both:<20} {figures['emberlm_ms']:>9.2f} ms {figures['emberlm_gflops']:>6.1f} GFLOP/s, "
        f"{figures['over_dense']:.2f} of dense's {figures['dense_ms']:.2f} ms; "
        + "; ".join(
            f"{name} {figures[f'{name}_ms']:.2f} ms: {figures[f'{name}_ratio']:.2f} times as fast"
            for name in IMPLEMENTATIONS
        ),
        flush=True,
    )


def check():
    """Output and gradients of both implementations beside the formula."""
    peer = Mixtral(48, 40, 8, 3, 50)
    leaves = [leaf.requires_grad_() for leaf in peer.leaves]
    weight = torch.randn(1, 50, 48)

    def results(y):
        return [y, *torch.autograd.grad((y * weight).sum(), leaves)]

    expected = results(peer.definition())
    for name in IMPLEMENTATIONS:
        pairs = zip(results(peer(name)), expected)
        difference = max(((a - b).abs().max() / b.abs().max()).item() for a, b in pairs)
        print(f"{name}: largest difference of output and gradients {difference:.1e}")
        if not difference < 1e-5:
            sys.exit(f"{name} does not give what the formula gives")


def arguments():
    def case_list(text):
        if unknown := [case for case in text.split(",") if case not in CASES]:
            raise argparse.ArgumentTypeError(f"no {unknown[0]} among {', '.join(CASES)}")
        return text.split(",")

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=case_list, default=list(CASES), metavar="CASE,CASE", help="all if absent")
    parser.add_argument("--d-model", type=int, default=D_MODEL, help="width (%(default)s)")
    parser.add_argument("--forward", action="store_true", help="no backward pass")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=5, help="counted repeats of each side a round")
    parser.add_argument("--tiny", action="store_true", help="very small sizes, to see that everything runs")
    parser.add_argument("--alone", action="store_true", help="PyTorch only, as lines of JSON")
    parser.add_argument("--keep-freed-memory", action="store_true", help="the allocator's setting of ours for PyTorch too")
    parser.add_argument("--json", action="store_true", help="lines of JSON instead of the table")
    parser.add_argument("--check", action="store_true", help="PyTorch's contenders beside the formula; times nothing")
    return parser.parse_args()


def main():
    args = arguments()
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    if args.keep_freed_memory:
        keep_freed_memory()
    if args.check:
        check()
        return
    command = None if args.alone else program("moe", "-p emberlm-bench")
    for case in args.cases:
        for backward in [False] if args.forward or case == "one" else [False, True]:
            compare(command, case, backward, args)


if __name__ == "__main__":
    main()
