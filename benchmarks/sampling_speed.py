"""`sample_groups` against Hugging Face's `generate`: tokens per second on the same prompts, group size and limits.

    python benchmarks/sampling_speed.py --model DIR --problems gsm8k/train.jsonl             # float32
    python benchmarks/sampling_speed.py --model DIR --problems gsm8k/train.jsonl --dtype bfloat16

Tokens that a row computes after its EOS don't count. `generate` runs twice: with its defaults, and with the float32
matmul precision that our code sets on a CPU (see common.load_weights), so that this effect can be told apart. The three
take turns; a first round warms up, and the median of the others counts.
"""

import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
import tyro
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parent.parent))

import common  # noqa: E402
from benchmarks.learning import machine  # noqa: E402
from benchmarks.memory import cache_bytes  # noqa: E402
from data import encode_prompts, load_problems  # noqa: E402
from plumbing.evaluation import format_table  # noqa: E402


@dataclass
class Args:
    model: str = "models/tiny-arithmetic"
    """local model directory or hub name"""
    problems: str = "arithmetic"
    """where the prompts come from"""
    prompts: int = 8
    """number of prompts, the first ones"""
    group_size: int = 8
    lengths: list[int] = field(default_factory=lambda: [64, 128])
    """limits on new tokens, one table row each"""
    dtype: str = "float32"
    device: str = "auto"
    rounds: int = 3
    profile: bool = False
    """print instead the operations that take most of our sampling's time, at the first of --lengths"""


def seconds(run, device: torch.device) -> tuple[float, int]:
    """Seconds of one call, and the number of useful tokens that it returned."""
    start = time.perf_counter()
    tokens = run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start, tokens


def speeds(ours, stock, prompts: list[list[int]], group_size: int, limit: int, rounds: int) -> list[float]:
    """Median useful tokens per second: ours, `generate` with its defaults, `generate` with our precision."""
    device, our_precision = ours.device, torch.get_float32_matmul_precision()
    eos = torch.tensor(ours.generation_config.eos_token_id, device=device)
    longest = max(map(len, prompts))
    padded = torch.tensor([[0] * (longest - len(p)) + p for p in prompts], device=device)
    attention = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)

    def run_ours(round: int) -> int:
        torch.set_float32_matmul_precision(our_precision)
        return int(common.sample_groups(ours, prompts, group_size, limit, seed=round).mask.sum())

    def run_generate(round: int, precision: str) -> int:
        torch.set_float32_matmul_precision(precision)
        torch.manual_seed(round)
        ids = stock.generate(
            padded,
            attention_mask=attention,
            do_sample=True,
            temperature=1.0,
            top_k=0,  # plain softmax, as ours; the default 50 would sort the vocabulary
            max_new_tokens=limit,
            num_return_sequences=group_size,
            eos_token_id=eos.tolist(),
            pad_token_id=0,
        )[:, longest:]
        ended = torch.isin(ids, eos).cumsum(1)
        return int(((ended == 0) | ((ended == 1) & torch.isin(ids, eos))).sum())

    runs = [run_ours, lambda round: run_generate(round, "highest"), lambda round: run_generate(round, our_precision)]
    found: list[list[float]] = [[] for _ in runs]
    for round in range(rounds + 1):
        for values, run in zip(found, runs, strict=True):
            taken, tokens = seconds(lambda run=run, round=round: run(round), device)
            if round > 0:
                values.append(tokens / taken)
    torch.set_float32_matmul_precision(our_precision)
    return [statistics.median(values) for values in found]


def main(args: Args) -> None:
    device = common.resolve_device(args.device)
    dtype = getattr(torch, args.dtype)
    tokenizer = common.load_tokenizer(args.model)
    problems = load_problems(args.problems, "train")[: args.prompts]
    prompts = encode_prompts(tokenizer, [p.messages or p.question for p in problems])
    stock = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype).to(device).eval()
    ours = common.load_policy(args.model, device, dtype, tokenizer.eos_token_id)
    if args.profile:
        print(f"{args.model}, {args.dtype}, {args.prompts} x {args.group_size} x {args.lengths[0]}\n{machine()}\n")
        print(profile(ours, prompts, args.group_size, args.lengths[0]))
        return
    rows = []
    for limit in args.lengths:
        medians = speeds(ours, stock, prompts, args.group_size, limit, args.rounds)
        row = [f"{args.prompts} x {args.group_size} x {limit}", *(f"{m:.0f}" for m in medians)]
        row += [f"{medians[0] / m:.2f}" for m in medians[1:]]
        if device.type == "cuda":
            row.append(f"{floor(ours, prompts, args.group_size, limit) * medians[0]:.2f}")
        rows.append(row)
    header = ["useful tokens/s", "ours", "generate", "with our precision", "ours/generate", "ours/with precision"]
    header += ["of the bandwidth floor"] * (device.type == "cuda")
    tokens = f"prompts of {min(map(len, prompts))} to {max(map(len, prompts))} tokens"
    print(f"{args.model}, {args.dtype}, {tokens}\n{machine()}\n")
    print(format_table(header, rows))


def profile(model, prompts: list[list[int]], group_size: int, limit: int) -> str:
    """A table of operations by their own time, without their callees', measured in a second, warm run."""
    common.sample_groups(model, prompts, group_size, limit)
    with torch.profiler.profile() as profiler:
        common.sample_groups(model, prompts, group_size, limit, seed=1)
    cuda = model.device.type == "cuda"
    times = {e.key: e.self_device_time_total if cuda else e.self_cpu_time_total for e in profiler.key_averages()}
    whole = sum(times.values())
    calls = {e.key: e.count for e in profiler.key_averages()}
    largest = sorted(times, key=times.get, reverse=True)[:14]
    rows = [[name[:60], calls[name], f"{times[name] / 1e6:.2f}", f"{times[name] / whole:.0%}"] for name in largest]
    return format_table(["operation", "calls", "seconds", "share"], [*rows, ["all", "", f"{whole / 1e6:.2f}", "100%"]])


def floor(model, prompts: list[list[int]], group_size: int, limit: int) -> float:
    """A lower bound on seconds per token: every step reads all weights, the prompts' cache and, on average, half of the
    completions' cache, at the bandwidth that a copy reaches on this GPU."""
    source = torch.empty(2**30, dtype=torch.uint8, device=model.device)
    target = torch.empty_like(source)
    times = [seconds(lambda: target.copy_(source), model.device)[0] for _ in range(6)]
    bandwidth = 2 * source.numel() / min(times[1:])
    cached = sum(map(len, prompts)) + len(prompts) * group_size * limit / 2
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    if not model.config.tie_word_embeddings:  # input embeddings are only looked up
        weights -= model.get_input_embeddings().weight.numel() * model.dtype.itemsize
    read = weights + cached * cache_bytes(model.config, model.dtype)
    return read / bandwidth / (len(prompts) * group_size)


if __name__ == "__main__":
    main(tyro.cli(Args))
