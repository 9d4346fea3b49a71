"""recipes/trl_grpo.py: a run of train_grpo.py in TRL. The table leaves out no flag, TRL's losses equal ours, and a run
that TRL can't repeat ends with one line."""

import dataclasses
import importlib.metadata
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import EMBEDDED, few_problems, make_model, refusal, rl_args, run, scalars, slow_case, weights

import common
import train_grpo
from data import decode, encode_problems, load_problems
from plumbing.flags import as_flag, from_flat, to_flat
from recipes import trl_grpo
from rewards import score_completions

DEFAULTS = to_flat(train_grpo.Args())


def saved(folder: Path, script: str = "train_grpo.py", **changes) -> Path:
    """A run directory with the files that the recipe reads. changes: fields of args.json; `...` removes one."""
    folder.mkdir(exist_ok=True)
    flags = {name: value for name, value in (DEFAULTS | changes).items() if value is not ...}
    (folder / "args.json").write_text(json.dumps(flags))
    (folder / script).write_text("")
    return folder


# ---- The table


def test_every_flag_is_translated_or_said_not_to_be():
    """A new flag of train_grpo.py must be added to one of these."""
    places = [set(trl_grpo.TABLE), set(trl_grpo.COMPUTED), trl_grpo.OUR_CODE, trl_grpo.IGNORED]
    assert set().union(*places) == set(DEFAULTS)
    assert sum(map(len, places)) == len(DEFAULTS)


def test_the_page_has_every_flag_of_the_table():
    page = Path("docs/scaling-out.md").read_text()
    for name in (*trl_grpo.TABLE, *trl_grpo.COMPUTED, "max_bad_updates"):
        assert f"`{as_flag(name)}" in page, name


@pytest.mark.parametrize("processes", [1, 2, 8])
@pytest.mark.parametrize("minibatch_size", [None, 64])
@pytest.mark.parametrize("micro_batch_tokens", [1, 600, 8192, 10**6])
def test_batches_are_the_same_on_any_number_of_processes(processes, minibatch_size, micro_batch_tokens):
    changes = {"minibatch_size": minibatch_size, "micro_batch_tokens": micro_batch_tokens, "update_epochs": 3}
    fields = trl_grpo.translate(DEFAULTS | changes, processes, prompt_tokens=20, gpu=False)
    at_once = fields["per_device_train_batch_size"] * processes
    assert at_once * fields["gradient_accumulation_steps"] == (minibatch_size or 256)
    assert at_once * fields["steps_per_generation"] == 256
    assert fields["max_steps"] == 200 * 3 * 256 // (minibatch_size or 256)
    assert fields["per_device_train_batch_size"] * 60 <= max(60, micro_batch_tokens)


def test_flags_arrive_in_their_fields():
    fields = trl_grpo.translate(DEFAULTS | {"clip_high": 0.28, "kl_coef": 0.04, "truncated": "mask"}, 1, 20, gpu=True)
    assert (fields["epsilon"], fields["epsilon_high"], fields["beta"]) == (0.2, 0.28, 0.04)
    assert fields["use_bias_correction_kl"] is False and fields["mask_truncated_completions"] is True
    assert fields["bf16"] and not fields["use_cpu"]
    assert fields["save_steps"] == 25 and fields["save_total_limit"] is None


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"ratio_level": "sequence"}, "--ratio-level sequence: TRL has no counterpart"),
        ({"dynamic_sampling": True}, "--dynamic-sampling True: TRL has no counterpart"),
        ({"offload_optimizer": True}, "--offload-optimizer True: TRL has no counterpart"),
        ({"problem_sampling": "prioritized"}, "--problem-sampling prioritized: TRL has no counterpart"),
        ({"minibatch_size": 24}, "--minibatch-size 24: TRL has no counterpart; it must divide 256"),
        ({"minibatch_size": 12}, "--minibatch-size 12: must be a multiple of --group-size"),
        ({"unbiased_kl": True, "kl_coef": 0.1, "ratio_level": "gspo"}, "--unbiased-kl True: TRL has no counterpart"),
        ({"prompts_per_step": 33}, "--prompts-per-step 33: not a multiple of the 2 processes"),
        ({"group_size": 3, "minibatch_size": 3}, "--minibatch-size 3: not a multiple of the 2 processes"),
    ],
)
def test_a_flag_without_counterpart_is_one_line(changes, line, capsys):
    assert line in refusal(lambda flags: trl_grpo.translate(flags, 2, 20, False), DEFAULTS | changes, capsys)


# ---- Run directories


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"script": "train_ppo.py"}, "holds train_ppo.py; a run of train_grpo.py is needed"),
        ({"clip_low": ...}, "arguments (no field 'clip_low')"),
        ({"clip": 0.2}, "arguments (unknown: clip)"),
        ({"iterations": "many"}, "arguments (--iterations can't be 'many')"),
        ({"iterations": True}, "arguments (--iterations can't be True)"),
        ({"iterations": -1}, "--iterations -1: must be 0 or more"),
        ({"learning_rate": float("nan")}, "--learning-rate nan: must be finite"),
        ({"loss_norm": "sum"}, "arguments (--loss-norm can't be 'sum')"),
        ({"minibatch_size": 8.5}, "arguments (--minibatch-size can't be 8.5)"),
        ({"model": ["a"]}, "arguments (--model can't be ['a'])"),
        ({"iterations": 0}, "has 0 iterations; give --iterations"),
        ({"model": "gone"}, "--model gone: neither a local directory nor a hub name"),
        ({"problems": "gone.jsonl"}, "gone.jsonl"),
        ({"format_weight": 0.0, "accuracy_weight": 0.0}, "are all 0: there is nothing to learn from"),
        ({"dynamic_sampling": True}, "--dynamic-sampling True: TRL has no counterpart"),
    ],
)
def test_a_run_that_trl_cannot_repeat_is_one_line(changes, line, tmp_path, capsys):
    directory = saved(tmp_path / "run", **changes)
    assert line in refusal(trl_grpo.main, trl_grpo.Args(str(directory)), capsys)
    assert not (directory / "trl").exists()


def test_a_run_directory_that_is_none_or_damaged_is_one_line(tmp_path, capsys):
    assert "no run directory" in refusal(trl_grpo.main, trl_grpo.Args(str(tmp_path / "none")), capsys)
    directory = saved(tmp_path / "run")
    for text in ("", '{"model": ', "[" * 100_000, "\x00", "[]"):
        (directory / "args.json").write_text(text)
        assert f"{directory / 'args.json'} does not hold" in refusal(
            trl_grpo.main, trl_grpo.Args(str(directory)), capsys
        )
    (directory / "args.json").write_bytes(b"\xff\xfe\xff")
    assert "does not hold" in refusal(trl_grpo.main, trl_grpo.Args(str(directory)), capsys)


def test_the_output_is_not_written_over(tmp_path, capsys):
    directory = saved(tmp_path / "run")
    (tmp_path / "there").mkdir()
    flags = trl_grpo.Args(str(directory), output=str(tmp_path / "there"))
    assert f"--output {tmp_path / 'there'}: exists" in refusal(trl_grpo.main, flags, capsys)
    (tmp_path / "file").write_text("")
    flags = trl_grpo.Args(str(directory), output=str(tmp_path / "file" / "trl"))
    assert "can't be written" in refusal(trl_grpo.main, flags, capsys)


def test_without_trl_it_is_one_line(tmp_path, capsys, monkeypatch):
    flags = trl_grpo.Args(str(saved(tmp_path / "run")))
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "1.0.0")
    assert "TRL 1.16.0 is needed, installed is 1.0.0: pip install" in refusal(trl_grpo.main, flags, capsys)

    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    assert "TRL 1.16.0 is needed, installed is none: pip install" in refusal(trl_grpo.main, flags, capsys)


# ---- Prompts, order and rewards


def test_prompts_that_trl_would_encode_differently_are_one_line(embedded, capsys):
    tokenizer = embedded[1]
    config = embedded[0].config
    problems = encode_problems(tokenizer, load_problems("arithmetic", "eval", 3), "Think.", config, 40)
    assert trl_grpo.trl_prompts(tokenizer, problems, "Think.")[0] == [
        {"role": "system", "content": "Think."},
        {"role": "user", "content": problems[0].question},
    ]
    problems[1] = dataclasses.replace(problems[1], prompt_ids=problems[1].prompt_ids[:-1])
    error = refusal(lambda given: trl_grpo.trl_prompts(tokenizer, given, "Think."), problems, capsys)
    assert f"problem {problems[1].id!r}: TRL's token ids" in error


@pytest.mark.parametrize("mode", ["uniform", "curriculum"])
def test_the_draws_are_those_of_our_run(mode, tmp_path, monkeypatch):
    drawn = []
    draw = train_grpo.ProblemSampler.draw

    def recorded(sampler, count, iteration):
        drawn.extend(problems := draw(sampler, count, iteration))
        return problems

    monkeypatch.setattr(train_grpo.ProblemSampler, "draw", recorded)
    made = run(train_grpo.main, rl_args(train_grpo, tmp_path, problem_sampling=mode, iterations=3))
    ours = list(drawn)
    _, _, _, problems, _, order = trl_grpo.prepare(trl_grpo.Args(str(made)), 1, False)
    assert len(ours) == 12 and [problems[index] for index in order] == ours


def test_a_model_that_trl_trains_at_wrong_positions_is_refused(capsys):
    """Catches: learned positions, which count TRL's padding on the left: updates of another model, in silence."""
    trl_grpo.check_positions(make_model("llama"))
    assert "TRL would train it at wrong positions" in refusal(trl_grpo.check_positions, make_model("gpt2"), capsys)


def test_a_problem_without_an_answer_has_the_other_rewards(embedded):
    """Catches: a NaN that reaches TRL, or a completion left out because its problem has no answer."""
    model, tokenizer = embedded
    args = from_flat(train_grpo.Args(), {"group_size": 2, "prompts_per_step": 2})
    problems = load_problems("arithmetic", "eval", 2)
    problems[1] = dataclasses.replace(problems[1], answer="")
    problems = encode_problems(tokenizer, problems, "", model.config, 40)
    scores = trl_grpo.Scores(args, tokenizer, problems, [tokenizer.eos_token_id], "cpu", torch.float32)
    found = scores.score([[5, tokenizer.eos_token_id]] * 4, [0, 0, 1, 1])
    assert found["accuracy"] == [0.0, 0.0, None, None] and found["format"] == [0.0] * 4


def test_rewards_are_ours_with_their_names_weights_and_schedule(embedded):
    model, tokenizer = embedded
    flags = {"group_size": 3, "length_weight": 0.5, "length_reward_start": 2, "overlong_weight": 0.1}
    flags |= {"overlong_buffer": 30, "truncated": "wrong", "minibatch_size": 3, "prompts_per_step": 2}
    args = from_flat(train_grpo.Args(), flags)
    problems = encode_problems(tokenizer, load_problems("arithmetic", "eval", 4), "", model.config, 40)
    scores = trl_grpo.Scores(args, tokenizer, problems, [tokenizer.eos_token_id], "cpu", torch.float32)
    names = [function.__name__ for function in scores.functions]
    assert dict(zip(names, scores.weights, strict=True)) == {
        "accuracy": 1.0,
        "format": 0.2,
        "length": 0.5,
        "overlong": 0.1,
    }
    batch = [problems[3], problems[1]]
    rollout = common.sample_groups(model, [problem.prompt_ids for problem in batch], 3, 14)
    assert 0 < rollout.finished.sum() < 6  # some are cut
    expected = score_completions(decode(tokenizer, rollout), batch, rollout, args.rewards, args.max_new_tokens)
    rows = zip(rollout.completion_ids.tolist(), rollout.mask.sum(1).tolist(), strict=True)
    given = {"completion_ids": [ids[:n] for ids, n in rows], "problem": [3] * 3 + [1] * 3, "prompts": None}
    for step, on in ((0, 0), (3, 0), (4, 1)):  # two optimizer steps an iteration
        for function in scores.functions:
            name, state = function.__name__, SimpleNamespace(global_step=step)
            values = function(**given, trainer_state=state)
            assert values == [value * (on if name == "length" else 1) for value in expected[name]], name
    assert scores.count == 6  # once per batch, not per function


# ---- With TRL


def trl_loss(fields: dict, model, rollout, old, ref, advantages, folder: Path):
    """The loss that TRL's trainer computes for the rollout, with gradient."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    config = GRPOConfig(**fields | {"output_dir": str(folder), "report_to": "none"})
    tokenizer = common.load_tokenizer(EMBEDDED)
    rows = Dataset.from_list([{"prompt": "1+1="}] * 8)
    trainer = GRPOTrainer(model, lambda **_: [], args=config, train_dataset=rows, processing_class=tokenizer)
    trainer.current_gradient_accumulation_steps = 1
    G, P = rollout.group_size, max(map(len, rollout.prompt_ids))
    prompts = [prompt for prompt in rollout.prompt_ids for _ in range(G)]
    keep = rollout.finished if config.mask_truncated_completions else torch.ones_like(rollout.finished)
    mask = (rollout.mask & keep[:, None]).long()
    model.train()
    inputs = {
        "prompt_ids": torch.tensor([[0] * (P - len(prompt)) + list(prompt) for prompt in prompts]),
        "prompt_mask": torch.tensor([[0] * (P - len(prompt)) + [1] * len(prompt) for prompt in prompts]),
        "completion_ids": rollout.completion_ids,
        "completion_mask": mask,
        "advantages": advantages,
        "num_items_in_batch": mask.sum(),
        "old_per_token_logps": old,
    }
    loss = trainer._compute_loss(model, inputs | ({"ref_per_token_logps": ref} if ref is not None else {}))
    model.eval()
    return loss


LOSSES = {
    "default": {},
    "dapo": {"loss_norm": "token", "clip_high": 0.28},
    "dr-grpo": {"loss_norm": "constant", "normalize_std": False},
    "gspo": {"ratio_level": "gspo", "clip_low": 0.003, "clip_high": 0.004},
    "kl": {"kl_coef": 0.3},
    "unbiased-kl": {"kl_coef": 0.3, "unbiased_kl": True},
    "temperature": {"temperature": 1.7},
    "masked": {"truncated": "mask"},
    "masked-constant": {"truncated": "mask", "loss_norm": "constant"},
}


@pytest.mark.parametrize("name", [slow_case(name) for name in LOSSES])
def test_trl_computes_our_loss_and_gradient(name, tmp_path):
    flags = DEFAULTS | {"prompts_per_step": 2, "group_size": 4, "max_new_tokens": 14} | LOSSES[name]
    model, tokenizer = common.load_policy(EMBEDDED, None), common.load_tokenizer(EMBEDDED)
    torch.set_float32_matmul_precision("highest")
    prompts = [tokenizer(text).input_ids for text in ("12+7-5+3-2=", "1+30=")]
    rollout = common.sample_groups(model, prompts, 4, 14)
    assert 0 < rollout.finished.sum() < 8
    torch.manual_seed(1)
    old = common.rollout_logprobs(model, rollout, 8192, flags["temperature"])[0] + 0.2 * torch.randn(rollout.mask.shape)
    ref = old + 0.5 * torch.randn(old.shape) if flags["kl_coef"] else None
    advantages = torch.randn(8)
    fields = trl_grpo.translate(flags, 1, 20, gpu=False)
    theirs = trl_loss(fields, model, rollout, old, ref, advantages, tmp_path)
    theirs.backward()
    their_gradients = [parameter.grad.clone() for parameter in model.parameters()]

    model = common.load_policy(EMBEDDED, None)
    torch.set_float32_matmul_precision("highest")
    logprobs, _ = common.completion_logprobs(model, rollout, list(range(8)), flags["temperature"])
    if flags["truncated"] == "mask":
        advantages = advantages.where(rollout.finished, 0.0)
    token_weights = common.token_weights(rollout.mask, flags["loss_norm"], flags["max_new_tokens"])
    names = "clip_low", "clip_high", "kl_coef", "ratio_level", "unbiased_kl"
    options = {name: flags[name] for name in names}
    wide = advantages[:, None].expand_as(logprobs)
    ours, _ = train_grpo.grpo_loss(logprobs, old, ref, wide, rollout.mask, token_weights, **options)
    ours.backward()
    assert theirs.item() == pytest.approx(ours.item(), abs=1e-6, rel=1e-4)
    for parameter, gradient in zip(model.parameters(), their_gradients, strict=True):
        assert torch.allclose(parameter.grad, gradient, atol=1e-6, rtol=1e-3)


@pytest.mark.slow
def test_two_processes_repeat_a_run(tmp_path):
    flags = {"problems": few_problems(), "iterations": 2, "minibatch_size": 8, "kl_coef": 0.01, "learning_rate": 1e-3}
    made = run(train_grpo.main, rl_args(train_grpo, tmp_path, **flags))
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    command = [*launch, "--main_process_port", "0", "recipes/trl_grpo.py", "--run", str(made)]
    env = os.environ | {"ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "completions: 32 (16 + 16)" in done.stdout  # ours: 2 iterations of 4 x 4
    final = made / "trl" / "final"
    assert weights(final) != weights(Path(EMBEDDED))
    common.load_policy(str(final), None)
    common.load_tokenizer(str(final))
    assert f"ours={made / 'final'} trl={final}" in done.stdout
    (events,) = (made / "trl" / "runs").iterdir()
    logged = scalars(events)
    assert [step for step, _ in logged["train/rewards/accuracy/mean"]] == [2, 4]  # optimizer steps
    rates = re.findall(r"'learning_rate': '([^']+)'", done.stdout)
    assert list(map(float, rates)) == [pytest.approx(1e-4), pytest.approx(2e-4)]  # ours: a tenth more each iteration
