"""What must not happen to a user's files and runs: inputs destroyed, terminals that take a run with them, values that
nobody meant."""

import json
import os
import pty
import select
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from conftest import (
    EMBEDDED,
    assert_same_events,
    copied,
    few_problems,
    make_model,
    refusal,
    rl_args,
    run,
    slow_case,
    start,
    wait_for,
)

import common
import curate
import data
import evaluate
import train_grpo
from plumbing import files, flags, runs

ROWS = [{"question": f"{i}+1=", "answer": str(i + 1)} for i in range(4)]


def test_output_goes_where_it_points(tmp_path):
    """A link's target is replaced, not the link; a pipe is written to, not replaced."""
    target, link, pipe = tmp_path / "target.jsonl", tmp_path / "link.jsonl", tmp_path / "pipe"
    target.write_text("old")
    link.symlink_to(target)
    files.write_jsonl(str(link), ROWS)
    assert link.is_symlink() and len(target.read_text().splitlines()) == 4
    os.mkfifo(pipe)
    read = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()))
    reader.start()
    files.write_jsonl(str(pipe), ROWS)
    reader.join(10)
    assert read == [target.read_text()] and pipe.is_fifo()
    files.write_jsonl("/dev/null", ROWS)
    assert not os.path.isfile("/dev/null")


def test_half_a_character_does_not_lose_an_evaluation(tmp_path):
    files.write_jsonl(str(tmp_path / "a.jsonl"), [{"note": "\ud800", "text": "é"}])
    assert "é" in (tmp_path / "a.jsonl").read_text(encoding="utf-8")


@pytest.mark.parametrize("command", [evaluate, curate], ids=lambda module: module.__name__)
def test_an_output_that_is_an_input_is_refused(command, tmp_path, capsys):
    """`--problems p.jsonl --output p.jsonl` left 4 of 60 problems, with exit code 0."""
    path, link = tmp_path / "p.jsonl", tmp_path / "link.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    link.symlink_to(path)
    before = path.read_text()
    for output in (path, link):
        args = command.Args(problems=str(path), output=str(output))
        assert "is an input, which it would replace" in refusal(command.main, args, capsys)
    assert path.read_text() == before


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"correct": "false"}, "'correct' is 'false', true or false is expected"),
        ({"correct": 1}, "'correct' is 1, true or false"),
        ({"finished": "false"}, "'finished' is 'false'"),
    ],
)
def test_samples_are_typed(changes, said, tmp_path, capsys):
    """The text "false" counted as true: wrong completions became demonstrations."""
    row = {"question": "1+1=", "completions": [{"text": "3", "reward": 0.0, "correct": False} | changes]}
    rows = [("samples.jsonl:1", row)]
    assert said in refusal(lambda _: data.read_samples(rows, "samples.jsonl"), None, capsys)
    row = {"question": "1+1=", "mode": "thinking", "completions": []}
    assert "'mode' is 'thinking'" in refusal(lambda _: data.read_samples([("s:1", row)], "s"), None, capsys)


def test_nan_in_a_file_is_no_text(tmp_path, capsys):
    path = tmp_path / "p.jsonl"
    path.write_text('{"question": "1+1=", "answer": NaN}\n')
    said = refusal(lambda _: data.load_problems(str(path), "all"), None, capsys)
    assert f"{path}:1: field 'answer' is nan, no text" in said


def test_weights_that_are_not_finite_are_not_saved(tmp_path, capsys):
    """The only checkpoint was replaced by one that nobody could go on from."""
    model, target = make_model("llama"), tmp_path / "final"
    target.mkdir()
    (target / "kept").write_text("")
    with torch.no_grad():
        model.lm_head.weight[0, 0] = torch.inf
    said = refusal(lambda _: runs.save_model(target, model, None), None, capsys)
    assert "lm_head.weight holds NaN or infinite weights" in said and (target / "kept").exists()


def test_the_newest_checkpoint_is_the_one_with_the_highest_number(tmp_path):
    for number in (999_999, 1_000_000):
        (tmp_path / f"step_{number:06d}").mkdir()
    assert runs.checkpoints(tmp_path)[0].name == "step_1000000"


def test_output_that_can_not_be_written_is_lost_and_nothing_else():
    class Gone:
        encoding = "utf-8"

        def write(self, text=""):
            raise BrokenPipeError

        flush = write

    stream = flags.Output(Gone())
    assert stream.write("text") == 4 and stream.encoding == "utf-8"
    print("text", file=stream, flush=True)


@pytest.mark.slow
def test_a_terminal_that_goes_away_leaves_a_checkpoint(tmp_path):
    """A dropped connection: the terminal hangs up, and nothing that is printed reaches anybody."""
    leader, follower = pty.openpty()
    command = [sys.executable, "train_grpo.py", "--iterations", "1000", "--save-every", "0", "--eval-problems", "6"]
    command += ["--run-root", str(tmp_path), "--run-name", "lost", "--eval-every", "0"]
    process = subprocess.Popen(command, stdin=follower, stdout=follower, stderr=follower, start_new_session=True)
    os.close(follower)
    seen = b""
    while b"run directory" not in seen and select.select([leader], [], [], 60)[0]:
        seen += os.read(leader, 4096)
    assert b"run directory" in seen
    os.close(leader)
    process.send_signal(signal.SIGHUP)
    assert process.wait(60) == 128 + signal.SIGHUP
    assert runs.checkpoints(tmp_path / "lost" / "checkpoints")


@pytest.mark.slow
def test_a_pipe_whose_reader_dies_does_not_end_a_run(tmp_path):
    command = f"{sys.executable} train_grpo.py --iterations 2 --eval-problems 6 --run-root {tmp_path} --run-name piped"
    subprocess.run(["bash", "-c", f"{command} 2>&1 | head -1"], check=True, capture_output=True, timeout=120)
    assert (tmp_path / "piped" / "final" / "model.safetensors").exists()


def test_a_run_under_nohup_goes_on_without_its_terminal(monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        stop = runs.StopSignal()
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        stop.restore()
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


# ---- Two runs, two clocks, other models ------------------------------------------------------------------------------


def test_a_live_run_is_not_resumed(saved_run, tmp_path):
    """Two processes wrote checkpoints into one directory, each over the other's."""
    run_dir = copied(saved_run, tmp_path)
    held = files.lock(run_dir)
    process = start("train_grpo.py", "--resume", str(run_dir))
    assert process.wait(120) == 2
    said = process.stderr.read()
    assert f"is being written by process {os.getpid()} on " in said and said.count("error: ") == 1
    held.close()
    assert files.lock(run_dir)


def test_a_clock_that_goes_back_does_not_mix_events(saved_run, tmp_path, monkeypatch):
    """The resumed run's event file sorted before the old one, whose values then stood over its own."""
    run_dir = copied(saved_run, tmp_path)
    shutil.rmtree(run_dir / "checkpoints" / "step_000004")
    shutil.rmtree(run_dir / "final")
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now - 86_400)
    train_grpo.main(flags.parse_args(train_grpo.Args, ["--resume", str(run_dir)]))
    assert_same_events(run_dir, saved_run)


@pytest.mark.parametrize("changed", ["model.safetensors", "tokenizer.json"])
def test_a_resume_with_another_start_model_is_refused(changed, tmp_path, capsys):
    """A reference or a tokenizer that was replaced made another run of it, in silence."""
    model = shutil.copytree(EMBEDDED, tmp_path / "model")
    args = rl_args(train_grpo, tmp_path / "runs", model=str(model), iterations=1, save_every=1)
    run_dir = run(train_grpo.main, args)
    content = bytearray((model / changed).read_bytes())
    content[-2:] = content[-2:][::-1] if changed.endswith("safetensors") else b"\n}"
    (model / changed).write_bytes(bytes(content) + b"\n" * changed.endswith("json"))
    again = flags.parse_args(train_grpo.Args, ["--resume", str(run_dir), "--iterations", "2"])
    said = refusal(train_grpo.main, again, capsys)
    assert f"--model {model}: {changed} is not the file that the run began with" in said
    shutil.copytree(EMBEDDED, model, dirs_exist_ok=True)
    train_grpo.main(again)


def test_a_model_cut_by_its_config_is_refused(tmp_path, capsys):
    """Fewer layers in the config than in the files: the first layers alone loaded in silence."""
    model = shutil.copytree(EMBEDDED, tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    said = refusal(lambda path: common.load_policy(path, None), str(model), capsys)
    assert "its config has fewer layers than its files" in said


@pytest.mark.parametrize("stop", ["2", 1.5, 10**6, -1, True])
def test_stops_are_ids(stop, tmp_path, capsys):
    model = shutil.copytree(EMBEDDED, tmp_path / "model")
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": stop}))
    said = refusal(lambda path: common.load_policy(path, None), str(model), capsys)
    assert f"{model}: " in said


# ---- Arguments, names, ends ------------------------------------------------------------------------------------------

EDITS = {
    "normalize_std": "False",
    "seed": True,
    "learning_rate": "1e-4",
    "iterations": 2.5,
    "model": ["a"],
    "loss_norm": "tokens",
    "eval_data": 3,
    "problem_sampling": {},
    "minibatch_size": [1],
}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        *((json.dumps({name: value}), f"--{name.replace('_', '-')} can't be") for name, value in EDITS.items()),
        ("[]", "does not hold this script's arguments"),
        ("3", "does not hold this script's arguments"),
        ("[" * 100_000, "does not hold this script's arguments"),
        ('{"no_such_flag": 1}', "unknown: no_such_flag"),
        ('{"gamma": NaN', "does not hold this script's arguments"),
    ],
    ids=lambda text: text[:30],
)
def test_saved_arguments_are_typed(text, said, tmp_path, capsys):
    """`"normalize_std": "False"` kept True; fifteen edits ended in tracebacks."""
    (tmp_path / "args.json").write_text(text)
    error = refusal(lambda argv: flags.parse_args(train_grpo.Args, argv), ["--resume", str(tmp_path)], capsys)
    assert said in error and str(tmp_path / "args.json") in error


@pytest.mark.parametrize("flag", ["--run-name", "--problems", "--model", "--resume", "--run-root", "--eval-data"])
def test_names_may_be_too_long(flag, tmp_path):
    """A name of 300 letters is one line, whatever it names."""
    process = start("train_grpo.py", "--run-root", str(tmp_path), flag, "a" * 300)
    assert process.wait(120) in (1, 2)
    said = process.stderr.read()
    assert said.count("error: ") == 1 and "Traceback" not in said, said


def test_a_runs_own_name_is_never_too_long(tmp_path):
    model = shutil.copytree(EMBEDDED, tmp_path / ("m" * 200))
    problems = tmp_path / ("p" * 200 + ".jsonl")
    shutil.copy(few_problems(), problems)
    args = rl_args(train_grpo, tmp_path / "runs", model=str(model), problems=str(problems), iterations=1)
    assert run(train_grpo.main, args).is_dir()


INTERRUPTED = {
    "evaluate.py": ["--eval-problems", "3000", "--output", "OUT"],
    "curate.py": ["--problems", "arithmetic", "--output", "OUT", "--limit", "5"],
}


@pytest.mark.parametrize("script", INTERRUPTED)
@pytest.mark.parametrize("number", [signal.SIGINT, slow_case(signal.SIGTERM), slow_case(signal.SIGHUP)], ids=str)
def test_every_command_ends_in_one_line(script, number, tmp_path):
    """A traceback of KeyboardInterrupt, and a temporary file, were what was left."""
    arguments = [flag.replace("OUT", str(tmp_path / "out.jsonl")) for flag in INTERRUPTED[script]]
    code = f"""
import os, sys, threading, {script[:-3]} as command
from plumbing import flags
def main(args):
    threading.Timer(0.5, os.kill, (os.getpid(), {number})).start()
    command.main(args)
    while True: pass
sys.argv = {[script, *arguments]!r}
flags.start(main, command.Args)
"""
    process = start("-c", code)
    assert process.wait(120) == 128 + number
    assert process.stderr.read().splitlines()[-1].endswith("stopped at once; nothing was written")
    assert script == "curate.py" or not list(tmp_path.iterdir())


def test_what_the_terminal_can_not_show_is_escaped(tmp_path):
    """An ASCII terminal: an evaluation was lost at its last line."""
    code = "from plumbing.flags import start\nfrom dataclasses import dataclass\n"
    code += "@dataclass\nclass Args:\n    x: int = 0\nstart(lambda args: print('\\u00e9\\ud800'), Args)"
    process = start("-c", code, env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert process.wait(60) == 0 and process.stdout.read() == "\\xe9\\ud800\n"


def test_a_run_directory_that_is_deleted_ends_the_run_in_one_line(tmp_path):
    arguments = ["--run-root", str(tmp_path), "--run-name", "gone", "--eval-problems", "2", "--iterations", "500"]
    process = start("train_grpo.py", *arguments, "--save-every", "1")
    wait_for(lambda: list(tmp_path.glob("gone/checkpoints/step_*1")), process)
    while process.poll() is None:
        shutil.rmtree(tmp_path / "gone", ignore_errors=True)
    said = process.stderr.read()
    assert process.returncode in (1, 2) and "Traceback" not in said and "error: " in said, said[-2000:]


def test_a_full_disk_names_what_the_command_can_do(capsys):
    """evaluate.py has no checkpoint to go on from."""
    for args, said in ((evaluate.Args(), "make room on the disk\n"), (train_grpo.Args(), "checkpoint with --resume\n")):
        assert flags.explain(OSError(28, "No space left on device"), args) == 1
        assert capsys.readouterr().err.endswith(said)


def test_huge_weights_are_saved(tmp_path):
    """Their sum overflows, but each of them is finite."""
    model = make_model("llama")
    with torch.no_grad():
        model.lm_head.weight.fill_(3e38)
    runs.save_model(tmp_path / "final", model, common.load_tokenizer(EMBEDDED))
    assert (tmp_path / "final" / "model.safetensors").exists()
