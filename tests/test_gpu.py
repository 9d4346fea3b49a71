"""The same code on a GPU. Skipped where there is none."""

import pytest
import torch
from conftest import EMBEDDED, make_model, run, short_args

import common
import train_grpo
from common import completion_logprobs, sample_groups
from data import decode, encode_prompts, load_problems
from plumbing.engine import BATCHES, GraphDecoder, PackedGroups, PaddedRows, PlainDecoder, batch_class
from plumbing.runs import load_checkpoint

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def test_greedy_completions_are_the_cpus():
    tokenizer = common.load_tokenizer(EMBEDDED)
    prompts = encode_prompts(tokenizer, [p.question for p in load_problems("arithmetic", "eval", 60)])
    texts = []
    for device in ("cpu", "cuda"):
        policy = common.load_policy(EMBEDDED, None, device)
        torch.set_float32_matmul_precision("highest")
        texts.append(decode(tokenizer, sample_groups(policy, prompts, 1, 40, temperature=0)))
    assert sum(a == b for a, b in zip(*texts, strict=True)) >= 58  # a tie may fall the other way


def test_sampler_and_trainer_agree_in_bf16():
    tokenizer = common.load_tokenizer(EMBEDDED)
    policy = common.load_policy(EMBEDDED, None, "cuda", torch.bfloat16)
    prompts = encode_prompts(tokenizer, [p.question for p in load_problems("arithmetic", "eval", 60)])
    rollout = sample_groups(policy, prompts, 8, 40)
    with torch.no_grad():
        logprobs, _ = completion_logprobs(policy, rollout, list(range(480)))
    assert (logprobs - rollout.sampler_logprobs)[rollout.mask].abs().mean() < 0.05


def test_a_run_learns(tmp_path):
    flags = {"iterations": 30, "eval_problems": 60, "device": "cuda", "prompts_per_step": 32, "group_size": 8}
    state = load_checkpoint(str(run(train_grpo.main, short_args(train_grpo, tmp_path, save_every=30, **flags))))
    masters, progress = state["stateful"]["optimizer"]["masters"], state["progress"]
    assert masters and all(master.dtype == torch.float32 for master in masters)
    assert progress["scores"]["eval/accuracy"] > progress["before"]["eval/accuracy"] + 0.1


def test_the_graph_equals_the_plain_path_and_sees_new_weights(monkeypatch):
    """Two batches of one shape: the second reuses the first one's graphs after the weights have changed in place."""
    captures = []
    capture = GraphDecoder.capture
    monkeypatch.setattr(GraphDecoder, "capture", lambda self, R: captures.append(R) or capture(self, R))
    tokenizer = common.load_tokenizer(EMBEDDED)
    policy = common.load_policy(EMBEDDED, None, "cuda")
    torch.set_float32_matmul_precision("highest")
    assert batch_class(policy) is PackedGroups
    prompts = encode_prompts(tokenizer, [p.question for p in load_problems("arithmetic", "eval", 80)])
    prompts = [ids * (1 + 5 * (i % 2)) for i, ids in enumerate(prompts)]  # some much longer
    for batch in (prompts[:40], prompts[40:]):
        rollouts = []
        for decoder in (PlainDecoder, GraphDecoder):
            monkeypatch.setattr(common, "decoder_class", lambda model, decoder=decoder: decoder)
            rollouts.append(sample_groups(policy, batch, 4, 40, temperature=0))
        plain, graph = (decode(tokenizer, rollout) for rollout in rollouts)
        assert sum(a == b for a, b in zip(plain, graph, strict=True)) >= 0.97 * len(plain)
        with torch.no_grad():
            for parameter in policy.parameters():
                parameter.mul_(1.02)
    assert len(captures) == len(set(captures)) == len(GraphDecoder.kept[policy]["graphs"])  # no size is captured twice


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["qwen2", "llama"])
def test_packed_gradients_are_the_padded_ones(family, dtype):
    """The GPU's attention (fused, with a mask, grouped heads) against the slow path."""
    policy = make_model(family).to("cuda", getattr(torch, dtype))
    torch.set_float32_matmul_precision("highest")
    prompts = [[3 + (5 * i + j) % 20 for j in range(4 + i)] for i in range(8)]
    rollout = sample_groups(policy, prompts, 4, 24, seed=1, eos_token_ids=1)
    gradients = []
    assert batch_class(policy) is PackedGroups
    for packed in (True, False):
        BATCHES[policy] = PackedGroups if packed else PaddedRows
        policy.zero_grad()
        completion_logprobs(policy, rollout, list(range(32)))[0].sum().backward()
        gradients.append(torch.cat([p.grad.float().flatten() for p in policy.parameters()]))
    limit = 1e-3 if dtype == "float32" else 0.05
    assert (gradients[0] - gradients[1]).norm() < limit * gradients[1].norm()
