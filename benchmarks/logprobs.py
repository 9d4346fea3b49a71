"""Time and peak memory of completion logprobs and their gradient, in two ways: ours (each prompt once for its group, no
padding, logits for a chunk of tokens at a time) and the naive way (padded rows, log_softmax over all logits). Both get
the same rollout, each in its own process.

    python benchmarks/logprobs.py --model DIR --problems gsm8k/train.jsonl
"""

import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro
from torch.nn.utils.rnn import pad_sequence

sys.path.insert(0, str(Path(__file__).parent.parent))

import common  # noqa: E402
from benchmarks.learning import machine  # noqa: E402
from data import encode_prompts, load_problems  # noqa: E402
from plumbing.evaluation import format_table  # noqa: E402
from plumbing.metrics import peak_memory_gb  # noqa: E402


@dataclass
class Args:
    model: str = "models/tiny-arithmetic"
    """local model directory or hub name"""
    problems: str = "arithmetic"
    """where the prompts come from"""
    prompts: int = 4
    group_size: int = 8
    completion_tokens: int = 64
    """length of every completion; its tokens are random"""
    dtype: str = "float32"
    device: str = "auto"
    way: Literal["both", "ours", "naive"] = "both"
    """both: measure each way in its own process and print the table"""


def naive_logprobs(model, rollout: common.Rollout, rows: list[int]) -> torch.Tensor:
    pairs = [(rollout.prompt_ids[r // rollout.group_size], rollout.completion_ids[r][rollout.mask[r]]) for r in rows]
    ids = pad_sequence([torch.cat([torch.tensor(p).to(c), c]) for p, c in pairs], batch_first=True)
    logprobs = model(ids, use_cache=False).logits.float().log_softmax(-1)[:, :-1]
    logprobs = logprobs.gather(2, ids[:, 1:, None])[..., 0]
    return torch.cat([row[len(p) - 1 : len(p) - 1 + len(c)] for row, (p, c) in zip(logprobs, pairs, strict=True)])


def measure(args: Args) -> None:
    device = common.resolve_device(args.device)
    model = common.load_policy(args.model, device, getattr(torch, args.dtype))
    tokenizer = common.load_tokenizer(args.model)
    problems = load_problems(args.problems, "train")[: args.prompts]
    prompts = encode_prompts(tokenizer, [p.messages or p.question for p in problems])
    torch.manual_seed(0)
    total = args.prompts * args.group_size
    completions = torch.randint(3, len(tokenizer) - 1, (total, args.completion_tokens)).tolist()
    rollout, rows = common.make_rollout(prompts, completions, args.group_size, device), list(range(total))
    times = []
    for _ in range(3):
        model.zero_grad()
        start = time.perf_counter()
        if args.way == "ours":
            logprobs = common.completion_logprobs(model, rollout, rows)[0][rollout.mask]
        else:
            logprobs = naive_logprobs(model, rollout, rows)
        (logprobs.mean()).backward()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    norm = sum(p.grad.double().square().sum() for p in model.parameters() if p.grad is not None).sqrt().item()
    print(min(times[1:]), peak_memory_gb(device), logprobs.mean().item(), norm)


def main(args: Args) -> None:
    if args.way != "both":
        return measure(args)
    rows = []
    for way in ("ours", "naive"):
        command = [sys.executable, __file__, *sys.argv[1:], "--way", way]
        result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        rows.append([way, *map(float, result.stdout.splitlines()[-1].split())])
    rows.append(["ours / naive", *(ours / naive for ours, naive in zip(rows[0][1:], rows[1][1:], strict=True))])
    print(f"{args.model}, {args.dtype}, {args.prompts} x {args.group_size} x {args.completion_tokens}\n{machine()}\n")
    print(format_table(["forward and backward", "seconds", "peak GB", "mean logprob", "gradient norm"], rows))


if __name__ == "__main__":
    main(tyro.cli(Args))
