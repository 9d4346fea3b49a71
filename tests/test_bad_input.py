"""Bad input gets one clear line on stderr and exit code 2, before anything slow; a bad flag leaves nothing on disk."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import EMBEDDED, start
from transformers import AutoConfig

import common
import data
import evaluate
import train_dpo
import train_grpo
import train_kimi
import train_pg
import train_ppo
import train_rm
import train_sft


def refuse(main, args, capsys) -> str:
    with pytest.raises(SystemExit) as stopped:
        main(args)
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert error.count("error: ") == 1 and "Traceback" not in error
    return error


@pytest.fixture
def no_model(monkeypatch):
    """Whatever is refused here is refused before any weights are read."""

    def load_policy(*args, **kwargs):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(common, "load_policy", load_policy)


FLAGS = [
    ({"group_size": 1}, "--group-size 1: must be at least 2"),
    ({"group_size": 0}, "--group-size 0: must be 1 or more"),
    ({"minibatch_size": 4}, "--minibatch-size 4: must be a multiple of --group-size 8, at most 256"),
    ({"minibatch_size": 12}, "--minibatch-size 12: must be a multiple of --group-size 8, at most 256"),
    ({"minibatch_size": 512}, "--minibatch-size 512: must be a multiple of --group-size 8, at most 256"),
    ({"minibatch_size": 0}, "--minibatch-size 0: must be 1 or more"),
    (
        {"accuracy_weight": 0.0, "format_weight": 0.0},
        "--accuracy-weight, --format-weight, --length-weight, --language-weight, --overlong-weight are all 0",
    ),
    ({"temperature": 0.0}, "--temperature 0.0: must be more than 0"),
    ({"temperature": -1.0}, "--temperature -1.0: must be more than 0"),
    ({"temperature": float("nan")}, "--temperature nan: must be"),
    ({"learning_rate": 0.0}, "--learning-rate 0.0: must be more than 0"),
    ({"learning_rate": float("inf")}, "--learning-rate inf: must be finite"),
    ({"iterations": -1}, "--iterations -1: must be 0 or more"),
    ({"prompts_per_step": 0}, "--prompts-per-step 0: must be 1 or more"),
    ({"max_new_tokens": 0}, "--max-new-tokens 0: must be 1 or more"),
    ({"micro_batch_tokens": 0}, "--micro-batch-tokens 0: must be 1 or more"),
    ({"update_epochs": 0}, "--update-epochs 0: must be 1 or more"),
    ({"max_grad_norm": 0.0}, "--max-grad-norm 0.0: must be more than 0"),
    ({"eval_problems": 0}, "--eval-problems 0: must be 1 or more"),
    ({"clip_low": 0.0}, "--clip-low 0.0: must be more than 0"),
    ({"kl_coef": -0.1}, "--kl-coef -0.1: must be 0 or more"),
    ({"device": "cuda:99"}, "--device cuda:99: not usable on this machine"),
    ({"device": "abacus"}, "--device abacus: not usable on this machine"),
    ({"max_new_tokens": 300}, "exceed the model's context of 256"),
    ({"model": "no/such/model"}, "--model no/such/model: neither a local directory nor a hub name"),
    ({"problems": "no-such-file.jsonl"}, "no-such-file.jsonl: can't be read"),
    ({"eval_data": "no-such-file.jsonl"}, "no-such-file.jsonl: can't be read"),
]


@pytest.mark.parametrize("changes,message", FLAGS, ids=[message[:50] for _, message in FLAGS])
def test_flags(changes, message, tmp_path, capsys, no_model):
    args = train_grpo.Args(**({"model": EMBEDDED, "run_root": str(tmp_path / "runs")} | changes))
    assert message in refuse(train_grpo.main, args, capsys)
    assert not list(tmp_path.iterdir())


KIMI = [
    ({"baseline": "log-z", "tau": 0.0}, "--baseline log-z: needs --tau above 0"),
    ({"tau": -1.0}, "--tau -1.0: must be 0 or more"),
    ({"minibatch_size": 256}, "--minibatch-size 256: with one epoch at most half the batch"),
    ({"minibatch_size": 12}, "--minibatch-size 12: must be a multiple of --group-size 8, at most 256"),
    ({"length_weight": -1.0}, "--length-weight -1.0: must be 0 or more"),
]


@pytest.mark.parametrize("changes,message", KIMI, ids=[message[:50] for _, message in KIMI])
def test_kimis_flags(changes, message, tmp_path, capsys, no_model):
    args = train_kimi.Args(**({"model": EMBEDDED, "run_root": str(tmp_path / "runs")} | changes))
    assert message in refuse(train_kimi.main, args, capsys)
    assert not list(tmp_path.iterdir())


CRITICS = [
    (train_pg, {"baseline": "value", "value_minibatch_size": 0}, "--value-minibatch-size 0: must be 1 or more"),
    (train_pg, {"baseline": "value", "gamma": 1.01}, "--gamma 1.01: must be at most 1"),
    (train_ppo, {"gae_lambda": 1.5}, "--gae-lambda 1.5: must be at most 1"),
    (train_ppo, {"gae_lambda": float("nan")}, "--gae-lambda nan: must be finite"),
]


@pytest.mark.parametrize("script,changes,message", CRITICS, ids=[message[:50] for _, _, message in CRITICS])
def test_the_critics_flags(script, changes, message, tmp_path, capsys, no_model):
    args = script.Args(**({"model": EMBEDDED, "run_root": str(tmp_path / "runs")} | changes))
    assert message in refuse(script.main, args, capsys)
    assert not list(tmp_path.iterdir())


SCRIPTS = [train_pg, train_ppo, train_grpo, train_kimi, train_sft, train_rm, train_dpo]


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_run_that_can_not_fit_is_refused_before_anything_is_loaded(script, tmp_path, capsys, monkeypatch, no_model):
    """With what it takes, and that nothing would help; no run directory is left behind."""
    monkeypatch.setattr(data, "free_memory", lambda device: 30e6)
    if hasattr(script.Args, "pair_problems"):
        pairs = [{"prompt": f"{i}+1=", "chosen": "1", "rejected": "2"} for i in range(100)]
        (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
        args = script.Args(model=EMBEDDED, data=str(tmp_path / "pairs.jsonl"), run_root=str(tmp_path / "runs"))
    else:
        args = script.Args(model=EMBEDDED, run_root=str(tmp_path / "runs"))
    error = refuse(script.main, args, capsys)
    assert re.search(rf"--model {EMBEDDED}: the run takes about [01]\.\d GB \(weights 0\.0, ", error)
    assert "0.0 GB are free: no flags make it fit" in error
    assert not (tmp_path / "runs").exists()


def test_the_flags_that_would_fit_are_named(tmp_path, capsys, monkeypatch, no_model):
    """First those that change the time alone, then those that change the run."""
    args = train_grpo.Args(model=EMBEDDED, run_root=str(tmp_path / "runs"))
    args.prompts_per_step, args.group_size, config, longest = 16, 2, common.load_config(EMBEDDED), 200
    size = data.parameters(config)
    assert size == 804_864

    def fits(memory: float, **changes) -> dict | None:
        changed = replace(args, **changes)
        return data.flags_that_fit(config, size, changed, torch.float32, longest, memory, cpu=True)

    needs = data.peak(data.memory_needs(config, size, args, torch.float32, longest, cpu=True), cpu=True)
    assert fits(needs) == {} and fits(0.5e9) is None
    assert fits(needs - 1) == {"micro_batch_tokens": 4096}
    libraries = 1.15 * 0.6e9
    steps = [fits(libraries + 1.15e6 * free) for free in range(800, 10, -2)]
    order = [change for i, change in enumerate(steps) if change and change != steps[i - 1]]
    assert {"micro_batch_tokens": 1024} in order
    harder = [sorted({"gradient_checkpointing", "prompts_per_step"} & change.keys()) for change in order]
    assert [] in harder and ["gradient_checkpointing"] in harder and "prompts_per_step" in harder[-1]
    assert harder.index([]) < harder.index(["gradient_checkpointing"])
    assert fits(libraries + 2e8, prompts_per_step=10_000)["prompts_per_step"] < 10_000
    for change in order:  # what is advised does fit
        assert fits(libraries + 9.2e8, **change) == {}

    monkeypatch.setattr(data, "free_memory", lambda device: libraries + 8e7)  # for this script's own, shorter prompts
    assert "0.8 GB are free: it would fit with --micro-batch-tokens 1024" in refuse(train_grpo.main, args, capsys)


def test_what_a_run_is_reckoned_to_take():
    """Weights, masters and Adam's moments of every trained model; the KV cache by its shape."""
    config = common.load_config(EMBEDDED)
    assert data.cache_bytes(config, torch.float32) == 2 * 4 * 4 * 32 * 4  # keys and values, layers, heads, size, bytes
    assert data.cache_bytes(config, torch.bfloat16) == 2 * 4 * 4 * 32 * 2
    assert data.free_memory(torch.device("cpu")) > 1e8
    grpo = data.memory_needs(config, 1000, train_grpo.Args(), torch.float32, 30, cpu=True)
    assert grpo["weights"] == 4000 and grpo["optimizer"] == 8000
    assert data.memory_needs(config, 1000, train_grpo.Args(kl_coef=0.1), torch.float32, 30, cpu=True)["weights"] == 8000
    assert data.memory_needs(config, 1000, train_grpo.Args(), torch.bfloat16, 30, cpu=True)["optimizer"] == 12_000
    ppo = data.memory_needs(config, 1000, train_ppo.Args(kl_coef=0.05), torch.float32, 30, cpu=True)
    assert ppo["weights"] == 12_000 and ppo["optimizer"] == 16_000  # policy, critic, and a reference
    cached = 32 * 30 + 256 * 40
    assert grpo["sampling"] == cached * data.cache_bytes(config, torch.float32) + 12 * 256 * 103


@pytest.mark.parametrize("message", ["CUDA out of memory", "DefaultCPUAllocator: can't allocate memory"])
def test_out_of_memory_is_one_line(message, capsys):
    error = torch.OutOfMemoryError(message) if "CUDA" in message else RuntimeError(message)
    common.explain(type(error), error, None)
    printed = capsys.readouterr().err
    assert printed.startswith("error: out of memory") and "--micro-batch-tokens" in printed and printed.count("\n") == 1
    common.explain(ValueError, ValueError("something else"), None)
    assert "ValueError: something else" in capsys.readouterr().err


def test_curriculum_without_difficulties(tmp_path, capsys):
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps({"question": f"{i}+1=", "answer": "1"}) + "\n" for i in range(60)))
    args = train_kimi.Args(model=EMBEDDED, problems=str(path), problem_sampling="curriculum", run_root=str(tmp_path))
    assert "--problem-sampling curriculum: needs problems that all have" in refuse(train_kimi.main, args, capsys)


def test_reward_models_that_do_not_fit(tmp_path, capsys, monkeypatch):
    for name, changes in (("labels", {"num_labels": 2}), ("vocabulary", {"num_labels": 1, "vocab_size": 99})):
        AutoConfig.from_pretrained(EMBEDDED, **changes).save_pretrained(tmp_path / name)
    args = {"model": EMBEDDED, "run_root": str(tmp_path / "runs"), "device": "cpu", "eval_problems": 6}
    error = refuse(train_ppo.main, train_ppo.Args(reward_model=str(tmp_path / "vocabulary"), **args), capsys)
    assert "has another vocabulary than --model" in error
    error = refuse(train_ppo.main, train_ppo.Args(reward_model=str(tmp_path / "labels"), **args), capsys)
    assert "has 2 labels, a reward model has one" in error


@pytest.mark.parametrize("script", ["train_grpo.py", "train_sft.py", "evaluate.py"])
def test_from_the_command_line(script):
    """What tyro finds, what we find, and --help: in a process of its own, with the exit code."""
    calls = ("--no-such-flag", "1"), ("--model", "/nowhere"), ("--help",)
    processes = [start(script, *call) for call in calls]  # all at once: they mostly import
    (_, unknown), (_, ours), (shown, _) = (process.communicate() for process in processes)
    assert [process.returncode for process in processes] == [2, 2, 0]
    assert unknown and "Traceback" not in unknown and "--system-prompt" in shown
    assert ours.startswith("error: --model /nowhere: ") and ours.count("\n") == 1


def copy_model(target: Path) -> Path:
    shutil.copytree(EMBEDDED, target)
    return target


def test_directory_without_a_config(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    error = refuse(train_grpo.main, train_grpo.Args(model=str(tmp_path / "empty")), capsys)
    assert "the directory has no config.json" in error


def test_broken_config(tmp_path, capsys):
    model = copy_model(tmp_path / "model")
    (model / "config.json").write_text("{")
    error = refuse(train_grpo.main, train_grpo.Args(model=str(model)), capsys)
    assert f"--model {model}: its config can't be read" in error


def test_code_beside_a_model_is_never_run(tmp_path, capsys, monkeypatch):
    """A config that names a modeling_*.py is refused without a question on stdin."""
    model = copy_model(tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"}}
    (model / "config.json").write_text(json.dumps(config))
    (model / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    assert f"--model {model}" in refuse(train_grpo.main, train_grpo.Args(model=str(model)), capsys)
    assert not (tmp_path / "ran").exists()


def test_tokenizer_without_eos(tmp_path, capsys):
    model = copy_model(tmp_path / "model")
    config = json.loads((model / "tokenizer_config.json").read_text())
    config.pop("eos_token")
    (model / "tokenizer_config.json").write_text(json.dumps(config))
    assert "its tokenizer has no EOS token" in refuse(train_grpo.main, train_grpo.Args(model=str(model)), capsys)


def test_missing_or_truncated_weights(tmp_path, capsys):
    model = copy_model(tmp_path / "model")
    content = (model / "model.safetensors").read_bytes()
    args = train_grpo.Args(model=str(model), run_root=str(tmp_path / "runs"), device="cpu")
    (model / "model.safetensors").write_bytes(content[:1000])
    assert "its weights can't be loaded" in refuse(train_grpo.main, args, capsys)
    (model / "model.safetensors").unlink()
    assert "its weights can't be loaded" in refuse(train_grpo.main, args, capsys)


def test_no_chat_template_is_a_note_and_the_bare_question(tmp_path, capsys):
    model = copy_model(tmp_path / "model")
    (model / "chat_template.jinja").unlink()
    tokenizer = common.load_tokenizer(str(model))
    assert not tokenizer.chat_template
    assert "has no chat template: prompts are the bare questions" in capsys.readouterr().err


def test_run_root_that_can_not_be_written(tmp_path, capsys, no_model):
    (tmp_path / "file").write_text("in the way")
    args = train_grpo.Args(model=EMBEDDED, run_root=str(tmp_path / "file" / "runs"), eval_problems=6)
    assert f"--run-root {tmp_path}/file/runs: " in refuse(train_grpo.main, args, capsys)


def test_prompt_longer_than_the_context(tmp_path, capsys, no_model):
    rows = [{"question": f"{i}+1=", "answer": "1", "id": f"short {i}"} for i in range(40)]
    rows.append({"question": "1+" * 150 + "1=", "answer": "151", "id": "the long one"})
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    args = train_grpo.Args(model=EMBEDDED, problems=str(path), run_root=str(tmp_path / "runs"))
    error = refuse(train_grpo.main, args, capsys)
    assert "'the long one'" in error and "302 prompt tokens" in error


def test_sft_flags(tmp_path, capsys, no_model):
    runs = str(tmp_path / "runs")
    none = train_sft.Args(model=EMBEDDED, demonstrations=0, run_root=runs)
    assert "--demonstrations 0: must be 1 or more" in refuse(train_sft.main, none, capsys)
    path = tmp_path / "d.jsonl"
    path.write_text('{"prompt": "1+1=", "completion": "2"}\n')
    args = train_sft.Args(model=EMBEDDED, data=str(path), run_root=runs)
    assert "--minibatch-size 128: only" in refuse(train_sft.main, args, capsys)
    path.write_text('{"prompt": "1+1=", "completion": "2"}\n{"prompt": "1+1="}\n')
    assert "d.jsonl:2: no field 'completion'" in refuse(train_sft.main, args, capsys)
    assert not (tmp_path / "runs").exists()


def test_sft_drops_and_counts_what_the_context_would_cut(tmp_path, capsys):
    """Pins: truncation that eats the end of a completion, where the answer and the EOS stand."""
    rows = [{"prompt": f"{i}+1=", "completion": "2" * (300 if i < 3 else 5)} for i in range(40)]
    path = tmp_path / "d.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    args = train_sft.Args(
        model=EMBEDDED, data=str(path), run_root=str(tmp_path), iterations=1, minibatch_size=8, eval_problems=6
    )
    train_sft.main(args)
    assert "3 of 40 demonstrations exceed the context of 256: dropped" in capsys.readouterr().out


def test_evaluate_output_directory_is_checked_first(tmp_path, capsys, no_model):
    args = evaluate.Args(model=EMBEDDED, output=str(tmp_path / "missing" / "samples.jsonl"))
    assert "--output" in refuse(evaluate.main, args, capsys)
    args = evaluate.Args(model=EMBEDDED, output=str(tmp_path))
    assert f"--output {tmp_path}: is a directory" in refuse(evaluate.main, args, capsys)


def test_fewer_iterations_than_the_run_has_done(tmp_path, capsys):
    changes = {"device": "cpu", "prompts_per_step": 2, "group_size": 2, "eval_problems": 6, "save_every": 1}
    train_grpo.main(train_grpo.Args(model=EMBEDDED, run_root=str(tmp_path), iterations=2, **changes))
    (run_dir,) = tmp_path.iterdir()
    args = common.parse_args(train_grpo.Args, ["--resume", str(run_dir), "--iterations", "1"])
    assert "--iterations 1: the run has done 2 already" in refuse(train_grpo.main, args, capsys)
