"""Attention of EmberLM and of PyTorch beside each other: in turn, several rounds, medians and ratios.

    cargo build --release -p emberlm-bench
    python attention.py                       # causal, lengths 512 to 8192
    python attention.py --what window         # a window of 256 on each side, length 8192

Each line of the table is also printed as JSON with --json. Both run with two threads, 8 heads of 64, batch 1, in
float32: its fused scaled_dot_product_attention for causal attention; for the window the same with a dense mask, compiled
FlexAttention (forward alone: it has no backward on CPUs) and, where transformers is installed, the attention core of
Hugging Face's Longformer with identity projections.
"""

import argparse
import json
import statistics
import sys

import torch
import torch.nn.functional as F

from common import THREADS, in_turn, last_json, program, timed

HEADS, WIDTH, WINDOW = 8, 64, 256


def ours(command, pattern, length, backward, repeats):
    arguments = ["--json", "--pattern", pattern, "--seq", str(length), "--repeats", str(repeats)]
    return last_json([command, *arguments, *(["--backward"] if backward else [])])["median_ms"]


def inputs(length):
    torch.manual_seed(0)
    return [torch.rand(1, HEADS, length, WIDTH) * 2 - 1 for _ in range(3)]


def passes(attend, length, backward):
    """A function that runs the forward pass, or both."""
    query, key, value = inputs(length)
    if not backward:

        def forward():
            with torch.no_grad():
                attend(query, key, value)

        return forward
    leaves = [x.requires_grad_() for x in (query, key, value)]
    weight = torch.rand(1, HEADS, length, WIDTH)

    def both():
        torch.autograd.grad((attend(*leaves) * weight).sum(), leaves)

    return both


def causal(query, key, value):
    return F.scaled_dot_product_attention(query, key, value, is_causal=True)


def dense_window(length):
    i = torch.arange(length)
    mask = (i[:, None] - i[None, :]).abs() <= WINDOW
    return lambda query, key, value: F.scaled_dot_product_attention(query, key, value, attn_mask=mask)


def compiled_flex(mask):
    """FlexAttention of a mask, compiled. It has no backward pass on CPUs, and is slow ever after one was tried."""
    from torch.nn.attention.flex_attention import flex_attention

    # With sizes as variables, which a second mask in one process asks for, PyTorch 2.15 writes C++ that does not compile.
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda query, key, value: compiled(query, key, value, block_mask=mask)


def flex_window(length):
    from torch.nn.attention.flex_attention import create_block_mask

    near = lambda b, h, i, j: (i - j).abs() <= WINDOW
    return compiled_flex(create_block_mask(near, None, None, length, length, device="cpu"))


def longformer_core(length):
    from transformers import LongformerConfig
    from transformers.models.longformer.modeling_longformer import LongformerSelfAttention

    config = LongformerConfig(
        hidden_size=HEADS * WIDTH,
        num_attention_heads=HEADS,
        attention_window=[2 * WINDOW],
        attention_probs_dropout_prob=0.0,
    )
    module = LongformerSelfAttention(config, 0)
    module.query = module.key = module.value = torch.nn.Identity()
    nobody = torch.zeros(1, length)

    def attend(query, key, value):
        # It projects one input itself; the query's values stand for all three, which costs the same.
        hidden = query.transpose(1, 2).reshape(1, length, HEADS * WIDTH)
        out = module(
            hidden,
            attention_mask=nobody,
            is_index_masked=nobody < 0,
            is_index_global_attn=nobody > 0,
            is_global_attn=False,
        )[0]
        return out.reshape(1, length, HEADS, WIDTH).transpose(1, 2) + 0 * (key + value)

    return attend


def cases(what, lengths):
    """(name, pattern, length, backward, function that makes the peer)"""
    if what == "causal":
        for length in lengths or [512, 1024, 2048, 4096, 8192]:
            for backward in (False, True):
                yield "SDPA", "causal", length, backward, lambda length: causal
        return
    for length in lengths or [8192]:
        for backward in (False, True):
            yield "SDPA, dense mask", f"window:{WINDOW}", length, backward, dense_window
        yield "FlexAttention", f"window:{WINDOW}", length, False, flex_window
        try:
            import transformers  # noqa: F401
        except ImportError:
            print("transformers is not installed: Longformer is left out", file=sys.stderr)
            continue
        for backward in (False, True):
            yield "Longformer core", f"window:{WINDOW}", length, backward, longformer_core


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--what", choices=["causal", "window"], default="causal")
    parser.add_argument("--lengths", type=lambda text: [int(x) for x in text.split(",")])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=5, help="counted repeats of each side a round")
    parser.add_argument("--json", action="store_true", help="lines of JSON instead of the table")
    args = parser.parse_args()
    command = program("attention", "-p emberlm-bench")
    torch.set_num_threads(THREADS)
    for name, pattern, length, backward, make in cases(args.what, args.lengths):
        peer = passes(make(length), length, backward)
        here, there, ratio = in_turn(
            lambda: ours(command, pattern, length, backward, args.repeats),
            lambda: statistics.median(timed(peer, args.repeats)),
            args.rounds,
        )
        figures = {
            "pattern": pattern,
            "length": length,
            "backward": backward,
            "peer": name,
            "emberlm_ms": round(here, 2),
            "peer_ms": round(there, 2),
            "ratio": round(ratio, 2),
        }
        if args.json:
            print(json.dumps(figures), flush=True)
        else:
            both = "forward and backward" if backward else "forward"
            print(
                f"{pattern:<11} {length:>5} {both:<21} {figures['emberlm_ms']:>9.2f} ms, {name} "
                f"{figures['peer_ms']:.2f} ms: {ratio:.2f} times as fast",
                flush=True,
            )


if __name__ == "__main__":
    main()
