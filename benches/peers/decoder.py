"""The decoder of `pretrain` in PyTorch: same shapes, same initialisation, same optimizer, same data.

    python decoder.py --preset tiny --steps 1500 --evaluate-at 200,800,1500 --report tiny.json
    python decoder.py --preset small --time-only 20

A byte-level, decoder-only transformer without biases: tied embedding, learned positions, pre-norm
layer norm, exact GELU, `F.scaled_dot_product_attention`. Float32 on the CPU, eager mode. The model
trains on the first nine tenths of the text; the validation loss is the mean over the whole last tenth,
in nats per byte.
"""

import argparse
import json
import math
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

VOCAB_SIZE = 256  # bytes


@dataclass(frozen=True)
class Preset:
    n_layers: int
    d_model: int
    n_heads: int
    d_ff: int
    seq_length: int
    batch_size: int
    learning_rate: float


PRESETS = {
    "tiny": Preset(4, 128, 4, 512, 256, 8, 2e-3),
    "small": Preset(6, 384, 6, 1536, 256, 8, 1e-3),
}


class Attention(nn.Module):
    def __init__(self, preset):
        super().__init__()
        d_model = preset.d_model
        self.n_heads = preset.n_heads
        self.query = nn.Linear(d_model, d_model, bias=False)
        self.key = nn.Linear(d_model, d_model, bias=False)
        self.value = nn.Linear(d_model, d_model, bias=False)
        self.output = nn.Linear(d_model, d_model, bias=False)

    def forward(self, x):
        batch_size, seq_length, d_model = x.shape

        def heads(y):
            return y.view(batch_size, seq_length, self.n_heads, -1).transpose(1, 2)

        query, key, value = heads(self.query(x)), heads(self.key(x)), heads(self.value(x))
        y = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.output(y.transpose(1, 2).reshape(batch_size, seq_length, d_model))


class FeedForward(nn.Module):
    def __init__(self, preset):
        super().__init__()
        self.up = nn.Linear(preset.d_model, preset.d_ff, bias=False)
        self.down = nn.Linear(preset.d_ff, preset.d_model, bias=False)

    def forward(self, x):
        return self.down(F.gelu(self.up(x)))


class Block(nn.Module):
    def __init__(self, preset):
        super().__init__()
        self.mixer_norm = nn.LayerNorm(preset.d_model, eps=1e-5, bias=False)
        self.mixer = Attention(preset)
        self.feed_forward_norm = nn.LayerNorm(preset.d_model, eps=1e-5, bias=False)
        self.feed_forward = FeedForward(preset)

    def forward(self, x):
        x = x + self.mixer(self.mixer_norm(x))
        return x + self.feed_forward(self.feed_forward_norm(x))


class Decoder(nn.Module):
    def __init__(self, preset):
        super().__init__()
        self.tokens = nn.Embedding(VOCAB_SIZE, preset.d_model)
        self.positions = nn.Embedding(preset.seq_length, preset.d_model)
        self.blocks = nn.ModuleList(Block(preset) for _ in range(preset.n_layers))
        self.norm = nn.LayerNorm(preset.d_model, eps=1e-5, bias=False)
        # The projections that write into the residual stream start smaller, as in GPT-2.
        residual_std = 0.02 / math.sqrt(2 * preset.n_layers)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                writes = name.endswith(("mixer.output.weight", "feed_forward.down.weight"))
                nn.init.normal_(parameter, std=residual_std if writes else 0.02)

    def forward(self, tokens):
        x = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return F.linear(self.norm(x), self.tokens.weight)


def loss_of(model, tokens, targets, reduction="mean"):
    return F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten(), reduction=reduction)


def optimizer_of(model, learning_rate):
    linear = [m.weight for m in model.modules() if isinstance(m, nn.Linear)]
    decayed = {id(weight) for weight in linear}
    rest = [p for p in model.parameters() if id(p) not in decayed]
    groups = [{"params": linear, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.99), eps=1e-8)


def learning_rate_at(step, steps, peak):
    """Linear warm-up over 100 steps (a tenth of the run where that is shorter), then a cosine that
    arrives at a tenth of the peak with the last step. Steps count from 1."""
    warm_up = min(100, steps // 10)
    if step <= warm_up:
        return peak * step / warm_up
    progress = (step - warm_up) / (steps - warm_up)
    return peak * (0.1 + 0.9 * 0.5 * (1.0 + math.cos(math.pi * progress)))


def read_text(path):
    """The training part and the validation part of the file's bytes."""
    data = torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8)
    split = len(data) * 9 // 10
    return data[:split], data[split:]


class Trainer:
    def __init__(self, preset, train, steps, learning_rate, seed):
        torch.manual_seed(seed)
        self.model = Decoder(preset)
        self.optimizer = optimizer_of(self.model, learning_rate)
        self.preset, self.train, self.steps, self.peak = preset, train, steps, learning_rate
        self.offsets = torch.Generator().manual_seed(seed)
        self.window = torch.arange(preset.seq_length + 1)

    def step(self, step):
        """One update; returns the loss of its batch, as a tensor."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate_at(step, self.steps, self.peak)
        n_offsets = len(self.train) - self.preset.seq_length
        offsets = torch.randint(n_offsets, (self.preset.batch_size, 1), generator=self.offsets)
        windows = self.train[offsets + self.window].long()
        self.optimizer.zero_grad()
        loss = loss_of(self.model, windows[:, :-1], windows[:, 1:])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        return loss.detach()


@torch.inference_mode()
def validation_loss(model, data, preset):
    """Mean nats per byte over non-overlapping windows: every byte but the first is predicted once."""
    length = preset.seq_length
    n_predicted = len(data) - 1
    whole = n_predicted // length * length
    data = data.long()
    inputs, targets = data[:whole].view(-1, length), data[1 : whole + 1].view(-1, length)
    starts = range(0, len(inputs), preset.batch_size)
    batches = [(inputs[i : i + preset.batch_size], targets[i : i + preset.batch_size]) for i in starts]
    if whole < n_predicted:
        batches.append((data[whole:-1][None], data[whole + 1 :][None]))
    total = torch.zeros((), dtype=torch.float64)
    for tokens, following in batches:
        total += loss_of(model, tokens, following, reduction="sum").double()
    return total.item() / n_predicted


def pretrain(trainer, validation, evaluate_at):
    """Trains and evaluates; returns what the report holds of it."""
    preset = trainer.preset
    evaluations, step_seconds = [], []
    for step in range(1, trainer.steps + 1):
        start = time.perf_counter()
        loss = trainer.step(step)
        step_seconds.append(time.perf_counter() - start)
        if step in evaluate_at:
            start = time.perf_counter()
            held_out = validation_loss(trainer.model, validation, preset)
            seconds = time.perf_counter() - start
            evaluations.append({"step": step, "training_loss": loss.item(), "validation_loss": held_out})
            print(
                f"step {step}: training loss {loss.item():.4f}, "
                f"validation loss {held_out:.4f} nats per byte ({seconds:.1f} s)",
                flush=True,
            )
    # The first two steps also allocate buffers and optimizer state.
    timed = step_seconds[2:]
    n_tokens = preset.batch_size * preset.seq_length
    return {
        "evaluations": evaluations,
        "tokens_per_second": n_tokens * len(timed) / sum(timed) if timed else None,
        "median_step_ms": 1e3 * statistics.median(timed) if timed else None,
        "training_seconds": sum(step_seconds),
    }


def time_steps(trainer, n_steps):
    """Times `n_steps` training steps after two untimed ones."""
    step_seconds = []
    for step in range(1, n_steps + 3):
        start = time.perf_counter()
        trainer.step(step)
        step_seconds.append(time.perf_counter() - start)
    median = statistics.median(step_seconds[2:])
    n_tokens = trainer.preset.batch_size * trainer.preset.seq_length
    return {"timed_steps": n_steps, "median_step_ms": 1e3 * median, "tokens_per_second": n_tokens / median}


def arguments():
    def positive(text):
        value = int(text)
        if value < 1:
            raise argparse.ArgumentTypeError("must be at least 1")
        return value

    def step_list(text):
        return sorted({positive(part) for part in text.split(",")})

    text = Path(__file__).resolve().parent / "../../data/austen.txt"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, default=text, metavar="FILE", help="the corpus, read as bytes")
    parser.add_argument("--preset", choices=PRESETS, default="tiny")
    parser.add_argument("--steps", type=positive, default=1500)
    parser.add_argument("--evaluate-at", type=step_list, metavar="STEPS", help="e.g. 200,800; the last step if absent")
    parser.add_argument("--lr", type=float, help="peak learning rate; the preset's if absent")
    parser.add_argument("--threads", type=positive, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--report", type=Path, metavar="FILE.json")
    parser.add_argument("--time-only", type=positive, metavar="N", help="only time N training steps")
    args = parser.parse_args()
    args.evaluate_at = args.evaluate_at or [args.steps]
    if args.evaluate_at[-1] > args.steps:
        parser.error(f"--evaluate-at {args.evaluate_at[-1]} lies beyond the last step, {args.steps}")
    return args


def main():
    args = arguments()
    torch.set_num_threads(args.threads)
    preset = PRESETS[args.preset]
    learning_rate = preset.learning_rate if args.lr is None else args.lr
    train, validation = read_text(args.text)
    steps = args.time_only + 2 if args.time_only else args.steps
    trainer = Trainer(preset, train, steps, learning_rate, args.seed)
    n_parameters = sum(p.numel() for p in trainer.model.parameters())
    print(f"{args.preset}: {n_parameters} parameters, torch {torch.__version__}, {args.threads} threads", flush=True)

    if args.time_only:
        result = time_steps(trainer, args.time_only)
        print(f"{result['median_step_ms']:.1f} ms per step (median), {result['tokens_per_second']:.0f} tokens/s")
    else:
        result = pretrain(trainer, validation, args.evaluate_at)
        if result["tokens_per_second"] is not None:
            print(f"{result['tokens_per_second']:.0f} tokens/s in training, from the third step on")
    if args.report:
        report = {
            "preset": args.preset,
            "n_parameters": n_parameters,
            "steps": steps,
            "seed": args.seed,
            "learning_rate": learning_rate,
            "threads": args.threads,
            "torch": torch.__version__,
            "training_bytes": len(train),
            "validation_bytes": len(validation),
            **result,
        }
        args.report.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
