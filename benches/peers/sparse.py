"""Sparse attention of EmberLM and of PyTorch beside each other: in turn, several rounds, medians and ratios.

    cargo build --release -p emberlm-bench
    python sparse.py                          # Longformer at 8192, BigBird at 4096 and 8192
    python sparse.py --what bigbird --lengths 4096 --keep-freed-memory
    python sparse.py --check                  # PyTorch's contenders beside dense attention, on a small case; seconds

Beside ours stand Hugging Face's LongformerSelfAttention and BigBirdBlockSparseAttention, forward alone and both passes,
and compiled FlexAttention with the same mask, forward alone: it has no backward pass on CPUs. 8 heads of 64, batch 1,
float32, two threads.

A layer is measured whole, with its projections, or its core without them. Whole: theirs ends with a linear layer, which
Hugging Face has in another module and ours in the same. Core: what would be projected is given, for BigBird query, key and
value, for Longformer these twice, and gets the gradients. Longformer divides its queries in place, so a copy is made for
it, as small a part of its time as a projection without products. The loss is the sum of the outputs by fixed weights.

BigBird draws its random blocks anew in each forward pass of training, from the same seed and so the same ones. Ours gets
them as a plan, and FlexAttention as a mask. Hugging Face's also writes all weights, the hidden ones too, into a tensor
[1, heads, length, length] that nobody reads; that is its time as released.

Ours compiles its patterns anew in each call of a layer or a core. Beside FlexAttention with Longformer's mask it does so
once before, as `create_block_mask` is called once before; that attention has one projection for all tokens.
"""

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from attention import compiled_flex
from common import THREADS, in_turn, keep_freed_memory, last_json, program, timed

HEADS, D_HEAD = 8, 64
D_MODEL = HEADS * D_HEAD
KINDS = ["longformer", "bigbird", "flex"]


def uniform(*shape):
    return torch.rand(*shape) * 2 - 1


def split(x):
    """[batch, length, width] to [batch, heads, length, width of a head]."""
    return x.unflatten(-1, (HEADS, D_HEAD)).transpose(1, 2)


class Given(nn.Module):
    """In the place of a projection: what it would have given."""

    def __init__(self, projected, copied=False):
        super().__init__()
        self.projected, self.copied = projected, copied

    def forward(self, _):
        return self.projected.clone() if self.copied else self.projected


class Longformer:
    """Hugging Face's, where the first positions are global. `leaves` get gradients."""

    def __init__(self, length, core, args):
        from transformers import LongformerConfig
        from transformers.models.longformer.modeling_longformer import LongformerSelfAttention

        config = LongformerConfig(
            hidden_size=D_MODEL,
            num_attention_heads=HEADS,
            attention_window=[2 * args.window],
            attention_probs_dropout_prob=0.0,
        )
        self.attention = LongformerSelfAttention(config, 0)
        self.x = uniform(1, length, D_MODEL)
        # As LongformerModel passes it: 0 is local.
        mask = torch.zeros(1, length)
        mask[:, : args.globals] = 10_000.0
        self.masks = {
            "attention_mask": mask,
            "is_index_masked": mask < 0,
            "is_index_global_attn": mask > 0,
            "is_global_attn": args.globals > 0,
        }
        self.output = None if core else nn.Linear(D_MODEL, D_MODEL)
        if core:
            n_rows = [length, length, length, args.globals, length, length]
            self.leaves = [uniform(n, 1, D_MODEL) for n in n_rows]
            names = ["query", "key", "value", "query_global", "key_global", "value_global"]
            for name, leaf in zip(names, self.leaves):
                setattr(self.attention, name, Given(leaf, copied=name.startswith("query")))
        else:
            self.leaves = [self.x, *self.attention.parameters(), *self.output.parameters()]

    def __call__(self):
        y = self.attention(self.x, **self.masks)[0]
        return y if self.output is None else self.output(y)

    def dense(self):
        """The core as dense attention."""
        query, key, value, *of_global = [split(leaf.transpose(0, 1)) for leaf in self.leaves]
        length, n_globals = query.shape[2], of_global[0].shape[2]
        rows = torch.arange(length)
        y = F.scaled_dot_product_attention(query, key, value, attn_mask=self.visible(0, 0, rows[:, None], rows[None, :]))
        y[:, :, :n_globals] = F.scaled_dot_product_attention(*of_global)
        return y.transpose(1, 2).flatten(-2)

    @property
    def visible(self):
        return window_and_globals(self.attention.one_sided_attn_window_size, self.masks["is_index_global_attn"].sum().item())


class BigBird:
    """Hugging Face's, in training. `leaves` get gradients."""

    def __init__(self, length, core, args):
        from transformers import BigBirdConfig
        from transformers.models.big_bird.modeling_big_bird import BigBirdBlockSparseAttention, BigBirdModel

        config = BigBirdConfig(
            hidden_size=D_MODEL,
            num_attention_heads=HEADS,
            block_size=args.block,
            num_random_blocks=args.random,
            max_position_embeddings=length,
        )
        self.attention = BigBirdBlockSparseAttention(config, seed=0).train()
        self.x = uniform(1, length, D_MODEL)
        blocked, band, from_mask, to_mask = BigBirdModel.create_masks_for_block_sparse_attn(
            torch.ones(1, length), args.block
        )
        self.masks = {
            "band_mask": band,
            "from_mask": from_mask,
            "to_mask": to_mask,
            "from_blocked_mask": blocked,
            "to_blocked_mask": blocked,
        }
        self.output = None if core else nn.Linear(D_MODEL, D_MODEL)
        if core:
            self.leaves = [uniform(1, length, D_MODEL) for _ in range(3)]
            for name, leaf in zip(["query", "key", "value"], self.leaves):
                setattr(self.attention, name, Given(leaf))
        else:
            self.leaves = [self.x, *self.attention.parameters(), *self.output.parameters()]

    def __call__(self):
        y = self.attention(self.x, **self.masks)[0]
        return y if self.output is None else self.output(y)

    def plan(self):
        """The random blocks of its forward pass, [heads, query blocks but the first and the last, key blocks]."""
        drawn = []
        make_mask = self.attention._create_rand_mask_from_inputs

        def look(from_mask, to_mask, rand_attn, *others):
            drawn.append(rand_attn[0])
            return make_mask(from_mask, to_mask, rand_attn, *others)

        self.attention._create_rand_mask_from_inputs = look
        with torch.no_grad():
            self()
        del self.attention._create_rand_mask_from_inputs
        return drawn[0]

    def dense(self):
        """The core as dense attention."""
        size = self.attention.block_size
        mask = block_table(self.plan()).repeat_interleave(size, 1).repeat_interleave(size, 2)
        query, key, value = map(split, self.leaves)
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2).flatten(-2)


def window_and_globals(window, n_globals):
    """A mask function: neighbours on each side, and the first positions, which see all and which all see."""
    return lambda b, h, i, j: ((i - j).abs() <= window) | (i < n_globals) | (j < n_globals)


def block_table(plan):
    """Which key blocks BigBird's query blocks see: [heads, blocks, blocks]."""
    n_heads, n_inner, _ = plan.shape
    n_blocks = n_inner + 2
    table = torch.zeros(n_heads, n_blocks, n_blocks, dtype=torch.bool)
    table[:, 1:-1].scatter_(2, plan, True)
    rows = torch.arange(n_blocks)
    table |= (rows[:, None] - rows[None, :]).abs() <= 1
    table[:, [0, -1]] = True
    table[:, :, [0, -1]] = True
    return table


def longformer_mask(length, args):
    from torch.nn.attention.flex_attention import create_block_mask

    visible = window_and_globals(args.window, args.globals)
    return create_block_mask(visible, None, None, length, length, device="cpu")


def bigbird_mask(plan, block):
    """What `create_block_mask` would make of BigBird's mask, without the memory of [heads, length, length]."""
    from torch.nn.attention.flex_attention import BlockMask

    table = block_table(plan)[None]
    n_full = table.sum(-1, dtype=torch.int32)
    full = table.int().argsort(dim=-1, descending=True, stable=True).int()
    visible = lambda b, h, i, j: table[0, h, i // block, j // block]
    none = torch.zeros_like(n_full), torch.zeros_like(full)
    return BlockMask.from_kv_blocks(*none, n_full, full, BLOCK_SIZE=block, mask_mod=visible)


def n_visible(mask, length):
    """Pairs that a block mask shows, of all heads: those of its function in the blocks that are visited."""
    blocks, (size, _) = mask.to_dense()[0].bool(), mask.BLOCK_SIZE
    rows = torch.arange(length)
    total = 0
    for head in range(HEADS):
        visited = blocks[head % len(blocks)].repeat_interleave(size, 0).repeat_interleave(size, 1)
        pairs = mask.mask_mod(0, head, rows[:, None], rows[None, :])
        total += (visited[:length, :length] & pairs).sum().item()
    return total


def passes(call, leaves, backward):
    """A function that runs the forward pass, or both."""
    if not backward:

        def forward():
            with torch.no_grad():
                call()

        return forward
    leaves = [leaf.requires_grad_() for leaf in leaves]
    with torch.no_grad():
        weight = torch.rand_like(call())

    def both():
        # Without global tokens some projections are not used.
        torch.autograd.grad((call() * weight).sum(), leaves, allow_unused=True)

    return both


def longformer_cases(length, args, _):
    options = ["--module", "longformer", "--length", str(length)]
    options += ["--window", str(args.window), "--globals", str(args.globals)]
    for core in (True, False):
        peer = Longformer(length, core, args)
        yield from layer_cases("Longformer", peer, core, ["sparse", *options])


def bigbird_options(length, args, folder):
    """The random blocks, and the program of ours that attends with them."""
    plan = BigBird(length, True, args).plan()
    path = folder / f"plan-{length}.json"
    path.write_text(json.dumps(plan.tolist()))
    options = ["--module", "bigbird", "--length", str(length), "--block", str(args.block), "--plan", str(path)]
    return plan, ["sparse", *options]


def bigbird_cases(length, args, folder):
    _, command = bigbird_options(length, args, folder)
    for core in (True, False):
        yield from layer_cases("BigBird", BigBird(length, core, args), core, command)


def layer_cases(name, peer, core, command):
    for backward in (False, True):
        options = [*(["--core"] if core else []), *(["--backward"] if backward else [])]
        yield f"{name} {'core' if core else 'whole'}", backward, [*command, *options], passes(peer, peer.leaves, backward)


def flex_cases(length, args, folder):
    """Forward alone, where the mask shows as many pairs as ours."""
    heads = [uniform(1, HEADS, length, D_HEAD) for _ in range(3)]
    cases = []
    if length in args.longformer_lengths:
        pattern = f"window:{args.window} | global:..{args.globals}"
        command = ["attention", "--pattern", pattern, "--seq", str(length)]
        cases.append(("FlexAttention, Longformer's mask", command, longformer_mask(length, args)))
    if length in args.bigbird_lengths:
        plan, command = bigbird_options(length, args, folder)
        cases.append(("FlexAttention, BigBird's mask", [*command, "--core"], bigbird_mask(plan, args.block)))
    for name, command, mask in cases:
        pairs, expected = n_visible(mask, length), ours(command, 1)["n_visible"]
        if pairs != expected:
            sys.exit(f"{name} at {length} shows {pairs} pairs, ours {expected}")
        attend = compiled_flex(mask)
        yield name, False, command, passes(lambda: attend(*heads), heads, False)


def ours(command, repeats):
    name, *arguments = command
    return last_json([program(name, "-p emberlm-bench"), "--json", "--repeats", str(repeats), *arguments])


def compare(case, length, args):
    name, backward, command, run = case
    measured = []

    def here():
        measured.append(ours(command, args.repeats))
        return measured[-1]["median_ms"]

    mine, theirs, ratio = in_turn(here, lambda: statistics.median(timed(run, args.repeats)), args.rounds)
    figures = {
        "peer": name,
        "length": length,
        "backward": backward,
        "emberlm_ms": round(mine, 2),
        "peer_ms": round(theirs, 2),
        "ratio": round(ratio, 2),
        "n_visible": measured[0]["n_visible"],
        "emberlm_gflops": round(statistics.median(one["gflops"] for one in measured), 1),
        "emberlm_peak_bytes": max(one["peak_bytes"] for one in measured),
    }
    if args.json:
        print(json.dumps(figures), flush=True)
        return
    both = "forward and backward" if backward else "forward"
    print(
        f"{name:<32} {length:>6} {both:<20} {mine:>9.2f} ms {figures['emberlm_gflops']:>6.1f} GFLOP/s, PyTorch "
        f"{theirs:>9.2f} ms: {ratio:.2f} times as fast",
        flush=True,
    )


def check():
    """Every contender of PyTorch equals dense attention: the largest difference of outputs."""
    length = 1536
    args = argparse.Namespace(window=64, globals=16, block=64, random=3)
    for contender in (Longformer, BigBird):
        core = contender(length, True, args)
        with torch.no_grad():
            report_difference(f"{contender.__name__} core", core(), core.dense())
    query, key, value = (uniform(1, HEADS, length, D_HEAD) for _ in range(3))
    rows = torch.arange(length)
    for name, mask in [
        ("Longformer's mask", longformer_mask(length, args)),
        ("BigBird's mask", bigbird_mask(BigBird(length, True, args).plan(), args.block)),
    ]:
        dense = torch.stack([mask.mask_mod(0, head, rows[:, None], rows[None, :]) for head in torch.arange(HEADS)])
        with torch.no_grad():
            flex = compiled_flex(mask)(query, key, value)
            expected = F.scaled_dot_product_attention(query, key, value, attn_mask=dense)
        report_difference(f"FlexAttention, {name}", flex, expected)


def report_difference(name, y, expected):
    difference = (y - expected).abs().max().item()
    print(f"{name}: largest difference {difference:.1e}")
    if not difference < 1e-5:
        sys.exit(f"{name} does not give what dense attention gives")


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    numbers = lambda text: [int(x) for x in text.split(",")]
    parser.add_argument("--what", type=lambda text: text.split(","), default=KINDS, help=",".join(KINDS))
    parser.add_argument("--lengths", type=numbers, metavar="N,N", help="8192 for Longformer; 4096,8192 for BigBird")
    parser.add_argument("--window", type=int, default=256, help="of Longformer, on each side (%(default)s)")
    parser.add_argument("--globals", type=int, default=16, help="of Longformer: the first positions (%(default)s)")
    parser.add_argument("--block", type=int, default=64, help="of BigBird (%(default)s)")
    parser.add_argument("--random", type=int, default=3, help="of BigBird: blocks a query block (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=5, help="counted repeats of each side a round")
    parser.add_argument("--keep-freed-memory", action="store_true", help="the allocator's setting of ours for PyTorch too")
    parser.add_argument("--json", action="store_true", help="lines of JSON instead of the table")
    parser.add_argument("--check", action="store_true", help="PyTorch's contenders beside dense attention; times nothing")
    args = parser.parse_args()
    if unknown := [what for what in args.what if what not in KINDS]:
        parser.error(f"--what: no {unknown[0]} among {', '.join(KINDS)}")
    args.longformer_lengths, args.bigbird_lengths = args.lengths or [8192], args.lengths or [4096, 8192]
    if any(length % (2 * args.window) for length in args.longformer_lengths):
        parser.error(f"Longformer's lengths are multiples of {2 * args.window}, twice the window")
    if any(length % args.block or length < 8 * args.block for length in args.bigbird_lengths):
        parser.error("BigBird's lengths are multiples of its block, and eight of them at least")
    return args


def main():
    args = arguments()
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    if args.keep_freed_memory:
        keep_freed_memory()
    if args.check:
        check()
        return
    cases = {
        "longformer": (longformer_cases, args.longformer_lengths),
        "bigbird": (bigbird_cases, args.bigbird_lengths),
        "flex": (flex_cases, sorted({*args.longformer_lengths, *args.bigbird_lengths})),
    }
    with tempfile.TemporaryDirectory() as folder:
        for make, lengths in (cases[what] for what in args.what):
            for length in lengths:
                for case in make(length, args, Path(folder)):
                    compare(case, length, args)


if __name__ == "__main__":
    main()
