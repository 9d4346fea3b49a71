"""Supervised fine-tuning (SFT): cross-entropy on the tokens of demonstrated completions.

    L = - mean over all completion tokens of log pi(token | prompt, tokens before it)

The EOS that ends a completion is one of its tokens, or the model would never learn to stop; the prompt's carry no loss.
The learning rate rises linearly and falls as a cosine to a tenth. This is the stage before RL: InstructGPT's SFT
(arXiv:2203.02155, section 3.5), the cold start of DeepSeek-R1 (arXiv:2501.12948, section 2.3.1).

    python train_sft.py                                     # a few more steps of the embedded model on its own data
    python train_sft.py --model Qwen/Qwen2.5-0.5B --data demonstrations.jsonl --problems openai/gsm8k:main \\
        --learning-rate 1e-5 --minibatch-size 32 --max-new-tokens 512       # with a GPU, not run on one yet
    python train_sft.py --model runs/tiny --from-scratch    # random weights; the embedded model's card has the rest

What you should see from the first command, in 30 s on 2 cores (AMD EPYC): a held-out loss that stays at 0.240, as the
embedded model comes from these demonstrations; accuracy unchanged within chance. From scratch (9.5 minutes, see
models/tiny-arithmetic/README.md) the loss falls from 4.6 to 0.240, what the teacher's slips leave as entropy.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from tqdm import tqdm

import common
import evaluate
from common import fail
from data import (
    SYSTEM_PROMPT,
    ProblemSampler,
    check_context,
    check_flags,
    check_memory,
    context_length,
    encode_completions,
    encode_prompts,
    is_held_out,
    load_demonstrations,
    load_eval_problems,
)
from evaluate import Clock, Metrics, comparison_table, evaluate_policy


@dataclass
class Args:
    model: str = "models/tiny-arithmetic"
    """the policy to start from: local model directory or hub name"""
    from_scratch: bool = False
    """random weights: only the model's config and tokenizer are read"""
    data: str = "arithmetic-demonstrations"
    """"arithmetic-demonstrations", a .jsonl file (prompt, completion), or a samples file of evaluate.py; a tenth,
    chosen by hash, is held out"""
    demonstrations: int = 20000
    """how many arithmetic-demonstrations to make"""
    keep: Literal["correct", "best"] = "correct"
    """of a samples file: every right completion | the best of each problem"""
    problems: str = "arithmetic"
    """its held-out problems are evaluated: "arithmetic", a .jsonl file (question, answer), or a hub dataset"""
    eval_data: str | None = None
    """held-out problems; without it a tenth of --problems, chosen by hash, is held out"""
    system_prompt: str = SYSTEM_PROMPT
    """system turn of the chat template ('' for none); the embedded model's template ignores it"""
    seed: int = 1
    device: str = "auto"
    """auto | cpu | cuda | cuda:1 ..."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """of the weights; auto: bfloat16 on a GPU (with fp32 master weights), float32 on a CPU"""
    iterations: int = 200
    """optimizer steps, and the length of the learning rate's cosine (so changing it on --resume bends that)"""
    minibatch_size: int = 128
    """demonstrations in one optimizer step"""
    max_new_tokens: int = 40
    """length limit of a completion in evaluations, tokens"""
    format_style: Literal["answer-tags", "think"] = "answer-tags"
    """answer-tags: <think>..</think><answer>..</answer>; think: <think>..</think> and then text with the answer in
    \\boxed{} or after #### (ask for that with --system-prompt)"""
    learning_rate: float = 3e-4
    """of AdamW at its peak, for the embedded model; 1e-5 for real ones"""
    weight_decay: float = 0.1
    """of AdamW, on all weights"""
    warmup_iterations: int = 20
    """iterations over which the learning rate rises linearly"""
    micro_batch_tokens: int = 4096
    """tokens (prompt and completion of each row) in one forward and backward pass; changes memory only"""
    gradient_checkpointing: bool = False
    """keep only each layer's input for the backward pass and compute the layer again there: less memory, slower"""
    max_grad_norm: float = 1.0
    """gradients are clipped to this norm"""
    max_bad_updates: int = 10
    """updates with a non-finite loss or gradient are skipped; so many of them in a row end the run"""
    loss_norm: Literal["sequence", "token", "constant"] = "token"
    """weights of the tokens: each sequence's mean | the mean of all | a constant, 1 / max_new_tokens"""
    eval_every: int = 0
    """iterations between evaluations; 0: only before and after"""
    eval_problems: int = 300
    """held-out problems, and held-out demonstrations, in an evaluation"""
    save_every: int = 0
    """iterations between checkpoints; 0: none but final/"""
    keep_checkpoints: int = 0
    """so many of the newest checkpoints are kept; 0: all"""
    run_root: str = "runs"
    """where run directories are made"""
    resume: str | None = None
    """run directory to go on in, from its newest checkpoint, with its arguments"""


def sft_loss(logprobs: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Cross-entropy. logprobs, weights: (B, T), weights 0 on padding."""
    return -(weights * logprobs).sum()


@torch.no_grad()
def held_out_loss(policy, prompts: list[list[int]], completions: list[list[int]], max_tokens: int) -> float:
    """Mean cross-entropy per token of demonstrations that are not trained on."""
    rollout = common.make_rollout(prompts, completions, device=policy.device)
    rows = common.micro_batches(rollout, list(range(len(prompts))), max_tokens)
    total = sum(common.completion_logprobs(policy, rollout, micro)[0].sum().item() for micro in rows)
    return -total / rollout.mask.sum().item()


def main(args: Args) -> None:
    # ------------------------------------------------------------------------------------------------------- Setup
    check_flags(args)
    device = common.resolve_device(args.device)
    dtype = common.resolve_dtype(args.dtype, device)
    tokenizer = common.load_tokenizer(args.model)
    texts = load_demonstrations(args.data, args.demonstrations, keep=args.keep)
    prompts = encode_prompts(tokenizer, [prompt for prompt, _ in texts], args.system_prompt)
    completions = encode_completions(tokenizer, [completion for _, completion in texts], prompts)
    eval_problems = load_eval_problems(args.problems, args.eval_data, args.eval_problems)
    eval_prompts = encode_prompts(tokenizer, [p.question for p in eval_problems], args.system_prompt)
    config = common.load_config(args.model)
    check_context(eval_prompts, [p.id for p in eval_problems], config, args.max_new_tokens)

    # A demonstration that the context would cut loses its end, where the answer and the EOS are: dropped, not cut.
    context = context_length(config)
    fits = [i for i in range(len(texts)) if len(prompts[i]) + len(completions[i]) <= context]
    if len(fits) < len(texts):
        print(f"note: {len(texts) - len(fits)} of {len(texts)} demonstrations exceed the context of {context}: dropped")
    held_out = [i for i in fits if is_held_out(texts[i][0])][: args.eval_problems]
    train = [i for i in fits if not is_held_out(texts[i][0])]
    if len(train) < args.minibatch_size:
        fail(f"--minibatch-size {args.minibatch_size}: only {len(train)} demonstrations are left to train on")
    check_memory(args, config, [len(prompts[i] + completions[i]) for i in train], device, dtype)

    state = common.load_checkpoint(args.resume)  # {} unless a run is resumed
    run_dir, writer = common.start_run(args, state)
    stop = common.StopSignal()
    health = evaluate.Health(run_dir, tokenizer, args.max_bad_updates)
    torch.manual_seed(args.seed)  # of the random weights
    from_scratch = args.from_scratch and not state
    policy = common.load_policy(state.get("model", args.model), device, dtype, tokenizer.eos_token_id, from_scratch)
    if args.gradient_checkpointing:
        common.checkpoint_layers(policy)
    optimizer = common.MasterAdamW(policy, lr=args.learning_rate, betas=(0.9, 0.95), weight_decay=args.weight_decay)

    def evaluate_all() -> dict[str, float]:
        scores = evaluate_policy(policy, tokenizer, eval_problems, eval_prompts, args, args.minibatch_size)
        if held_out:
            data = [prompts[i] for i in held_out], [completions[i] for i in held_out]
            scores["eval/loss"] = held_out_loss(policy, *data, args.micro_batch_tokens)
        evaluate.log_scalars(writer, scores, x)
        return scores

    sampler = ProblemSampler(train, seed=args.seed)
    iteration, x = 0, 0  # x: demonstrations seen so far, the x-axis of every event
    if state:
        common.restore_optimizer(optimizer, state)
        sampler.load_state_dict(state["sampler"])
        iteration, x, before, scores = state["iteration"], state["x"], state["before"], state["scores"]
    else:
        before = scores = evaluate_all()

    bar = tqdm(total=args.iterations, initial=iteration, desc="SFT", unit="it")
    while iteration < args.iterations:
        metrics, clock = Metrics(), Clock(device)
        # ------------------------------------------------------------------------------------------------ 1 sample
        batch = [train[i] for i in sampler.draw(args.minibatch_size)]
        rollout = common.make_rollout([prompts[i] for i in batch], [completions[i] for i in batch], device=device)
        x += len(batch)
        clock.lap("sample")

        # ------------------------------------------------------------------------------------------------ 5 update
        rise = min(1.0, (iteration + 1) / max(1, args.warmup_iterations))
        learning_rate = args.learning_rate * rise * (0.55 + 0.45 * math.cos(math.pi * iteration / args.iterations))
        common.set_learning_rate(optimizer, learning_rate)
        weights = common.token_weights(rollout.mask, args.loss_norm, args.max_new_tokens)
        policy_loss = 0.0
        for micro in common.micro_batches(rollout, list(range(len(batch))), args.micro_batch_tokens):
            logprobs, entropy = common.completion_logprobs(policy, rollout, micro)
            loss = sft_loss(logprobs, weights[micro])
            loss.backward()
            policy_loss += loss.item()
            tokens = rollout.mask[micro].sum().item()
            metrics.add({"loss/entropy": entropy.sum().item() / tokens}, weight=tokens)
        grad_norm = torch.nn.utils.clip_grad_norm_(optimizer.masters, args.max_grad_norm).item()
        finite = health.is_finite(policy_loss, grad_norm, rollout, range(len(batch)))
        if finite:
            optimizer.step()
        optimizer.zero_grad()
        metrics.add({"loss/policy": policy_loss, "loss/grad_norm": grad_norm, "loss/skipped": not finite})
        clock.lap("update")

        # --------------------------------------------------------------------------------------------------- 6 log
        iteration += 1
        metrics.add({"loss/learning_rate": learning_rate})
        logged = evaluate.log_iteration(writer, metrics, clock, x)
        health.watch(logged)
        bar.set_postfix_str(f"loss {logged['loss/policy']:.3f}")
        bar.update()

        # ------------------------------------------------------------------------------------- 7 evaluate and save
        last = iteration == args.iterations
        if last or (args.eval_every and iteration % args.eval_every == 0):
            scores = evaluate_all()
        if stop.number or (args.save_every and (last or iteration % args.save_every == 0)):
            state = {"iteration": iteration, "x": x, "before": before, "scores": scores}
            state["sampler"] = sampler.state_dict()
            writer.flush()
            target = run_dir / "checkpoints" / f"step_{iteration:06d}"
            common.save_checkpoint(target, policy, tokenizer, optimizer, state, args.keep_checkpoints)
        if stop.number:
            stop.leave(run_dir)

    bar.close()
    writer.close()
    common.save_checkpoint(run_dir / "final", policy, tokenizer)
    stop.restore()
    print(f"\n{comparison_table(before, scores)}\n\nmodel: {run_dir / 'final'}")
    print(f"curves: tensorboard --logdir {run_dir}")


if __name__ == "__main__":
    main(common.parse_args(Args))
