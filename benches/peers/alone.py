"""One attention of PyTorch alone in a process: the time of forward and backward pass, and the memory at their peak.

    python alone.py --what longformer --length 8192

Prints one line of JSON. `sdpa` is causal `scaled_dot_product_attention`; `longformer` and `bigbird` are Hugging Face's
cores without projections (see `sparse.py`), with a window of 256 on each side and no global tokens, and with blocks of 64
and 3 random ones. 8 heads of 64, batch 1, float32, two threads. The peak is that of resident memory beyond the inputs.
`benches/cost.py --peers` calls it once for each length, so that a peak is its own.
"""

import argparse
import json
import statistics

import torch

import attention
import sparse
from common import THREADS, begin_memory, keep_freed_memory, peak_bytes, timed

CONTENDERS = ["sdpa", "longformer", "bigbird"]


def both_passes(what, length):
    if what == "sdpa":
        return attention.passes(attention.causal, length, True)
    sizes = argparse.Namespace(window=256, globals=0, block=64, random=3)
    contender = {"longformer": sparse.Longformer, "bigbird": sparse.BigBird}[what](length, True, sizes)
    leaves = [leaf for leaf in contender.leaves if leaf.numel() > 0]
    return sparse.passes(contender, leaves, True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--what", choices=CONTENDERS, required=True)
    parser.add_argument("--length", type=int, required=True)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    call = both_passes(args.what, args.length)
    resident = begin_memory()
    call()
    peak = peak_bytes(resident)
    keep_freed_memory()  # As our programs do, for the times.
    times = timed(call, args.repeats)
    print(json.dumps({"median_ms": statistics.median(times), "peak_bytes": peak}))


if __name__ == "__main__":
    main()
