"""Prompts without a gold answer: a learned reward scores them, and nothing counts them as wrong."""

import json
from collections import Counter

import pytest
import torch
from conftest import EMBEDDED, few_problems, refusal, rl_args, run, scalars, short_args, slow_case

import common
import evaluate as command
import train_grpo
import train_kimi
import train_pg
import train_ppo
from curate import pass_rates
from data import Problem, chosen_samples, decode, encode_problems, read_samples
from plumbing import runs
from plumbing.evaluation import evaluate
from plumbing.files import write_jsonl
from plumbing.logs import Metrics, add_rollout_metrics
from plumbing.pairs import sampled_pairs
from rewards import ABSENT, RewardFlags, score_completions, success_rates, sum_rewards


@pytest.fixture(scope="module")
def learned_reward(tmp_path_factory) -> str:
    """A reward model with a random head, so that its scores differ."""
    model = common.load_reward_model(EMBEDDED, None, new_head=True)
    torch.manual_seed(0)
    torch.nn.init.normal_(common.value_head(model).weight, std=0.2)
    path = tmp_path_factory.mktemp("rm") / "rm"
    runs.save_model(path, model, common.load_tokenizer(EMBEDDED))
    return str(path)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory) -> str:
    """Arithmetic with answers, and the same kind of problems with their answers withheld."""
    rows = [json.loads(line) for line in open(few_problems())]
    path = tmp_path_factory.mktemp("mixed") / "mixed.jsonl"
    write_jsonl(path, [row if i % 2 else {"question": row["question"]} for i, row in enumerate(rows)])
    return str(path)


def test_a_reward_that_does_not_apply_adds_nothing():
    """Not 0 in its own mean, and not unknown: the other rewards count."""
    components = {"accuracy": [1.0, 0.0, ABSENT, ABSENT], "model": [ABSENT, ABSENT, 2.0, -1.0], "format": [1, 0, 1, 0]}
    problems = [Problem("1+1=", "2"), Problem("Write a poem.", "")]
    rewards, scored = sum_rewards(components, {"accuracy": 1.0, "model": 0.5, "format": 0.2}, ["a"] * 4, problems)
    assert torch.allclose(rewards, torch.tensor([[1.2, 0.0], [1.2, -0.5]])) and scored.all()
    assert components["accuracy"].isnan().tolist() == [[False, False], [True, True]]
    assert success_rates(components["accuracy"], scored) == [0.5, None]
    metrics = Metrics()
    rollout = common.make_rollout([(5,), (6,)], [[7], [7], [7], [7]], 2, "cpu")
    add_rollout_metrics(metrics, rollout, rewards, components, scored)
    means = metrics.means()
    assert means["reward/accuracy"] == 0.5 and means["reward/model"] == 0.5 and means["reward/frac_all_right"] == 0


@pytest.mark.parametrize("where", ["all", "unanswered"])
def test_rewards_are_routed_by_kind_of_prompt(where, learned_reward, embedded):
    policy, tokenizer = embedded
    problems = [Problem("1+1=", "2", id="a"), Problem("3+4=", "", id="b")]
    problems = encode_problems(tokenizer, problems, "", policy.config, 20)
    rollout = common.sample_groups(policy, [p.prompt_ids for p in problems], 4, 20, 1.0, 0)
    flags = RewardFlags(reward_model=learned_reward, reward_model_prompts=where, length_weight=0.1)
    model = common.load_reward_model(learned_reward, tokenizer)
    found = score_completions(decode(tokenizer, rollout), problems, rollout, flags, 20, None, model)
    assert found["accuracy"][4:] == [ABSENT] * 4 == found["length"][4:] and ABSENT not in found["accuracy"][:4]
    scores = common.rollout_scores(model, rollout, 8192).tolist()
    assert found["model"] == ([ABSENT] * 4 + scores[4:] if where == "unanswered" else scores)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "no field 'answer'"),
        ({"reward_model": "RM", "reward_model_weight": 0.0}, "has no answer, so nothing else judges it"),
        ({"reward_model": "RM", "problems": "NONE"}, "none of the problems has an answer"),
    ],
)
def test_prompts_that_nothing_rewards_are_refused(changes, said, mixed, learned_reward, tmp_path, capsys):
    write_jsonl(tmp_path / "none.jsonl", [{"question": f"{i}+1="} for i in range(60)])
    paths = {"RM": learned_reward, "NONE": str(tmp_path / "none.jsonl")}
    changes = {"problems": mixed} | {name: paths.get(value, value) for name, value in changes.items()}
    args = short_args(train_grpo, tmp_path / "runs", **changes)
    assert said in refusal(train_grpo.main, args, capsys)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("script", [train_grpo, slow_case(train_pg), slow_case(train_ppo), slow_case(train_kimi)])
def test_both_kinds_of_prompts_in_one_run(script, mixed, learned_reward, tmp_path):
    """InstructGPT's setting, and R1's last stage: rules where there is an answer, the learned reward elsewhere."""
    changes = {"problems": mixed, "eval_data": mixed, "eval_problems": 8, "reward_model": learned_reward}
    logged = scalars(run(script.main, rl_args(script, tmp_path, **changes, reward_model_prompts="unanswered")))
    assert {"reward/model", "reward/accuracy", "eval/model", "eval/accuracy"} <= set(logged)
    assert "nan" not in str(logged)


def test_a_run_on_prompts_alone(learned_reward, tmp_path):
    """No accuracy anywhere: neither 0 nor NaN."""
    write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": f"{i}+{i % 7}="} for i in range(60)])
    changes = {"problems": str(tmp_path / "prompts.jsonl"), "eval_data": None, "reward_model": learned_reward}
    args = rl_args(train_grpo, tmp_path / "runs", **changes, accuracy_weight=0.0, dynamic_sampling=True)
    logged = scalars(run(train_grpo.main, args))
    assert "eval/model" in logged and "reward/model" in logged
    assert not any("accuracy" in tag or "frac_all" in tag or "right" in tag for tag in logged), sorted(logged)


def test_samples_of_prompts_have_no_verdict(learned_reward, embedded):
    """`correct` is null, not false: neither a pass rate nor a demonstration comes of it; the reward makes pairs."""
    policy, tokenizer = embedded
    problems = encode_problems(tokenizer, [Problem("1+1=", ""), Problem("1+2=", "3")], "", policy.config, 20)
    model = common.load_reward_model(learned_reward, tokenizer)
    records = evaluate(policy, tokenizer, problems, 4, 20, reward_model=model)
    first, second = (record["completions"] for record in records)
    assert all(c["correct"] is None and c["reward"] == c["model"] for c in first)
    assert all(c["correct"] is not None and c["reward"] in (0.0, 1.0) for c in second)
    rows = [("a", records[0]), ("b", records[1])]
    read = read_samples(rows, "samples")
    assert chosen_samples(read[0], "correct") == [] and set(pass_rates(read, "samples", problems)) == {"1+2="}
    assert sampled_pairs(rows[:1], "samples", 0.0, Counter())


def test_evaluation_of_both_kinds(mixed, learned_reward, tmp_path, capsys):
    """The table has the learned score, accuracy and its interval are of the problems that have an answer."""
    args = command.Args(problems=mixed, split="all", eval_problems=12, reward_model=learned_reward, device="cpu")
    args.output = str(tmp_path / "samples.jsonl")
    command.main(args)
    printed = capsys.readouterr().out.splitlines()
    (header,) = [line for line in printed if "accuracy (T=1)" in line]
    (row,) = [line for line in printed if line.startswith("all ")]
    assert header.endswith("score") and "nan" not in row
    samples = [json.loads(line) for line in open(args.output)]
    verdicts = [row["completions"][0]["correct"] for row in samples]
    assert None in verdicts and {True, False} & set(verdicts)
    args.reward_model = None
    assert "no field 'answer'" in refusal(command.main, args, capsys)
