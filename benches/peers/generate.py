"""Greedy generation with a key/value cache, batch 1, in EmberLM and in PyTorch: in turn, several rounds.

    cargo build --release --example pretrain --example generate
    head -c 20000 ../../data/austen.txt > some.txt
    ../../target/release/examples/pretrain --preset small --text some.txt --steps 2 --out run-small
    python generate.py --run run-small
    python generate.py --alone                # PyTorch only, with random weights

Both continue the same 16 bytes by 240, with the weights of the run, in float32 with two threads; the time includes the
prompt's pass. Ours is the example `generate`, which writes the text to standard output and ends with this line on
standard error:

    240 tokens in 1.07 s, 225 tokens/s

Prints lines of JSON: tokens per second of each side over the rounds, whether both wrote the same text (where two bytes
score almost alike, rounding decides), and the limit that memory sets, since each new token reads all weights but the
table of positions: the bandwidth of a sum over a large array over the bytes of those weights. Weights that stay in a
cache can pass that limit.
"""

import argparse
import json
import re
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from common import THREADS, load_burn_weights, program, run, timed
from decoder import PRESETS, Decoder

PROMPT = "It is a truth un"
N_NEW = 240


class Cached:
    """A decoder with the keys and values of the positions so far, in tensors allocated once."""

    def __init__(self, model, preset):
        shape = (1, preset.n_heads, preset.seq_length, preset.d_model // preset.n_heads)
        self.model = model
        self.layers = [(block, torch.zeros(shape), torch.zeros(shape)) for block in model.blocks]
        self.length = 0

    def scores(self, tokens):
        """Scores of the token after `tokens`, which follow on those before."""
        start, end = self.length, self.length + len(tokens)
        x = self.model.tokens(tokens)[None] + self.model.positions.weight[start:end]
        for block, keys, values in self.layers:
            x = x + attend(block.mixer, block.mixer_norm(x), keys, values, start, end)
            x = x + block.feed_forward(block.feed_forward_norm(x))
        self.length = end
        return F.linear(self.model.norm(x[0, -1]), self.model.tokens.weight)


def attend(mixer, x, keys, values, start, end):
    def heads(y):
        return y.view(1, end - start, mixer.n_heads, -1).transpose(1, 2)

    keys[:, :, start:end] = heads(mixer.key(x))
    values[:, :, start:end] = heads(mixer.value(x))
    # All of the prompt at once, later one token at a time, which sees everything before it.
    y = F.scaled_dot_product_attention(
        heads(mixer.query(x)), keys[:, :, :end], values[:, :, :end], is_causal=start == 0
    )
    return mixer.output(y.transpose(1, 2).reshape(x.shape))


@torch.inference_mode()
def generate(model, preset):
    """The prompt and its continuation, and the seconds."""
    text = list(PROMPT.encode())
    begin = time.perf_counter()
    cached = Cached(model, preset)
    new = torch.tensor(text)
    for _ in range(N_NEW):
        new = cached.scores(new).argmax(dim=-1, keepdim=True)
        text.append(new.item())
    return bytes(text).decode(errors="replace"), time.perf_counter() - begin


def load(model, folder):
    """Takes the weights of a run."""
    try:
        load_burn_weights(model, folder / "model.safetensors", without=("embedding.", "stack."))
    except RuntimeError:
        sys.exit(f"{folder} is a run of other sizes: give the --preset it was trained with")


def ours(command, folder):
    """Text and tokens per second of our program."""
    options = ["--prompt", PROMPT, "--max-tokens", str(N_NEW), "--greedy"]
    text, errors = run([command, "--run", str(folder), *options])
    found = re.search(r"^(\d+) tokens in [\d.]+ s, (\d+) tokens/s$", errors, re.MULTILINE)
    if not found or int(found.group(1)) != N_NEW:
        sys.exit(f"{command} did not say how long {N_NEW} tokens took:\n{errors.strip()}")
    return text.removesuffix("\n"), float(found.group(2))


def read_bandwidth():
    """Bytes per second of a sum over half a GiB."""
    array = torch.ones(1 << 27)
    return 4 * len(array) / (min(timed(array.sum, 5)) / 1e3)


def speeds(contender, preset, values, **more):
    return {
        "contender": contender,
        "preset": preset,
        "prompt_tokens": len(PROMPT),
        "new_tokens": N_NEW,
        "rounds": len(values),
        "median_tokens_per_second": round(statistics.median(values), 1),
        "min_tokens_per_second": round(min(values), 1),
        "max_tokens_per_second": round(max(values), 1),
        **more,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=["tiny", "small"], default="small")
    parser.add_argument("--run", type=Path, metavar="DIR", help="a run of `pretrain` with that preset")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--alone", action="store_true", help="PyTorch only")
    args = parser.parse_args()
    if not args.run and not args.alone:
        parser.error("give --run DIR, or --alone")
    command = None if args.alone else program("examples/generate", "--example generate")
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    preset = PRESETS[args.preset]
    model = Decoder(preset)
    if args.run:
        load(model, args.run)
    bandwidth = read_bandwidth()
    generate(model, preset)
    here, there, same = [], [], True
    for _ in range(args.rounds):
        if command:
            our_text, speed = ours(command, args.run)
            here.append(speed)
        text, seconds = generate(model, preset)
        there.append(N_NEW / seconds)
        same = same and (not command or our_text == text)
    if command:
        ratio = statistics.median(a / b for a, b in zip(here, there))
        print(json.dumps(speeds("emberlm", args.preset, here, ratio=round(ratio, 2), same_text=same)))
    print(json.dumps(speeds("pytorch", args.preset, there)))
    n_bytes = 4 * (sum(p.numel() for p in model.parameters()) - model.positions.weight.numel())
    limit = {
        "contender": "limit of memory",
        "preset": args.preset,
        "weight_bytes": n_bytes,
        "read_gb_per_s": round(bandwidth / 1e9, 1),
        "tokens_per_second": round(bandwidth / n_bytes, 1),
    }
    print(json.dumps(limit))


if __name__ == "__main__":
    main()
