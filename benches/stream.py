"""Whether writing without an end stays as fast and as small as it began: `generate` with a cache of bounded memory.

    python stream.py --run RUN                                    # 100,000 tokens; a table of 10 rows
    python stream.py --run RUN --tokens 20000 --pattern "window:255:0 | sinks:4"
    python stream.py --run RUN --cache dense                      # what it is without

RUN is a run of `pretrain` on bytes. A row says, for a tenth of the tokens, tokens per second and the resident memory of
the process at its end. The last lines compare the first tenth but one with the last.
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "peers"))
from common import program, THREADS  # noqa: E402


def resident_mib(pid):
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=100_000)
    parser.add_argument("--cache", default="ring")
    parser.add_argument("--pattern", help="instead of what the model was trained with")
    args = parser.parse_args()
    prompt = "It is a truth universally acknowledged"
    command = [program("examples/generate", "--example generate"), "--run", args.run, "--prompt", prompt, "--max-tokens", args.tokens]
    command += ["--cache", args.cache] + (["--pattern", args.pattern] if args.pattern else [])
    environment = {**os.environ, "RAYON_NUM_THREADS": str(THREADS)}
    process = subprocess.Popen([str(word) for word in command], stdout=subprocess.PIPE, env=environment)
    process.stdout.read(len(prompt))
    rows, begin, part = [], time.perf_counter(), args.tokens // 10
    print("   tokens  tokens/s  resident MiB")
    for row in range(10):
        # A byte is a token, but for the few that make a character together.
        left = part
        while left:
            read = process.stdout.read(left)
            if not read:
                sys.exit(f"{command[0]} ended after {row * part + part - left} bytes")
            left -= len(read)
        now = time.perf_counter()
        rows.append((part / (now - begin), resident_mib(process.pid)))
        print(f"{(row + 1) * part:9}{rows[-1][0]:10.1f}{rows[-1][1]:14.1f}", flush=True)
        begin = now
    process.stdout.read()
    process.wait()
    (speed, memory), (last_speed, last_memory) = rows[1], rows[-1]
    print(f"speed of the last tenth over the second: {last_speed / speed:.3f}")
    print(f"memory of the last tenth over the second: {last_memory / memory:.3f}")


if __name__ == "__main__":
    main()
