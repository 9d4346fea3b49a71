"""Speed on a real model, against other implementations: of sampling, of logprobs, and of a whole GRPO step.

    pip install -r requirements-dev.txt                                                      # step needs TRL
    python benchmarks/speed.py sampling --model DIR --problems gsm8k/train.jsonl             # float32
    python benchmarks/speed.py sampling --model DIR --problems gsm8k/train.jsonl --dtype bfloat16
    python benchmarks/speed.py logprobs --model DIR --problems gsm8k/train.jsonl
    python benchmarks/speed.py step --model DIR --problems gsm8k/train.jsonl

sampling: `sample_groups` against Hugging Face's `generate`, tokens per second on the same prompts, group size and
limits. Tokens that a row computes after its EOS don't count. `generate` runs twice: with its defaults, and with the
float32 matmul precision that our code sets on a CPU (see common.resolve_device), so that this effect can be told apart.
The three take turns; a first round warms up, and the median of the others counts.

logprobs: time and peak memory of completion logprobs and their gradient, in two ways: ours (each prompt once for its
group, no padding, logits for a chunk of tokens at a time) and the naive way (padded rows, log_softmax over all logits).
Both get the same rollout, each in its own process.

step: one whole GRPO step, from sampling to optimizer, here and in TRL's GRPOTrainer: same model, prompts, group size,
length limit and one float32 optimizer step, each in its own process. Seconds are the median of all steps but the first.
TRL runs with its defaults except for the precision, which by default is mixed bfloat16. Gradient checkpointing, which
trades time for memory, is on by default in TRL and off in ours, so each side also runs with the other's setting. TRL
runs once more with the matmul precision that our code sets on a CPU.
"""

import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
import tyro
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parent.parent))

import common  # noqa: E402
import rewards  # noqa: E402
import train_grpo  # noqa: E402
from benchmarks.learning import machine, read_scalars  # noqa: E402
from benchmarks.memory import cache_bytes  # noqa: E402
from data import as_dicts, encode_prompts, load_problems  # noqa: E402
from plumbing.flags import SYSTEM_PROMPT, from_flat  # noqa: E402
from plumbing.logs import peak_memory_gb  # noqa: E402
from plumbing.statistics import format_table  # noqa: E402

CHECKPOINTING = "gradient checkpointing"
WAYS = "ours", "trl", "trl, our precision", f"trl, no {CHECKPOINTING}", f"ours, {CHECKPOINTING}"


@dataclass
class Shared:
    model: str = "models/tiny-arithmetic"
    """local model directory or hub name"""
    problems: str = "arithmetic"
    """where the prompts come from: a .jsonl file of problems, or "arithmetic\""""
    prompts: int = 4
    """number of prompts, from the first on (step: in each step)"""
    group_size: int = 8


@dataclass
class Sampling(Shared):
    """`sample_groups` against `generate`"""

    prompts: int = 8
    lengths: list[int] = field(default_factory=lambda: [64, 128])
    """limits on new tokens, one table row each"""
    dtype: str = "float32"
    device: str = "auto"
    rounds: int = 3
    profile: bool = False
    """print instead the operations that take most of our sampling's time, at the first of --lengths"""


@dataclass
class Logprobs(Shared):
    """completion logprobs and their gradient, against padded rows and all logits"""

    completion_tokens: int = 64
    """length of every completion; its tokens are random"""
    dtype: str = "float32"
    device: str = "auto"
    way: Literal["both", "ours", "naive"] = "both"
    """both: measure each way in its own process and print the table"""


@dataclass
class Step(Shared):
    """a whole GRPO step, against TRL's GRPOTrainer"""

    max_new_tokens: int = 64
    micro_batch_tokens: int | None = None
    """our tokens in one forward and backward pass; None: train_grpo.py's default"""
    kl_coef: float = 0.0
    """weight of the KL; above 0 both sides load a reference"""
    steps: int = 3
    learning_rate: float = 1e-6
    way: str = ""
    """measure this one of WAYS in this process; empty: measure each in its own process and print the table"""


Args = Sampling | Logprobs | Step


def load(args: Sampling | Logprobs):
    """The tokenizer, our model, and the prompts' token ids."""
    tokenizer = common.load_tokenizer(args.model)
    problems = load_problems(args.problems, "train")[: args.prompts]
    prompts = encode_prompts(tokenizer, [p.messages or p.question for p in problems])
    device, dtype = common.resolve_device(args.device), getattr(torch, args.dtype)
    return tokenizer, common.load_policy(args.model, tokenizer, device, dtype), prompts


def timed(run, device: torch.device) -> tuple:
    """Seconds of one call, and what it returned."""
    start = time.perf_counter()
    result = run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start, result


def measure_in_own_process(way: str) -> list[float]:
    """The figures that this command prints with --way."""
    result = subprocess.run([sys.executable, __file__, *sys.argv[1:], "--way", way], capture_output=True, text=True)
    if result.returncode:
        sys.exit(result.stderr[-2000:])
    return [*map(float, result.stdout.split("measured ")[1].split())]


def print_table(title: str, header: list[str], rows: list[list]) -> None:
    print(f"{title}\n{machine()}\n\n{format_table(header, rows)}")


# ---- Sampling --------------------------------------------------------------------------------------------------------


def sampling_speeds(ours, stock, prompts: list[list[int]], group_size: int, limit: int, rounds: int) -> list[float]:
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
            taken, tokens = timed(lambda run=run, round=round: run(round), device)
            if round > 0:
                values.append(tokens / taken)
    torch.set_float32_matmul_precision(our_precision)
    return [statistics.median(values) for values in found]


def compare_sampling(args: Sampling) -> None:
    _, ours, prompts = load(args)
    on_gpu, size = ours.device.type == "cuda", f"{args.prompts} x {args.group_size}"
    if args.profile:
        title = f"{args.model}, {args.dtype}, {size} x {args.lengths[0]}"
        return print_table(title, ["operation", "calls", "seconds", "share"], profile_rows(ours, prompts, args))
    stock = AutoModelForCausalLM.from_pretrained(args.model, dtype=ours.dtype).to(ours.device).eval()
    rows = []
    for limit in args.lengths:
        medians = sampling_speeds(ours, stock, prompts, args.group_size, limit, args.rounds)
        row = [f"{size} x {limit}", *(f"{m:.0f}" for m in medians)]
        row += [f"{medians[0] / m:.2f}" for m in medians[1:]]
        if on_gpu:
            row.append(f"{bandwidth_floor(ours, prompts, args.group_size, limit) * medians[0]:.2f}")
        rows.append(row)
    header = ["useful tokens/s", "ours", "generate", "with our precision", "ours/generate", "ours/with precision"]
    header += ["of the bandwidth floor"] * on_gpu
    lengths = f"prompts of {min(map(len, prompts))} to {max(map(len, prompts))} tokens"
    print_table(f"{args.model}, {args.dtype}, {lengths}", header, rows)


def profile_rows(model, prompts: list[list[int]], args: Sampling) -> list[list]:
    """Operations by their own time, without their callees', measured in a second, warm run."""
    common.sample_groups(model, prompts, args.group_size, args.lengths[0])
    with torch.profiler.profile() as profiler:
        common.sample_groups(model, prompts, args.group_size, args.lengths[0], seed=1)
    cuda = model.device.type == "cuda"
    times = {e.key: e.self_device_time_total if cuda else e.self_cpu_time_total for e in profiler.key_averages()}
    whole = sum(times.values())
    calls = {e.key: e.count for e in profiler.key_averages()}
    largest = sorted(times, key=times.get, reverse=True)[:14]
    rows = [[name[:60], calls[name], f"{times[name] / 1e6:.2f}", f"{times[name] / whole:.0%}"] for name in largest]
    return [*rows, ["all", "", f"{whole / 1e6:.2f}", "100%"]]


def bandwidth_floor(model, prompts: list[list[int]], group_size: int, limit: int) -> float:
    """A lower bound on seconds per token: every step reads all weights, the prompts' cache and, on average, half of the
    completions' cache, at the bandwidth that a copy reaches on this GPU."""
    source = torch.empty(2**30, dtype=torch.uint8, device=model.device)
    target = torch.empty_like(source)
    times = [timed(lambda: target.copy_(source), model.device)[0] for _ in range(6)]
    bandwidth = 2 * source.numel() / min(times[1:])
    cached = sum(map(len, prompts)) + len(prompts) * group_size * limit / 2
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    if not model.config.tie_word_embeddings:  # input embeddings are only looked up
        weights -= model.get_input_embeddings().weight.numel() * model.dtype.itemsize
    read = weights + cached * cache_bytes(model.config, model.dtype)
    return read / bandwidth / (len(prompts) * group_size)


# ---- Logprobs --------------------------------------------------------------------------------------------------------


def naive_logprobs(model, rollout: common.Rollout, rows: list[int]) -> torch.Tensor:
    pairs = [(rollout.prompt_ids[r // rollout.group_size], rollout.completion_ids[r][rollout.mask[r]]) for r in rows]
    ids = pad_sequence([torch.cat([torch.tensor(p).to(c), c]) for p, c in pairs], batch_first=True)
    logprobs = model(ids, use_cache=False).logits.float().log_softmax(-1)[:, :-1]
    logprobs = logprobs.gather(2, ids[:, 1:, None])[..., 0]
    return torch.cat([row[len(p) - 1 : len(p) - 1 + len(c)] for row, (p, c) in zip(logprobs, pairs, strict=True)])


def measure_logprobs(args: Logprobs) -> None:
    tokenizer, model, prompts = load(args)
    torch.manual_seed(0)
    total = args.prompts * args.group_size
    completions = torch.randint(3, len(tokenizer) - 1, (total, args.completion_tokens)).tolist()
    rollout, rows = common.make_rollout(prompts, completions, args.group_size, model.device), list(range(total))

    def forward_and_backward() -> torch.Tensor:
        if args.way == "ours":
            logprobs = common.completion_logprobs(model, rollout, rows)[0][rollout.mask]
        else:
            logprobs = naive_logprobs(model, rollout, rows)
        logprobs.mean().backward()
        return logprobs

    times = []
    for _ in range(3):
        model.zero_grad()
        taken, logprobs = timed(forward_and_backward, model.device)
        times.append(taken)
    norm = sum(p.grad.double().square().sum() for p in model.parameters() if p.grad is not None).sqrt().item()
    print("measured", min(times[1:]), peak_memory_gb(model.device), logprobs.mean().item(), norm)


def compare_logprobs(args: Logprobs) -> None:
    if args.way != "both":
        return measure_logprobs(args)
    rows = [[way, *measure_in_own_process(way)] for way in ("ours", "naive")]
    rows.append(["ours / naive", *(ours / naive for ours, naive in zip(rows[0][1:], rows[1][1:], strict=True))])
    title = f"{args.model}, {args.dtype}, {args.prompts} x {args.group_size} x {args.completion_tokens}"
    print_table(title, ["forward and backward", "seconds", "peak GB", "mean logprob", "gradient norm"], rows)


# ---- A whole step ----------------------------------------------------------------------------------------------------


def reward_of(text: str) -> float:
    """From 0 to 1, by the text alone. It differs within groups, so both sides need a backward pass for every row."""
    return zlib.crc32(text.encode()) / 2**32


def steps_of_ours(args: Step, directory: str) -> list[list[float]]:
    """For each step its seconds, whole and by part."""
    rewards.format_reward = lambda text, style: reward_of(text)
    same = "model", "problems", "group_size", "max_new_tokens", "learning_rate", "kl_coef"
    flags = {name: getattr(args, name) for name in same}
    flags |= {"micro_batch_tokens": args.micro_batch_tokens} if args.micro_batch_tokens else {}
    flags |= {"prompts_per_step": args.prompts, "iterations": args.steps}
    flags |= {"gradient_checkpointing": CHECKPOINTING in args.way, "dtype": "float32", "run_root": directory}
    flags |= {"eval_problems": 1, "eval_every": 0, "save_every": 0}
    train_grpo.main(from_flat(train_grpo.Args(), flags))
    scalars = read_scalars(next(Path(directory).iterdir()))
    parts = [scalars[f"time/{name}"] for name in ("sample", "reward", "logprobs", "update")]
    return [[sum(part[i][1] for part in parts), *(part[i][1] for part in parts)] for i in range(args.steps)]


def steps_of_trl(args: Step, directory: str) -> list[list[float]]:
    """For each step its seconds, whole."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    problems = load_problems(args.problems, "train")[: args.prompts * args.steps]
    turns = [p.messages or (("user", p.question),) for p in problems]
    system = ("system", SYSTEM_PROMPT)
    rows = [{"prompt": as_dicts(m if m[0][0] == "system" else (system, *m))} for m in turns]
    if "our precision" in args.way:
        common.resolve_device("auto")  # sets the precision
    config = GRPOConfig(
        output_dir=directory,
        per_device_train_batch_size=args.prompts * args.group_size,
        num_generations=args.group_size,
        max_completion_length=args.max_new_tokens,
        max_steps=args.steps,
        learning_rate=args.learning_rate,
        beta=args.kl_coef,
        bf16=False,
        gradient_checkpointing=CHECKPOINTING not in args.way,
        report_to="none",
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
    )
    steps, started = [], [0.0]

    class Timer(TrainerCallback):
        def on_step_begin(self, *_, **__):
            started[0] = time.perf_counter()

        def on_step_end(self, *_, **__):
            steps.append([time.perf_counter() - started[0]])

    def reward(completions, **_):
        return [reward_of(completion[0]["content"]) for completion in completions]

    GRPOTrainer(
        AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32),
        reward,
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=common.load_tokenizer(args.model),
        callbacks=[Timer()],
    ).train()
    return steps


def compare_steps(args: Step) -> None:
    if args.way:
        with tempfile.TemporaryDirectory() as directory:
            steps = (steps_of_ours if args.way.startswith("ours") else steps_of_trl)(args, directory)
        middle = [sorted(values)[len(values) // 2] for values in zip(*steps[1:], strict=True)]
        print("measured", peak_memory_gb(common.resolve_device("auto")), *middle)
        return
    rows = []
    for way in WAYS:
        peak, *seconds = measure_in_own_process(way)
        rows.append([way, seconds[0], peak, *(f"{s:.2f}" for s in seconds[1:] or [0] * 4)])
        rows[-1][3:3] = [rows[-1][1] / rows[0][1], rows[0][2] / rows[-1][2]]
    what = f"{args.prompts} x {args.group_size} x {args.max_new_tokens}"
    kl = f", KL {args.kl_coef:g}" if args.kl_coef else ""
    header = ["", "seconds a step", "peak GB", "times slower than ours", "our peak / its"]
    header += ["sample", "reward", "logprobs", "update"]
    print_table(f"{args.model}, {args.problems}, {what}, float32{kl}", header, rows)


def main(args: Args) -> None:
    {Sampling: compare_sampling, Logprobs: compare_logprobs, Step: compare_steps}[type(args)](args)


if __name__ == "__main__":
    main(tyro.cli(Args))
