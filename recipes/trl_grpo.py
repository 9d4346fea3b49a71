"""Repeats a run of train_grpo.py in TRL's GRPOTrainer, which trains on several GPUs: same start model, problems, order,
prompts, rewards and flags. TABLE translates the flags; docs/scaling-out.md says what TRL does differently.

    pip install trl==1.16.0
    accelerate launch --multi_gpu --num_processes 8 recipes/trl_grpo.py --run runs/train_grpo__...

Training begins at the run's start model, not at its result. evaluate.py reads the trained model, OUTPUT/final.
"""

import contextlib
import importlib.metadata
import io
import json
import os
import shlex
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch  # noqa: E402
import tyro  # noqa: E402
from jinja2 import TemplateError  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

import common  # noqa: E402
import train_grpo  # noqa: E402
from data import ProblemSampler, as_dicts, decode, encode_problems, load_train_problems  # noqa: E402
from plumbing.flags import (  # noqa: E402
    SYSTEM_PROMPT,
    AtLeast1,
    as_flag,
    check_folder,
    check_minibatch,
    check_ranges,
    checkpoint_interval,
    fail,
    from_flat,
    reason,
    to_flat,
)
from plumbing.rows import is_undivided  # noqa: E402
from rewards import RewardFlags, Verifier, check_rewards, reward_weights, score_completions, sum_rewards  # noqa: E402

VERSION = "1.16.0"  # TABLE was read off this version's source

# Flag of train_grpo.py -> the GRPOConfig field that takes the same value, or {value of the flag: GRPOConfig fields}.
# A value that is not listed has no counterpart.
TABLE = {
    "seed": "seed",
    "learning_rate": "learning_rate",
    "group_size": "num_generations",
    "max_new_tokens": "max_completion_length",
    "temperature": "temperature",
    "update_epochs": "num_iterations",
    "clip_low": "epsilon",
    "clip_high": "epsilon_high",
    "kl_coef": "beta",
    "unbiased_kl": "use_bias_correction_kl",
    "max_grad_norm": "max_grad_norm",
    "gradient_checkpointing": "gradient_checkpointing",
    "loss_norm": {
        "sequence": {"loss_type": "grpo"},
        "token": {"loss_type": "dapo"},
        "constant": {"loss_type": "dr_grpo"},
    },
    "normalize_std": {True: {"scale_rewards": "group"}, False: {"scale_rewards": "none"}},
    "ratio_level": {
        "token": {"importance_sampling_level": "token"},
        "gspo": {"importance_sampling_level": "sequence"},  # TRL's "sequence" is the mean of the log-ratios
    },
    "truncated": {"score": {}, "wrong": {}, "mask": {"mask_truncated_completions": True}},
    "problem_sampling": {"uniform": {}, "curriculum": {}},  # drawn before training; "prioritized" needs success rates
    "dynamic_sampling": {False: {}},
    "offload_optimizer": {False: {}},
}
COMPUTED = {  # flag -> the GRPOConfig field that `translate` computes from it, or the method that `main` replaces
    "warmup_iterations": "create_scheduler",
    "iterations": "max_steps",
    "prompts_per_step": "steps_per_generation",
    "minibatch_size": "gradient_accumulation_steps",
    "micro_batch_tokens": "per_device_train_batch_size",
    "dtype": "bf16",
    "save_every": "save_steps",
    "keep_checkpoints": "save_total_limit",
}
OUR_CODE = {"model", "problems", "eval_data", "system_prompt", *to_flat(RewardFlags())} - {"truncated"}  # unchanged
IGNORED = {"device", "eval_every", "eval_problems", "run_root", "run_name", "resume"}  # no effect on training
IGNORED |= {"max_sampling_rounds", "priority_floor"}  # only for values without a counterpart
IGNORED |= {"max_bad_updates"}  # TRL has no such check
FIXED = {  # fixed in train_grpo.py
    "top_p": 1.0,
    "top_k": 0,
    "use_vllm": False,
    "shuffle_dataset": False,  # the rows come in our sampler's order
    "disable_dropout": True,
    "ddp_find_unused_parameters": False,
    "report_to": "tensorboard",
}


@dataclass
class Args:
    run: str
    """run directory of train_grpo.py"""
    output: str | None = None
    """directory for the model and TRL's logs; None: RUN/trl"""
    iterations: AtLeast1 | None = None
    """number of iterations; None: the run's"""


def optimizer_steps(flags: dict) -> int:
    """Number of optimizer steps in one iteration."""
    batch_size = flags["prompts_per_step"] * flags["group_size"]
    return flags["update_epochs"] * batch_size // (flags["minibatch_size"] or batch_size)


def translate(flags: dict, processes: int, prompt_tokens: int, gpu: bool) -> dict:
    """GRPOConfig's fields. prompt_tokens: the longest prompt's. Exits with an error if a flag has no counterpart."""
    fields = dict(FIXED)
    for name, to in TABLE.items():
        value = flags[name]
        if isinstance(to, str):
            fields[to] = value
        elif value in to:
            fields |= to[value]
        else:
            fail(f"{as_flag(name)} {value}: TRL has no counterpart; start the run without it")
    if flags["unbiased_kl"] and flags["kl_coef"] and flags["ratio_level"] == "gspo":
        fail("--unbiased-kl True: TRL has no counterpart with --ratio-level gspo (it weights the KL by that ratio)")

    prompts, batch_size = flags["prompts_per_step"], flags["prompts_per_step"] * flags["group_size"]
    minibatch_size, steps = flags["minibatch_size"] or batch_size, optimizer_steps(flags)
    check_minibatch(minibatch_size, flags["group_size"], batch_size)
    if batch_size % minibatch_size:
        fail(f"--minibatch-size {minibatch_size}: TRL has no counterpart; it must divide {batch_size} completions")
    if prompts % processes:
        fail(f"--prompts-per-step {prompts}: not a multiple of the {processes} processes; change --num_processes")
    if minibatch_size % processes:
        fail(f"--minibatch-size {minibatch_size}: not a multiple of the {processes} processes; change --num_processes")
    save_every = checkpoint_interval(flags["save_every"], flags["eval_every"])
    rows = minibatch_size // processes  # in one optimizer step on one device
    fitting = flags["micro_batch_tokens"] // (prompt_tokens + flags["max_new_tokens"])
    device_rows = max(size for size in range(1, rows + 1) if rows % size == 0 and size <= max(1, fitting))
    fields |= {
        "max_steps": flags["iterations"] * steps,
        "steps_per_generation": batch_size // processes // device_rows,
        "gradient_accumulation_steps": rows // device_rows,
        "per_device_train_batch_size": device_rows,
        "logging_steps": steps,  # once an iteration
        "bf16": flags["dtype"] == "bfloat16" or (flags["dtype"] == "auto" and gpu),
        "use_cpu": not gpu,
        "save_strategy": "steps" if save_every else "no",
        "save_steps": max(1, save_every) * steps,
        "save_total_limit": flags["keep_checkpoints"] or None,
    }
    return fields


# ---- Prompts and rewards --------------------------------------------------------------------------------------------


def trl_prompts(tokenizer, problems: list, system_prompt: str) -> list:
    """The prompts in TRL's format: messages, or texts for a model without a chat template. Exits with an error if TRL
    would encode a prompt to other token ids than train_grpo.py did."""
    chat = {"add_generation_prompt": True, "tokenize": True, "return_dict": True}
    prompts = []
    for problem in problems:
        turns = as_dicts(problem.messages or (("user", problem.question),))
        if system_prompt and tokenizer.chat_template and turns[0]["role"] != "system":
            turns = [{"role": "system", "content": system_prompt}, *turns]
        try:
            if tokenizer.chat_template:
                prompts.append(turns)
                ids = tokenizer.apply_chat_template(turns, **chat)["input_ids"]
            else:
                prompts.append("\n\n".join(turn["content"] for turn in turns))
                ids = tokenizer(text=prompts[-1])["input_ids"]
        except TemplateError as error:
            fail(f"problem {problem.id!r}: its chat template fails in TRL ({error}); try --system-prompt ''")
        if list(ids) != list(problem.prompt_ids):
            fail(f"problem {problem.id!r}: TRL's token ids for its prompt differ from ours, so it can't repeat the run")
    return prompts


class Scores:
    """Our rewards as TRL's reward functions, one per reward, so that TRL logs them by name. score_completions computes
    them all once per batch. Each process has whole groups. If one reward of a completion is unknown (None), so are the
    others: TRL leaves a completion out of its group's mean only if all are. A reward that a problem does not have (NaN)
    is None alone: TRL adds up the others."""

    def __init__(self, args: train_grpo.Args, tokenizer, problems: list, stops: list[int], device, dtype):
        self.args, self.tokenizer, self.problems, self.stops, self.device = args, tokenizer, problems, stops, device
        self.budget, path = args.optimization.micro_batch_tokens, args.rewards.reward_model
        self.verify = Verifier(args.rewards, device, dtype, self.budget)
        self.reward_model = common.load_reward_model(path, tokenizer, device, dtype) if path else None
        self.steps = optimizer_steps(to_flat(args))
        self.count, self.scored, self.components = 0, None, {}  # count: completions scored by this process
        self.final_weights = reward_weights(args.rewards, args.rewards.length_reward_start)  # with the length reward
        used = {name: weight for name, weight in self.final_weights.items() if weight or name == "accuracy"}
        if self.reward_model is None:
            del used["model"]
        self.weights, self.functions = list(used.values()), [self.function(name) for name in used]

    def function(self, name: str):
        def reward(completion_ids, problem, trainer_state, **_) -> list[float | None]:
            if self.scored is not completion_ids:  # the first function called for this batch
                self.scored, self.components = completion_ids, self.score(completion_ids, problem)
            iteration = trainer_state.global_step // self.steps
            counts = reward_weights(self.args.rewards, iteration)[name] > 0  # no length reward before its start
            return [None if value is None else value * counts for value in self.components[name]]

        reward.__name__ = name
        return reward

    def score(self, completion_ids: list[list[int]], indices: list[int]) -> dict[str, list[float | None]]:
        """Each completion's rewards by name. indices: the problem of each completion."""
        G, limit = self.args.group_size, self.args.max_new_tokens
        batch = [self.problems[index] for index in indices[::G]]
        rollout = common.make_rollout([problem.prompt_ids for problem in batch], completion_ids, G, self.device)
        rollout.finished = torch.tensor([ids[-1] in self.stops for ids in completion_ids])
        self.count += len(completion_ids)
        texts = decode(self.tokenizer, rollout)
        scoring = self.args.rewards, limit, self.verify, self.reward_model, self.budget
        components = score_completions(texts, batch, rollout, *scoring)
        known = sum_rewards(components, self.final_weights, texts, batch)[1].flatten().tolist()
        return {
            name: [v if k and v == v else None for v, k in zip(values.flatten().tolist(), known, strict=True)]
            for name, values in components.items()
        }


@torch.no_grad()
def check_positions(model) -> None:
    """TRL pads prompts on the left and gives no position ids when it trains. Exits with an error if the model then
    computes something else than the prompt alone, as models with learned positions do."""
    ids = torch.tensor([[3, 4, 5]])
    padded, mask = torch.nn.functional.pad(ids, (2, 0), value=3), torch.tensor([[0, 0, 1, 1, 1]])
    difference = model.eval()(padded, attention_mask=mask).logits[0, -1] - model(ids).logits[0, -1]
    if not difference.abs().max() < 1e-3:
        fail(f"{model.name_or_path}: TRL would train it at wrong positions (it counts the padding of shorter prompts)")


# ---- The run --------------------------------------------------------------------------------------------------------


def read_run(run: str) -> train_grpo.Args:
    """The arguments of a finished or interrupted run. Exits with an error if they are damaged or another script's."""
    file = Path(run) / "args.json"
    if file.exists() and not (Path(run) / "train_grpo.py").exists():
        scripts = ", ".join(sorted(path.name for path in Path(run).glob("*.py"))) or "no script"
        fail(f"--run {run}: holds {scripts}; a run of train_grpo.py is needed")
    try:
        saved = json.loads(file.read_text())
        args = from_flat(train_grpo.Args(), saved)
        if missing := sorted(to_flat(args).keys() - saved.keys()):
            raise ValueError(f"no field {missing[0]!r}")
    except OSError as error:
        fail(f"--run {run}: no run directory ({file} can't be read: {error.strerror})")
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        fail(f"--run {run}: {file} does not hold this version's arguments ({reason(error)}); start the run again")
    check_ranges(args)
    return args


def prepare(flags: Args, processes: int, gpu: bool):
    """Returns the run's arguments, GRPOConfig's fields, tokenizer, problems, prompts and the order of all draws. Makes
    every check of the input, before any model is loaded."""
    args = read_run(flags.run)
    args = replace(args, iterations=flags.iterations or args.iterations)
    if args.iterations == 0:
        fail(f"--run {flags.run}: has 0 iterations; give --iterations")
    output = Path(flags.output or Path(flags.run) / "trl")
    check_folder("--output", str(output))
    if output.exists():
        fail(f"--output {output}: exists; remove it, or name another directory")
    try:
        installed = importlib.metadata.version("trl")
    except importlib.metadata.PackageNotFoundError:
        installed = "none"
    if installed != VERSION:
        fail(f"TRL {VERSION} is needed, installed is {installed}: pip install trl=={VERSION}")
    if gpu and processes == 1 and torch.cuda.device_count() > 1:
        fail("several GPUs, one process: use accelerate launch --num_processes N, or set CUDA_VISIBLE_DEVICES=0")
    translate(to_flat(args), processes, 1, gpu)  # checks the flags before the problems are read
    tokenizer, config = common.load_tokenizer(args.model), common.load_config(args.model)
    problems = load_train_problems(args.problems, args.setup.eval_data, bool(args.rewards.reward_model))
    check_rewards(args.rewards, args.max_new_tokens, tokenizer, problems)
    problems = encode_problems(tokenizer, problems, args.setup.system_prompt, config, args.max_new_tokens)
    prompts = trl_prompts(tokenizer, problems, args.setup.system_prompt)
    fields = translate(to_flat(args), processes, max(len(problem.prompt_ids) for problem in problems), gpu)
    sampler = ProblemSampler(problems, args.sampling.problem_sampling, args.seed, iterations=args.iterations)
    order = []
    for iteration in range(args.iterations):
        order += [sampler.place[problem] for problem in sampler.draw(args.prompts_per_step, iteration)]
    return args, fields | {"output_dir": str(output)}, tokenizer, problems, prompts, order


def main(flags: Args) -> None:
    processes, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("LOCAL_RANK", 0))
    gpu = torch.cuda.is_available() and os.environ.get("ACCELERATE_USE_CPU", "false").lower() != "true"
    said = io.StringIO() if rank else sys.stderr  # all processes make the same checks, only the first prints
    try:
        with contextlib.redirect_stderr(said):
            args, fields, tokenizer, problems, prompts, order = prepare(flags, processes, gpu)
    except SystemExit:
        if rank:  # a process that exits ends the others: let the first one print
            time.sleep(30)
            print(said.getvalue(), end="", file=sys.stderr)
        raise

    from datasets import Dataset  # slow imports, so after the checks
    from trl import GRPOConfig, GRPOTrainer

    class Trainer(GRPOTrainer):
        def create_scheduler(self, num_training_steps, optimizer=None):
            """Our schedule: the rate rises by iteration, and it is not 0 in the first step."""
            steps, warmup = optimizer_steps(to_flat(args)), max(1, args.optimization.warmup_iterations)
            rise = torch.optim.lr_scheduler.LambdaLR
            self.lr_scheduler = rise(optimizer or self.optimizer, lambda step: min(1.0, (step // steps + 1) / warmup))
            return self.lr_scheduler

    config = GRPOConfig(**fields)  # before the model: FSDP and DeepSpeed need it first
    model = AutoModelForCausalLM.from_pretrained(
        common.resolve_model(args.model), dtype=torch.float32, use_safetensors=True, trust_remote_code=False
    )
    common.set_stops(model, tokenizer)
    check_positions(model)
    dtype = common.resolve_dtype(args.setup.dtype, config.device)
    scores = Scores(args, tokenizer, problems, model.generation_config.eos_token_id, config.device, dtype)
    config.reward_weights = scores.weights
    rows = Dataset.from_list([{"prompt": prompts[index], "problem": index} for index in order])
    trainer = Trainer(model, scores.functions, args=config, train_dataset=rows, processing_class=tokenizer)
    trainer.train()
    final = Path(config.output_dir) / "final"
    counts = trainer.accelerator.gather(torch.tensor([scores.count], device=config.device)).tolist()
    trainer.save_model(str(final))
    # Without this a CPU process can hang at exit: torch 2.13's gloo thread needs the GIL to drop the gathered tensor.
    trainer.accelerator.wait_for_everyone()
    if trainer.accelerator.is_main_process:
        print(f"\ncompletions: {sum(counts)} ({' + '.join(map(str, counts))})\nmodel: {final}")
        print(f"curves: tensorboard --logdir {config.output_dir}\ncompare: {comparison(flags.run, args, final)}")
    trainer.accelerator.end_training()


def comparison(run: str, args: train_grpo.Args, final: Path) -> str:
    """The command that evaluates the start model, our final model if there is one, and TRL's."""
    ours, source = Path(run) / "final", args.setup.eval_data or args.problems
    stages = [f"start={args.model}", f"ours={ours}" if ours.exists() else "", f"trl={final}"]
    words = ["python", "evaluate.py", "--stages", *filter(None, stages), "--problems", source]
    words += ["--split", "all"] if args.setup.eval_data and is_undivided(source) else []
    words += ["--max-new-tokens", str(args.max_new_tokens), "--format-style", args.rewards.format_style]
    default = args.setup.system_prompt == SYSTEM_PROMPT
    return shlex.join(words + ([] if default else ["--system-prompt", args.setup.system_prompt]))


if __name__ == "__main__":
    flags = tyro.cli(Args)
    check_ranges(flags)
    main(flags)
