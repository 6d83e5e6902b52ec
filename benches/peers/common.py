"""What the scripts of this folder share: the workspace's programs, and the memory that a process uses."""

import ctypes
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
TARGET = Path(os.environ.get("CARGO_TARGET_DIR", HERE.parent.parent / "target"))
THREADS = 2


def program(name, build):
    """The path of a program of the workspace; without it the script ends and says how to build it."""
    path = TARGET / "release" / name
    if not path.exists():
        sys.exit(f"{path} does not exist: run cargo build --release {build} first")
    return str(path)


def run(command):
    """What a command writes, as (output, errors); if it fails, the script ends with its errors."""
    two_threads = {**os.environ, "RAYON_NUM_THREADS": str(THREADS)}
    done = subprocess.run(command, capture_output=True, env=two_threads)
    output, errors = (text.decode(errors="replace") for text in (done.stdout, done.stderr))
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)} failed:\n{errors.strip()}")
    return output, errors


def last_json(command):
    """The last line that a command prints, which is JSON."""
    return json.loads(run(command)[0].splitlines()[-1])


def timed(call, repeats):
    """The milliseconds of each call, after two that do not count; for 0.3 seconds at least, as our programs do."""
    times, start = [], time.perf_counter()
    while len(times) < repeats + 2 or time.perf_counter() - start < 0.3:
        begin = time.perf_counter()
        call()
        times.append((time.perf_counter() - begin) * 1e3)
    return times[2:]


def in_turn(ours, theirs, rounds):
    """The median milliseconds of two sides that take turns, each a function that gives them, and the median ratio."""
    here, there = [], []
    for _ in range(rounds):
        here.append(ours())
        there.append(theirs())
    return statistics.median(here), statistics.median(there), statistics.median(b / a for a, b in zip(here, there))


def burn_names(model):
    """By name of our parameter: Burn's name of it, and whether Burn keeps it transposed."""
    from torch import nn

    norms = (nn.LayerNorm, nn.RMSNorm)
    names = {}
    for path, module in model.named_modules():
        for own, _ in module.named_parameters(recurse=False):
            theirs = {"weight": "gamma", "bias": "beta"}[own] if isinstance(module, norms) else own
            names[f"{path}.{own}"] = (f"{path}.{theirs}", isinstance(module, nn.Linear) and own == "weight")
    return names


def load_burn_weights(model, path, without=()):
    """Takes weights from a safetensors file with Burn's names and layout; RuntimeError if they are another model's.

    `without` are beginnings of names that the model here has not.
    """
    from safetensors.torch import load_file

    def short(name):
        return next((name.removeprefix(part) for part in without if name.startswith(part)), name)

    tensors, names = {short(name): tensor for name, tensor in load_file(path).items()}, burn_names(model)
    if tensors.keys() != {theirs for theirs, _ in names.values()}:
        raise RuntimeError(f"{path}: the names are those of another model")
    model.load_state_dict(
        {ours: tensors[theirs].t() if transposed else tensors[theirs] for ours, (theirs, transposed) in names.items()}
    )


def save_burn_weights(model, path):
    """Writes what `load_burn_weights` reads."""
    from safetensors.torch import save_file

    names = burn_names(model)
    save_file(
        {
            theirs: (parameter.t() if transposed else parameter).detach().contiguous()
            for parameter, (theirs, transposed) in ((model.get_parameter(ours), to) for ours, to in names.items())
        },
        path,
    )


def keep_freed_memory():
    """Makes the C library keep freed memory for the next allocations, as our programs do; glibc only."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        sys.exit("--keep-freed-memory: this C library has no mallopt")
    mallopt(-4, 0)  # M_MMAP_MAX
    mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def median_of(rounds, key):
    """The median of a figure over rounds; None where one of them lacks it."""
    values = [figures[key] for figures in rounds]
    return None if None in values else statistics.median(values)


def status_bytes(field):
    """VmRSS, what is resident now, or VmHWM, the most that was; None where the system does not tell."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":")), None)


def begin_memory():
    """Gives free memory back to the system, begins a new high-water mark and returns what is resident."""
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError, TypeError):
        pass  # No glibc: what the allocator keeps counts as resident.
    resident = status_bytes("VmRSS")
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass  # Not allowed: the mark is that of the whole process.
    return resident


def peak_bytes(resident):
    """The high-water mark less what was resident when `begin_memory` returned it."""
    peak = status_bytes("VmHWM")
    return None if resident is None or peak is None else max(0, peak - resident)
