"""Compatibility: models load from the hub's cache, and a run's results load in plain transformers."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import EMBEDDED, refusal, rl_args, run, short_args
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, pipeline

import common
import train_grpo
import train_rm
from data import encode_prompts


def hub_cache(home: Path, name: str) -> None:
    """Puts the embedded model where huggingface_hub keeps its downloads."""
    repository = home / "hub" / ("models--" + name.replace("/", "--"))
    shutil.copytree(EMBEDDED, repository / "snapshots" / "0123456789")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123456789")


@pytest.mark.slow
def test_a_hub_name_is_found_in_the_cache_without_a_network(tmp_path):
    """As run by a user with HF_HUB_OFFLINE=1 and a filled cache."""
    hub_cache(tmp_path / "home", "someone/tiny")
    env = os.environ | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    small = "--iterations 1 --prompts-per-step 2 --group-size 2 --eval-problems 2 --run-root"

    command = [sys.executable, "train_grpo.py", "--model", "someone/tiny", *small.split(), str(tmp_path / "runs")]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (run_dir,) = (tmp_path / "runs").iterdir()
    assert "__tiny__" in run_dir.name and (run_dir / "final" / "model.safetensors").exists()


def test_a_hub_name_that_is_not_there_is_one_line(capsys):
    error = refusal(train_grpo.main, train_grpo.Args(model="someone/else"), capsys)
    assert "--model someone/else: neither a local directory nor a hub name that can be reached" in error


def test_final_is_a_model_like_any_other(tmp_path):
    """Plain transformers loads it, and with it the chat pipeline writes what our sampler writes."""
    final = run(train_grpo.main, rl_args(train_grpo, tmp_path, iterations=1)) / "final"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(final), AutoTokenizer.from_pretrained(final)
    ours = common.load_policy(str(final), None)
    prompt = encode_prompts(tokenizer, ["12+7-5="])
    rollout = common.sample_groups(ours, prompt, 1, 30, temperature=0)
    expected = tokenizer.decode(rollout.completion_ids[0][rollout.mask[0]], skip_special_tokens=True)
    torch.set_float32_matmul_precision("highest")
    chat = pipeline("text-generation", model=model, tokenizer=tokenizer)
    written = chat([{"role": "user", "content": "12+7-5="}], max_new_tokens=30, do_sample=False)
    assert written[0]["generated_text"][-1] == {"role": "assistant", "content": expected}


def test_a_reward_model_is_a_sequence_classifier_like_any_other(tmp_path):
    final = run(train_rm.main, short_args(train_rm, tmp_path, iterations=1, pair_problems=20)) / "final"
    model = AutoModelForSequenceClassification.from_pretrained(final)
    assert model.config.num_labels == 1 and model(torch.tensor([[5, 6, 1]])).logits.shape == (1, 1)
