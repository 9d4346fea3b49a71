"""Whole runs on a GPU: every script, stages, resumes, families of models, the GPU check. Skipped where there is none;
test_pretended_gpu.py runs them on a pretended one."""

import pytest
import torch
from conftest import EMBEDDED, make_model, rl_args, run, scalars, short_args, slow_case
from families import tiny_model

import common
import evaluate
import train_dpo
import train_grpo
import train_kimi
import train_pg
import train_ppo
import train_rm
import train_sft
from benchmarks import gpu as gpu_check
from plumbing.engine import GraphDecoder, decoder_class
from plumbing.flags import from_flat

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.fixture
def pretended(request):
    """The pretended GPU, on which results are the CPU's."""
    gpu = getattr(request.config, "pretended", None)
    return gpu or pytest.skip("needs the pretended GPU: a real one rounds otherwise")


def sampled(model, **options) -> common.Rollout:
    torch.set_float32_matmul_precision("highest")
    prompts = [[3 + (5 * i + j) % 20 for j in range(4 + 3 * i)] for i in range(4)]
    return common.sample_groups(model, prompts, 4, 20, seed=1, eos_token_ids=[1, 7, 20, 33], **options)


# ---- Models ----


def test_an_update_reaches_the_graphs(pretended):
    """Catches: weights or captured tensors that are replaced, not written; a graph of the first batch that is replayed
    with its inputs; gradients, masters or clipping that differ from the CPU's."""
    results = []
    for device in ("cpu", "cuda"):
        model, found = make_model("llama").to(device), []
        optimizer = common.MasterAdamW(model, 1e-2, offload=True)
        for _ in range(2):
            rollout = sampled(model)
            logprobs, _ = common.completion_logprobs(model, rollout, list(range(16)))
            (logprobs.sum(1) * torch.linspace(-1, 1, 16).to(device)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            gap = (logprobs.detach() - rollout.sampler_logprobs)[rollout.mask].abs().max().item()
            assert gap < 1e-3
            found += [rollout.completion_ids.tolist(), rollout.mask.tolist()]
        results.append(found)
    assert results[0] == results[1] and results[0][0] != results[0][2]
    assert decoder_class(model) is GraphDecoder and pretended.graphs[-1].replays > 2


FAMILIES = ["gpt2", "gpt_neox", "phi3", "olmo2", "qwen3", "granite", "qwen3_moe", "mixtral", "gemma2", "mamba"]


@pytest.mark.parametrize("name", ["llama", *map(slow_case, FAMILIES)])
def test_a_family_samples_the_cpus_tokens(name, pretended, tmp_path):
    """Catches: a decoder, cache or trial that fits other models only, in a family's own operations."""
    tiny_model(name)[0].save_pretrained(tmp_path)
    here, there = (sampled(common.load_policy(str(tmp_path), None, device)) for device in ("cpu", "cuda"))
    assert here.completion_ids.tolist() == there.completion_ids.tolist()
    assert (here.sampler_logprobs - there.sampler_logprobs.cpu()).abs().max() < 1e-4


# ---- Scripts ----

SCRIPTS = {
    "grpo": (train_grpo, {"kl_coef": 0.01, "offload_optimizer": True, "minibatch_size": 8, "micro_batch_tokens": 200}),
    "grpo-float32": (train_grpo, {"dtype": "float32", "dynamic_sampling": True, "truncated": "mask"}),
    "ppo": (train_ppo, {"gradient_checkpointing": True, "reward_model": "REWARD"}),
    "pg": (train_pg, {"baseline": "value", "offload_optimizer": True}),
    "kimi": (train_kimi, {"minibatch_size": 8}),
    "sft": (train_sft, {"gradient_checkpointing": True}),
    "dpo": (train_dpo, {"kl_coef": 0.1}),
    "rm": (train_rm, {"offload_optimizer": True}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_two_iterations_of_a_script(name, tmp_path):
    """Catches: a tensor left on the CPU, a dtype that doesn't fit, in a script's own lines, evaluations and saves."""
    script, changes = SCRIPTS[name]
    if changes.get("reward_model"):
        args = short_args(train_rm, tmp_path / "rm", iterations=0)
        changes = changes | {"reward_model": str(run(train_rm.main, args) / "final")}
    rl = script not in (train_sft, train_dpo, train_rm)
    args = (rl_args if rl else short_args)(script, tmp_path, device="cuda", save_every=1, **changes)
    run_dir = run(script.main, args)
    logged = scalars(run_dir)
    assert all(torch.tensor([value for _, value in values]).isfinite().all() for values in logged.values())
    assert logged.get("rollout/logprob_gap_mean", [(0, 0.0)])[-1][1] < 0.15
    assert logged["loss/skipped"][-1][1] == 0
    common.load_config(str(run_dir / "final"))


def final_weights(run_dir) -> torch.Tensor:
    model = common.load_policy(str(run_dir / "final"), None)
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.slow
@pytest.mark.parametrize("first, then", [("cuda", "cpu"), ("cpu", "cuda"), ("cuda", "cuda")])
def test_a_run_resumes_on_another_device(first, then, tmp_path):
    """Catches: a checkpoint with a device in it; moments or masters that a resume leaves where they were."""
    changes = {"dtype": "float32", "save_every": 2, "learning_rate": 1e-3}
    whole = run(train_grpo.main, rl_args(train_grpo, tmp_path / "whole", **changes | {"iterations": 4}))
    half = run(train_grpo.main, rl_args(train_grpo, tmp_path / "half", **changes, device=first))
    offload = {"offload_optimizer": True, "device": then, "iterations": 4, "resume": str(half)}
    run(train_grpo.main, rl_args(train_grpo, tmp_path / "half", **changes | offload))
    start = common.load_policy(EMBEDDED, None)
    start = torch.cat([p.detach().flatten() for p in start.parameters()])
    moved, error = (final_weights(whole) - start).norm(), (final_weights(whole) - final_weights(half)).norm()
    assert error < 0.2 * moved  # a rounding may change a sample
    assert [step for step, _ in scalars(half)["reward/total"]] == [16, 32, 48, 64]


@pytest.mark.slow
def test_stages_are_evaluated(tmp_path, capsys, pretended):
    """Catches: a second model that samples with the first one's graphs."""
    other = run(train_sft.main, short_args(train_sft, tmp_path, learning_rate=1e-3, iterations=4)) / "final"
    printed = []
    for device in ("cpu", "cuda"):
        stages = (f"base={EMBEDDED}", f"sft={other}")
        flags = {"stages": stages, "eval_problems": 12, "num_samples": 2, "device": device, "dtype": "float32"}
        capsys.readouterr()
        evaluate.main(from_flat(evaluate.Args(), flags | {"think_budget": 8}))
        out = capsys.readouterr().out
        printed.append([line for line in out.splitlines() if line.startswith(("base", "sft"))])
    assert printed[0] == printed[1] and len(printed[0]) == 2


@pytest.mark.slow
def test_the_gpu_check_prints_its_table(capsys, pretended):
    """Catches: the first command on a new machine ends in a traceback. Speed and memory are pretended, too."""
    with pytest.raises(SystemExit):
        gpu_check.main(gpu_check.Args(sizes=["mini"], rows=[16], new_tokens=8, device="cuda"))
    table = capsys.readouterr().out
    bad = [line.split("  ")[0] for line in table.splitlines() if line.endswith("BAD")]
    assert bad == ["sampling mini, 16 rows", "peak memory mini"] and "GraphDecoder" in table
    assert "save and resume mini" in table
