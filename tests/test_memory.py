"""benchmarks/memory.py: the memory that a run takes, and the flags with which it fits."""

from dataclasses import replace

import pytest
import torch
from conftest import EMBEDDED

import common
import train_dpo
import train_grpo
import train_pg
import train_ppo
import train_rm
import train_sft
from benchmarks import memory
from plumbing.flags import from_flat


def case(script, dtype=torch.float32, size=1000, prompt=30, completion=40, **flags) -> memory.Case:
    args = from_flat(script.Args(), {"model": EMBEDDED} | flags)
    return memory.Case(script.__name__, args, common.load_config(EMBEDDED), size, prompt, completion, dtype, cpu=True)


def needs(script, **changes) -> dict[str, float]:
    return memory.memory_needs(case(script, **changes))


def test_every_trained_model_has_weights_and_an_optimizer():
    grpo = needs(train_grpo)
    assert grpo["weights"] == 4000 and grpo["optimizer"] == 8000  # Adam's two moments
    assert needs(train_grpo, dtype=torch.bfloat16)["optimizer"] == 12_000  # and masters
    critic = needs(train_pg, baseline="value")
    assert critic["weights"] == 8000 and critic["optimizer"] == 16_000
    assert needs(train_pg, baseline="batch-mean")["weights"] == 4000


def test_frozen_models_have_weights_alone():
    assert needs(train_grpo, kl_coef=0.1)["weights"] == 8000
    ppo = needs(train_ppo, kl_coef=0.05)
    assert ppo["weights"] == 12_000 and ppo["optimizer"] == 16_000  # policy, critic, and a reference
    judge = f"./{EMBEDDED}"  # another path than --model: a model of its own size
    assert needs(train_ppo, kl_coef=0.0, reward_model=judge)["weights"] == 8000 + 4 * 804_864
    assert needs(train_grpo, judge_model=judge)["weights"] == 4000 + 4 * 804_864


def test_the_reference_of_dpo_is_there_in_evaluations_only():
    dpo, simpo = needs(train_dpo), needs(train_dpo, loss="simpo")
    assert dpo["weights"] == simpo["weights"] == 4000
    assert dpo["sampling"] - simpo["sampling"] == 4000
    assert needs(train_rm)["sampling"] == 0


def test_the_cache_and_the_logits_of_what_is_sampled_at_once():
    config = common.load_config(EMBEDDED)
    numbers = 2 * 4 * 4 * 32  # keys and values, layers, heads, size
    assert memory.cache_bytes(config, torch.float32) == 4 * numbers
    assert memory.cache_bytes(config, torch.bfloat16) == 2 * numbers
    cached = 32 * 30 + 256 * 40  # a prompt once for its group
    assert needs(train_grpo)["sampling"] == cached * memory.cache_bytes(config, torch.float32) + 12 * 256 * 103


@pytest.mark.parametrize("script", [train_sft, train_dpo, train_rm])
def test_an_update_of_few_rows_takes_less_than_the_token_budget(script):
    small, large = needs(script, minibatch_size=8), needs(script, minibatch_size=16)
    assert small["training"] < large["training"]
    budget = needs(script, minibatch_size=64, micro_batch_tokens=16 * 70)
    assert budget["training"] < needs(script, minibatch_size=64)["training"]
    assert needs(script, minibatch_size=64, gradient_checkpointing=True)["training"] < large["training"] * 4


def test_a_pair_is_never_split():
    """Even a budget of one token takes a whole row, or both rows of a pair."""
    row, pair = (needs(script, micro_batch_tokens=1, minibatch_size=8) for script in (train_sft, train_rm))
    assert row["training"] == needs(train_sft, micro_batch_tokens=70, minibatch_size=8)["training"]
    assert pair["training"] == needs(train_rm, micro_batch_tokens=140, minibatch_size=8)["training"]
    assert pair["training"] < needs(train_rm, micro_batch_tokens=141, minibatch_size=8)["training"]


def test_the_flags_that_would_fit_are_named():
    """Flags that cost only time come first, then those that change the run."""
    run = case(train_grpo, size=804_864, prompt=200, prompts_per_step=16, group_size=2)
    assert memory.parameters(run.config) == run.size

    def fits(free: float, **changes) -> dict | None:
        return memory.flags_that_fit(replace(run, args=from_flat(run.args, changes)), free)

    total = memory.peak(run)
    assert fits(total) == {} and fits(0.5e9) is None
    assert fits(total - 1) == {"micro_batch_tokens": 4096}
    libraries = 1.15 * memory.LIBRARIES
    steps = [fits(libraries + 1.15e6 * free) for free in range(800, 10, -2)]
    order = [change for i, change in enumerate(steps) if change and change != steps[i - 1]]
    assert {"micro_batch_tokens": 1024} in order
    harder = [sorted({"gradient_checkpointing", "prompts_per_step"} & change.keys()) for change in order]
    assert [] in harder and ["gradient_checkpointing"] in harder and "prompts_per_step" in harder[-1]
    assert harder.index([]) < harder.index(["gradient_checkpointing"])
    assert fits(libraries + 2e8, prompts_per_step=10_000)["prompts_per_step"] < 10_000
    assert fits(libraries + 1e7, minibatch_size=32) is None  # fewer prompts make no whole minibatch
    for change in order:  # the suggested flags do fit
        assert fits(libraries + 9.2e8, **change) == {}
    assert memory.as_flags({"micro_batch_tokens": 1024, "gradient_checkpointing": True}) == (
        "--micro-batch-tokens 1024 --gradient-checkpointing"
    )


def test_the_command_takes_the_flags_of_a_script(monkeypatch, capsys):
    flags = ["--prompts-per-step", "16", "--group-size", "2", "--device", "cpu"]
    assert memory.free_memory(torch.device("cpu")) > 1e8
    monkeypatch.setattr(memory, "free_memory", lambda device: 1.15 * memory.LIBRARIES + 8e7)
    printed = memory.report("train_grpo", flags)
    assert "0.8e6 parameters, float32, at most 15 tokens of prompt and 40 of completion" in printed
    assert "0.770" in printed and printed.endswith("it would fit with --micro-batch-tokens 1024")
    monkeypatch.setattr(memory, "free_memory", lambda device: 30e6)
    assert memory.report("train_grpo", flags).endswith("no flags make it fit; take a smaller model")
    monkeypatch.setattr(memory, "free_memory", lambda device: float("inf"))
    assert memory.report("train_sft", ["--demonstrations", "100", "--device", "cpu"]).endswith("it fits")
    with pytest.raises(SystemExit):
        memory.report("train_mine", [])
    assert "train_mine.py: one of train_pg.py, " in capsys.readouterr().err


def test_the_table_of_models_and_gpus():
    rows = memory.table(memory.Args())
    sizes = ["0.5B (0.49e9)", "1.5B (1.54e9)", "3B (3.09e9)", "7B (7.62e9)", "8B (8.19e9)"]
    assert [row[0] for row in rows] == sizes
    assert rows[0][2:6] == ["--micro-batch-tokens 4096", "as it is", "as it is", "as it is"]
    assert all("--offload-optimizer" in cell for cell in rows[3][2:6])
    offloaded = "--micro-batch-tokens 4096 --offload-optimizer"
    assert rows[1][2:] == [offloaded, "--micro-batch-tokens 4096", "as it is", "as it is", "25 GB"]


def test_attention_on_a_card_keeps_what_it_gathers():
    """Catches: an estimate that leaves out padded queries, keys and values, which autograd keeps in every layer."""
    run = case(train_grpo, prompts_per_step=4, group_size=2, prompt=30, completion=40)
    here, there = memory.memory_needs(run), memory.memory_needs(replace(run, cpu=False))
    prompts, completions = 4 * 30 * 4 * 128, 8 * (2 * 40 + 2 * 70) * 128  # 4 heads of 32, 4 key heads
    scores = 3 * 4 * 8 * (40 + 30 / 2) * 4 * 70
    assert there["training"] - here["training"] == 4 * (4 * (prompts + completions) + 8 * 40 * 70) - scores


def test_an_offloaded_optimizer_leaves_the_card():
    """2 bytes a parameter remain, and one weight's gradient. On a CPU nothing moves away, and masters are added."""
    config = common.load_config(EMBEDDED)
    changes = {"offload_optimizer": True, "dtype": torch.bfloat16}
    there = memory.memory_needs(replace(case(train_grpo, **changes), cpu=False))
    here = memory.memory_needs(replace(case(train_grpo, dtype=torch.bfloat16), cpu=False))
    assert there["weights"] == 2000 and there["optimizer"] == 0
    gradient = 2 * 3 * config.hidden_size * config.intermediate_size
    assert there["training"] - gradient == here["training"] - 4000
    assert needs(train_grpo, offload_optimizer=True)["optimizer"] == 12_000
