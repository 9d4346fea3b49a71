"""Whole runs on a GPU: every script, stages, resumes, families of models, the GPU check. Skipped where there is none;
test_pretended_gpu.py runs them on a pretended one."""

import inspect

import pytest
import torch
from conftest import EMBEDDED, make_model, refusal, rl_args, run, scalars, short_args, slow_case
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
from plumbing import engine, flags, logs
from plumbing.engine import GraphDecoder, GroupDecoder, decoder_class
from plumbing.flags import from_flat

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.fixture
def pretended(request):
    """The pretended GPU, on which results are the CPU's."""
    gpu = getattr(request.config, "pretended", None)
    return gpu or pytest.skip("needs the pretended GPU: a real one rounds otherwise")


def sampled(model, prompts=None) -> common.Rollout:
    torch.set_float32_matmul_precision("highest")
    prompts = prompts or [[3 + (5 * i + j) % 20 for j in range(4 + 3 * i)] for i in range(4)]
    return common.sample_groups(model, prompts, 4, 20, seed=1, eos_token_ids=[1, 7, 20, 33])


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


# ---- Cards ----


@pytest.mark.parametrize("capability, dtype", [((7, 5), torch.float32), ((8, 0), torch.bfloat16)])
def test_auto_is_a_dtype_that_the_card_computes_in(capability, dtype, pretended, monkeypatch, capsys):
    """Catches: bfloat16 on a T4, which ends at the first decoded token; attention that stores all scores."""
    monkeypatch.setattr(pretended, "capability", capability)
    device = common.resolve_device("auto")
    assert common.resolve_dtype("auto", device) == dtype
    printed = capsys.readouterr().out
    assert "device: cuda, pretended, 20.0 of 24.0 GB free" in printed and f"dtype: {str(dtype)[6:]}" in printed
    if dtype == torch.float32:
        error = refusal(lambda _: common.resolve_dtype("bfloat16", device), None, capsys)
        assert "--dtype bfloat16" in error and "--dtype float32" in error
    model = make_model("qwen2").to("cuda", dtype)
    pretended.attention.clear()
    rollout = sampled(model)
    common.completion_logprobs(model, rollout, list(range(16)))[0].sum().backward()
    assert decoder_class(model) is GraphDecoder and "decoder: GraphDecoder" in capsys.readouterr().out
    ours = {line.split(" ", 1)[1] for line in pretended.attention if engine_attention(line)}
    prompts = "flash" if dtype == torch.bfloat16 else "efficient"
    assert ours == {f"{prompts}, {dtype}, causal", f"efficient, {dtype}, masked"}


def engine_attention(line: str) -> bool:
    """Whether our own attention made this call, not a model's, which the trial runs."""
    code, first = inspect.getsourcelines(engine.attention)
    return first <= int(line.partition("engine.py:")[2].partition(" ")[0] or 0) < first + len(code)


def test_a_card_that_this_torch_has_no_kernels_for_is_refused(pretended, monkeypatch, capsys):
    """Catches: a check that allocates but computes nothing; advice that names the device that failed."""
    monkeypatch.setattr(pretended, "kernels", False)
    monkeypatch.setattr(pretended, "devices", 3)
    for device, others in (("auto", "cuda:1 or cuda:2"), ("cuda", "cuda:1 or cuda:2"), ("cuda:1", "cuda:0 or cuda:2")):
        with pytest.raises(SystemExit, match="2"):
            common.resolve_device(device)
        error = capsys.readouterr().err
        assert f"--device {device}: not usable" in error and "no kernel image" in error
        assert error.endswith(f"try --device {others} or cpu\n") and error.count("\n") == 1


@pytest.mark.parametrize("capability, decoder", [((8, 0), GroupDecoder), slow_case((9, 0), GraphDecoder)])
def test_a_step_that_waits_is_not_captured(capability, decoder, pretended, monkeypatch, capsys):
    """Catches: experts whose step reads its offsets on the CPU end the run; no graphs on a card with a kernel."""
    monkeypatch.setattr(pretended, "capability", capability)
    model = tiny_model("qwen3_moe")[0].to("cuda", torch.bfloat16)
    captures = len(pretended.graphs)
    assert decoder_class(model) is decoder and pretended.sync_debug_mode == "default"
    said = capsys.readouterr().err
    assert ("sampling runs without CUDA graphs (GraphDecoder: called a synchronizing" in said) == (
        decoder is GroupDecoder
    )
    assert (len(pretended.graphs) > captures) == (decoder is GraphDecoder)
    sampled(model)


def test_out_of_memory_in_a_capture_is_out_of_memory(pretended, monkeypatch, capsys):
    """Catches: the error of the capture's end, which hides why; a slower decoder that is taken in silence."""
    model = make_model("llama").to("cuda")
    calls = []

    def store(decoder, buffer, new):
        calls.append(buffer)
        if pretended.recording is not None:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(GraphDecoder, "store", store)
    with pytest.raises(torch.AcceleratorError) as raised:
        decoder_class(model)
    assert flags.out_of_memory(raised.value) and calls
    flags.explain(raised.value)
    assert "error: out of memory" in capsys.readouterr().err


# ---- Waits, captures, memory ----


def test_an_evaluation_captures_each_size_once(pretended):
    """Catches: a narrower or smaller batch whose graphs are captured again."""
    model = make_model("llama", max_position_embeddings=512).to("cuda")
    decoder_class(model)
    captures = len(pretended.graphs)
    for count, length in ((4, 70), (4, 5), (3, 69)):
        rollout = sampled(model, prompts=[[3 + i] * (length - i) for i in range(count)])
        plain = sampled(make_model("llama", max_position_embeddings=512), prompts=rollout.prompt_ids)
        assert plain.completion_ids.tolist() == rollout.completion_ids.tolist()
    assert len(pretended.graphs[captures:]) <= 3  # 16, 8 and 4 rows


def test_a_micro_batch_is_packed_by_one_copy(pretended):
    """Catches: indices that are copied one by one, logged values that are read one by one."""
    model = make_model("llama").to("cuda")
    rollout = sampled(model)
    common.completion_logprobs(model, rollout, list(range(16)))
    before = pretended.waits.total()
    logprobs, entropy = common.completion_logprobs(model, rollout, list(range(16)))
    loss, values = train_grpo.grpo_loss(
        logprobs, logprobs.detach(), None, logprobs.detach(), rollout.mask, rollout.mask.float(), 0.2, 0.2, 0.0
    )
    metrics = logs.Metrics()
    metrics.add(values | logs.token_metrics(rollout, list(range(16)), entropy, logprobs.detach()), rollout.mask.sum())
    loss.backward()
    assert pretended.waits.total() - before <= 6
    assert metrics.means()["ratio_max"] == 1.0 and pretended.waits.total() - before <= 8


def test_offloaded_masters_are_not_pinned(pretended):
    """Catches: blocks rounded up to powers of two, for transfers that don't use them."""
    common.MasterAdamW(make_model("llama").to("cuda"), 1e-3, offload=True)
    assert pretended.pinned == 0


# ---- Scripts ----

SCRIPTS = {
    "grpo": (train_grpo, {"kl_coef": 0.01, "offload_optimizer": True, "minibatch_size": 8, "micro_batch_tokens": 200}),
    "grpo-float32": (train_grpo, {"dtype": "float32", "dynamic_sampling": True, "truncated": "mask"}),
    "ppo": (train_ppo, {"gradient_checkpointing": True, "reward_model": "REWARD"}),
    "pg": (train_pg, {"baseline": "value", "offload_optimizer": True}),
    "kimi": (train_kimi, {"minibatch_size": 4}),
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
    rl, small = script not in (train_sft, train_dpo, train_rm), {"eval_problems": 2}
    small |= {"prompts_per_step": 2} if rl else {"minibatch_size": 4}
    small |= {"device": "cuda", "save_every": 1} | ({} if script is train_rm else {"max_new_tokens": 18})
    args = (rl_args if rl else short_args)(script, tmp_path, **small | changes)
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
@pytest.mark.parametrize("first, then", [("cuda:0", "cpu"), ("cpu", "cuda"), ("cuda", "cuda")])
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
@pytest.mark.parametrize("capability", [(8, 0), (7, 5)])
def test_the_gpu_check_prints_its_table(capability, capsys, pretended, monkeypatch):
    """Catches: the first command on a new machine ends in a traceback. Speed and memory are pretended, too."""
    monkeypatch.setattr(pretended, "capability", capability)
    with pytest.raises(SystemExit):
        gpu_check.main(gpu_check.Args(sizes=["mini"], rows=[16], new_tokens=8, device="cuda"))
    table = capsys.readouterr().out
    bad = [line.split("  ")[0] for line in table.splitlines() if line.endswith("BAD")]
    assert bad == ["sampling mini, 16 rows", "peak memory mini"] and "GraphDecoder" in table
    assert "save and resume mini" in table
