"""What must not happen to a user's files and runs: inputs destroyed, terminals that take a run with them, values that
nobody meant."""

import json
import os
import pty
import select
import signal
import subprocess
import sys
import threading

import pytest
import torch
from conftest import make_model, refusal

import curate
import data
import evaluate
from plumbing import runs

ROWS = [{"question": f"{i}+1=", "answer": str(i + 1)} for i in range(4)]


def test_output_goes_where_it_points(tmp_path):
    """A link's target is replaced, not the link; a pipe is written to, not replaced."""
    target, link, pipe = tmp_path / "target.jsonl", tmp_path / "link.jsonl", tmp_path / "pipe"
    target.write_text("old")
    link.symlink_to(target)
    data.write_jsonl(str(link), ROWS)
    assert link.is_symlink() and len(target.read_text().splitlines()) == 4
    os.mkfifo(pipe)
    read = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()))
    reader.start()
    data.write_jsonl(str(pipe), ROWS)
    reader.join(10)
    assert read == [target.read_text()] and pipe.is_fifo()
    data.write_jsonl("/dev/null", ROWS)
    assert not os.path.isfile("/dev/null")


def test_half_a_character_does_not_lose_an_evaluation(tmp_path):
    data.write_jsonl(str(tmp_path / "a.jsonl"), [{"note": "\ud800", "text": "é"}])
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
        ({"correct": None}, "'correct' is None"),
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

    stream = runs.Output(Gone())
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
