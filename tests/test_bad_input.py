"""Bad input gets one clear line on stderr and exit code 2, before anything slow; a bad flag leaves nothing on disk."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import EMBEDDED, run, short_args, start
from transformers import AutoConfig

import common
import evaluate
import train_dpo
import train_grpo
import train_kimi
import train_pg
import train_ppo
import train_rm
import train_sft
from plumbing import flags
from plumbing.flags import parse_args


def refuse(script, flags: dict, capsys) -> str:
    """Stderr of a command that must end with exit code 2. flags: by name; a value, or True for a switch."""
    argv = []
    for name, value in flags.items():
        argv += ["--" + name.replace("_", "-"), *([] if value is True else [str(value)])]
    with pytest.raises(SystemExit) as stopped:
        script.main(parse_args(script.Args, argv))
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert error.count("error: ") == 1 and "Traceback" not in error
    return error


def write_lines(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def no_model(monkeypatch):
    """Fails the test if weights are read: bad input must be refused before that."""

    def load_weights(*args, **kwargs):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(common, "load_weights", load_weights)


@pytest.fixture(scope="session")
def few(tmp_path_factory) -> str:
    """A small file of problems, quick to read."""
    rows = [{"question": f"{i}+1=", "answer": str(i + 1)} for i in range(60)]
    return write_lines(tmp_path_factory.mktemp("few") / "problems.jsonl", rows)


NO_WEIGHT = {"accuracy_weight": 0, "format_weight": 0}
ALL_0 = "--accuracy-weight, --format-weight, --length-weight, --language-weight, --overlong-weight are all 0"
FLAGS = [
    (
        train_grpo,
        NO_WEIGHT | {"dynamic_sampling": True, "reward_model": "missing"},
        "--dynamic-sampling: needs a reward by rule with a weight",
    ),
    (train_grpo, {"group_size": 1}, "--group-size 1: must be 2 or more"),
    (train_grpo, {"group_size": 0}, "--group-size 0: must be 2 or more"),
    (train_grpo, {"minibatch_size": 4}, "--minibatch-size 4: must be a multiple of --group-size 8, at most 256"),
    (train_grpo, {"minibatch_size": 12}, "--minibatch-size 12: must be a multiple of --group-size 8, at most 256"),
    (train_grpo, {"minibatch_size": 512}, "--minibatch-size 512: must be a multiple of --group-size 8, at most 256"),
    (train_grpo, {"minibatch_size": 0}, "--minibatch-size 0: must be 1 or more"),
    (train_grpo, NO_WEIGHT, ALL_0),
    (train_grpo, {"temperature": 0}, "--temperature 0.0: must be more than 0"),
    (train_grpo, {"temperature": -1}, "--temperature -1.0: must be more than 0"),
    (train_grpo, {"temperature": "nan"}, "--temperature nan: must be"),
    (train_grpo, {"learning_rate": 0}, "--learning-rate 0.0: must be more than 0"),
    (train_grpo, {"learning_rate": "inf"}, "--learning-rate inf: must be finite"),
    (train_grpo, {"iterations": -1}, "--iterations -1: must be 0 or more"),
    (train_grpo, {"prompts_per_step": 0}, "--prompts-per-step 0: must be 1 or more"),
    (train_grpo, {"max_new_tokens": 0}, "--max-new-tokens 0: must be 1 or more"),
    (train_grpo, {"micro_batch_tokens": 0}, "--micro-batch-tokens 0: must be 1 or more"),
    (train_grpo, {"update_epochs": 0}, "--update-epochs 0: must be 1 or more"),
    (train_grpo, {"max_grad_norm": 0}, "--max-grad-norm 0.0: must be more than 0"),
    (train_grpo, {"eval_problems": 0}, "--eval-problems 0: must be 1 or more"),
    (train_grpo, {"clip_low": 0}, "--clip-low 0.0: must be more than 0"),
    (train_grpo, {"kl_coef": -0.1}, "--kl-coef -0.1: must be 0 or more"),
    (train_grpo, {"overlong_weight": 1, "overlong_buffer": 41}, "--overlong-buffer 41: must be at most --max-new-t"),
    (train_grpo, {"device": "cuda:99"}, "--device cuda:99: not usable on this machine"),
    (train_grpo, {"device": "abacus"}, "--device abacus: not usable on this machine"),
    (train_grpo, {"max_new_tokens": 300}, "exceed the model's context of 256"),
    (train_grpo, {"model": "no/such/model"}, "--model no/such/model: neither a local directory nor a hub name"),
    (train_grpo, {"problems": "no-such-file.jsonl"}, "no-such-file.jsonl: can't be read"),
    (train_grpo, {"eval_data": "no-such-file.jsonl"}, "no-such-file.jsonl: can't be read"),
    (
        train_grpo,
        {"judge_model": "a/b", "verifier_model": "a/b"},
        "--judge-model and --verifier-model: only one of them",
    ),
    (train_grpo, {"reward_model": EMBEDDED}, f"--reward-model {EMBEDDED}: has 2 labels, a reward model has one"),
    (train_grpo, {"priority_floor": 1.5}, "--priority-floor 1.5: must be 0 or more and at most 1"),
    (train_kimi, {"group_size": 1}, "--group-size 1: must be 2 or more"),
    (train_kimi, {"baseline": "log-z", "tau": 0}, "--baseline log-z: needs --tau above 0"),
    (train_kimi, {"tau": -1}, "--tau -1.0: must be 0 or more"),
    (train_kimi, {"minibatch_size": 256}, "--minibatch-size 256: one update per iteration, but tau acts from the 2nd"),
    (train_kimi, {"minibatch_size": 12}, "--minibatch-size 12: must be a multiple of --group-size 8, at most 256"),
    (train_kimi, {"length_weight": -1}, "--length-weight -1.0: must be 0 or more"),
    (train_kimi, NO_WEIGHT, ALL_0),
    (train_pg, NO_WEIGHT, ALL_0),
    (train_pg, {"value_minibatch_size": 0}, "--value-minibatch-size 0: must be 1 or more"),
    (train_pg, {"gamma": 1.01}, "--gamma 1.01: must be 0 or more and at most 1"),
    (train_ppo, NO_WEIGHT, ALL_0),
    (train_ppo, {"gae_lambda": 1.5}, "--gae-lambda 1.5: must be 0 or more and at most 1"),
    (train_ppo, {"gae_lambda": "nan"}, "--gae-lambda nan: must be finite"),
    (train_ppo, {"minibatch_size": 12}, "--minibatch-size 12: must be a multiple of --group-size 8, at most 256"),
    (train_sft, {"demonstrations": 0}, "--demonstrations 0: must be 1 or more"),
    (train_dpo, {"loss": "simpo", "kl_coef": 0.1}, "--loss simpo has no reference: --kl-coef doesn't"),
    (
        train_dpo,
        {"problems": "countdown"},
        "--data arithmetic-pairs: its pairs are no training data for --problems countdown",
    ),
    (train_dpo, {"label_smoothing": 0.5}, "--label-smoothing 0.5: must be under 0.5, and 0 with --loss ipo"),
    (train_dpo, {"label_smoothing": 0.1, "loss": "ipo"}, "--label-smoothing 0.1: must be under 0.5, and 0 with --loss"),
    (train_rm, {"max_pairs_per_prompt": 0}, "--max-pairs-per-prompt 0: must be 1 or more"),
]


@pytest.mark.parametrize(
    ("script", "flags", "said"), FLAGS, ids=[f"{script.__name__} {said[:40]}" for script, _, said in FLAGS]
)
def test_flags(script, flags, said, tmp_path, capsys, no_model, few):
    """Catches: a bad flag, or two that don't go together, found after weights are loaded or leaving a run directory."""
    data = {"problems": few} if hasattr(script.Args, "problems") else {}
    assert said in refuse(script, {"model": EMBEDDED, "run_root": tmp_path / "runs"} | data | flags, capsys)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
        MemoryError(),
    ],
    ids=repr,
)
def test_out_of_memory_is_one_line(error, capsys):
    """In every command, with the flags that it has; also behind the error of a capture that it broke."""
    try:
        try:
            raise error
        except Exception as cause:
            raise RuntimeError("capture_end") from cause
    except RuntimeError as hidden:
        lowered = {train_grpo: "--micro-batch-tokens or --prompts-per-step", evaluate: "--batch-size"}
        for script, named in lowered.items():
            assert flags.explain(hidden, script.Args()) == 1
            printed = capsys.readouterr().err
            assert printed.startswith("error: out of memory") and named in printed and printed.count("\n") == 1
    with pytest.raises(ValueError):
        flags.explain(ValueError("something else"))


def test_curriculum_without_difficulties(tmp_path, capsys, no_model, few):
    flags = {"model": EMBEDDED, "problems": few, "problem_sampling": "curriculum", "run_root": tmp_path / "runs"}
    assert "--problem-sampling curriculum: needs problems that all have" in refuse(train_kimi, flags, capsys)
    assert not (tmp_path / "runs").exists()


def test_reward_models_that_do_not_fit(tmp_path, capsys, few):
    for name, changes in (("labels", {"num_labels": 2}), ("vocabulary", {"num_labels": 1, "vocab_size": 99})):
        AutoConfig.from_pretrained(EMBEDDED, **changes).save_pretrained(tmp_path / name)
    flags = {"model": EMBEDDED, "run_root": tmp_path / "runs", "device": "cpu", "problems": few}
    error = refuse(train_ppo, {"reward_model": tmp_path / "vocabulary"} | flags, capsys)
    assert "its tokenizer can't be loaded" in error
    assert not (tmp_path / "runs").exists()
    error = refuse(train_ppo, {"reward_model": tmp_path / "labels"} | flags, capsys)
    assert "has 2 labels, a reward model has one" in error


UNKNOWN, OURS, HELP = ["--no-such-flag", "1"], ["--model", "/nowhere"], ["--help"]
CALLS = [
    ("train_grpo.py", OURS),
    pytest.param("train_sft.py", UNKNOWN, marks=pytest.mark.slow),
    pytest.param("evaluate.py", HELP, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("script", "call"), CALLS)
def test_from_the_command_line(script, call):
    """An error that tyro finds, one that we find, and --help, each with its exit code in its own process."""
    process = start(script, *call)
    shown, error = process.communicate()
    assert process.returncode == (0 if call is HELP else 2)
    assert "Traceback" not in error
    if call is OURS:
        assert error.startswith("error: --model /nowhere: ") and error.count("\n") == 1
    else:
        assert "--system-prompt" in shown if call is HELP else "--no-such-flag" in error


def copy_model(target: Path) -> Path:
    shutil.copytree(EMBEDDED, target)
    return target


def test_directory_without_a_config(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert "the directory has no config.json" in refuse(train_grpo, {"model": tmp_path / "empty"}, capsys)


def test_broken_config(tmp_path, capsys):
    model = copy_model(tmp_path / "model")
    (model / "config.json").write_text("{")
    assert f"--model {model}: its config can't be read" in refuse(train_grpo, {"model": model}, capsys)


def test_code_beside_a_model_is_never_run(tmp_path, capsys, monkeypatch):
    """A config that names a modeling_*.py is refused without a question on stdin."""
    model = copy_model(tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"}}
    (model / "config.json").write_text(json.dumps(config))
    (model / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    assert f"--model {model}" in refuse(train_grpo, {"model": model}, capsys)
    assert not (tmp_path / "ran").exists()


def test_tokenizer_without_eos(tmp_path, capsys):
    model = copy_model(tmp_path / "model")
    config = json.loads((model / "tokenizer_config.json").read_text())
    config.pop("eos_token")
    (model / "tokenizer_config.json").write_text(json.dumps(config))
    assert "its tokenizer has no EOS token" in refuse(train_grpo, {"model": model}, capsys)


def test_missing_or_truncated_weights(tmp_path, capsys, few):
    model = copy_model(tmp_path / "model")
    content = (model / "model.safetensors").read_bytes()
    flags = {"model": model, "run_root": tmp_path / "runs", "device": "cpu", "problems": few}
    (model / "model.safetensors").write_bytes(content[:1000])
    assert "its weights can't be loaded" in refuse(train_grpo, flags, capsys)
    (model / "model.safetensors").unlink()
    assert "its weights can't be loaded" in refuse(train_grpo, flags, capsys)


def test_no_chat_template_is_a_note_and_the_bare_question(tmp_path, capsys):
    model = copy_model(tmp_path / "model")
    (model / "chat_template.jinja").unlink()
    tokenizer = common.load_tokenizer(str(model))
    assert not tokenizer.chat_template
    assert "has no chat template: prompts are the bare questions" in capsys.readouterr().err


def test_run_root_that_can_not_be_written(tmp_path, capsys, no_model, few):
    (tmp_path / "file").write_text("in the way")
    flags = {"model": EMBEDDED, "run_root": tmp_path / "file" / "runs", "problems": few}
    assert f"--run-root {tmp_path}/file/runs: " in refuse(train_grpo, flags, capsys)


def test_prompt_longer_than_the_context(tmp_path, capsys, no_model):
    rows = [{"question": f"{i}+1=", "answer": "1", "id": f"short {i}"} for i in range(40)]
    rows.append({"question": "1+" * 150 + "1=", "answer": "151", "id": "the long one"})
    path = write_lines(tmp_path / "p.jsonl", rows)
    error = refuse(train_grpo, {"model": EMBEDDED, "problems": path, "run_root": tmp_path / "runs"}, capsys)
    assert "'the long one'" in error and "302 prompt tokens" in error
    assert not (tmp_path / "runs").exists()


def test_demonstrations_that_are_too_few_or_broken(tmp_path, capsys, no_model):
    flags = {"model": EMBEDDED, "data": tmp_path / "d.jsonl", "run_root": tmp_path / "runs"}
    write_lines(tmp_path / "d.jsonl", [{"prompt": "1+1=", "completion": "2"}])
    assert "--minibatch-size 128: only" in refuse(train_sft, flags, capsys)
    write_lines(tmp_path / "d.jsonl", [{"prompt": "1+1=", "completion": "2"}, {"prompt": "1+1="}])
    assert "d.jsonl:2: no field 'completion'" in refuse(train_sft, flags, capsys)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("script", [train_dpo, train_rm])
def test_too_few_pairs(script, tmp_path, capsys, no_model):
    rows = [{"prompt": f"{i}+1=", "chosen": "1", "rejected": "2"} for i in range(10)]
    path = write_lines(tmp_path / "pairs.jsonl", rows)
    flags = {"model": EMBEDDED, "data": path, "run_root": tmp_path / "runs", "minibatch_size": 11}
    assert "--minibatch-size 11: only" in refuse(script, flags, capsys)
    assert not (tmp_path / "runs").exists()


SHORT = {"max_new_tokens": 4, "eval_problems": 1}


def test_sft_drops_and_counts_what_the_context_would_cut(tmp_path, capsys):
    """Catches: truncation that cuts off the end of a completion, with its answer and EOS."""
    rows = [{"prompt": f"{i}+1=", "completion": "2" * (300 if i < 3 else 5)} for i in range(40)]
    data = write_lines(tmp_path / "d.jsonl", rows)
    run(train_sft.main, short_args(train_sft, tmp_path / "runs", data=data, iterations=1, **SHORT))
    assert "3 of 40 demonstrations exceed the context of 256: dropped" in capsys.readouterr().out


def test_evaluate_output_directory_is_checked_first(tmp_path, capsys, no_model):
    missing = tmp_path / "missing" / "samples.jsonl"
    error = refuse(evaluate, {"model": EMBEDDED, "output": missing}, capsys)
    assert f"--output {missing}: its directory is not there" in error
    error = refuse(evaluate, {"model": EMBEDDED, "output": tmp_path}, capsys)
    assert f"--output {tmp_path}: is a directory" in error


def test_fewer_iterations_than_the_run_has_done(tmp_path, capsys, few):
    run_dir = run(
        train_grpo.main,
        short_args(train_grpo, tmp_path, problems=few, prompts_per_step=2, group_size=2, save_every=1, **SHORT),
    )
    error = refuse(train_grpo, {"resume": run_dir, "iterations": 1}, capsys)
    assert "--iterations 1: the run has done 2 already" in error
