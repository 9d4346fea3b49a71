"""Each recipe from its first command to its table, with tiny budgets."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

RL = "--iterations 1 --prompts-per-step 2 --group-size 2 --eval-problems 2"
SFT = "--iterations 1 --minibatch-size 2 --eval-problems 2"
PAIRS = "--iterations 1 --minibatch-size 4 --eval-problems 2"
TINY = {
    "RL": RL,
    "PPO": RL,
    "PREFERENCE": RL,
    "GENERAL": RL,
    "SFT": SFT,
    "COLD": SFT,
    "FUSION": SFT,
    "STUDENT_SFT": f"{SFT} --demonstrations 50",
}
TINY |= {
    "RM": PAIRS,
    "DPO": PAIRS,
    "PHASE": "2",
    "SWITCH": "1",
    "FEW": "8",
    "BUDGETS": "3",
    "SAMPLED": "60",
}
TINY |= {"COLD_PROBLEMS": "60", "EVALUATE": "--eval-problems 2"}
ROWS = {
    "r1": "base zero cold rl rejection preference-alone rules-and-preference routed".split()
    + "student distilled student-rl".split(),
    "kimi": "base sft curriculum late verified shortest shorter early-1 early-2".split(),
    "qwen3": "base sft rl-8 rl-all fusion general budget-3".split(),
    "rlhf": "base sft ppo ppo-no-kl dpo".split(),
}


@pytest.fixture(scope="module")
def forking_python(tmp_path_factory):
    """A directory for the front of PATH, and the log of all commands."""
    folder = tmp_path_factory.mktemp("bin")
    tool, socket, log = Path(__file__).with_name("forking_python.py").resolve(), folder / "socket", folder / "log"
    (folder / "python").write_text(f'#!/bin/sh\nexec {sys.executable} -S {tool} run {socket} "$@"\n')
    (folder / "python").chmod(0o755)
    server = subprocess.Popen([sys.executable, str(tool), "serve", str(socket), str(log)])
    end = time.time() + 120
    while not socket.exists():
        assert server.poll() is None and time.time() < end
        time.sleep(0.05)
    yield folder, log
    server.kill()
    server.wait()


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ROWS)
def test_a_recipe_runs_to_its_table(recipe, forking_python, tmp_path):
    folder, log = forking_python
    log.write_text("")
    environment = os.environ | TINY | {"PATH": f"{folder}:{os.environ['PATH']}", "OUT": str(tmp_path / "out")}
    environment["RM"] += {"r1": " --pair-problems 40", "qwen3": " --minibatch-size 2"}.get(recipe, "")
    shell = subprocess.run(["bash", f"recipes/{recipe}.sh"], env=environment, capture_output=True, text=True)
    printed = log.read_text()
    assert shell.returncode == 0, shell.stderr[-1000:] + printed[-3000:]
    for name in ROWS[recipe]:
        assert re.search(rf"^{name}\b.* 0\.\d\d\d", printed, re.MULTILINE), name
    assert "T=0.6" in printed and "outside the training distribution" in shell.stdout
    again = subprocess.run(["bash", f"recipes/{recipe}.sh"], env=environment, capture_output=True, text=True)
    assert again.returncode == 2 and "exists; remove it" in again.stderr  # nothing is written over


@pytest.mark.parametrize("recipe", ROWS)
def test_a_recipe_stays_short(recipe):
    lines = Path(f"recipes/{recipe}.sh").read_text().splitlines()
    assert len(lines) <= 60 and all(len(line) <= 120 for line in lines)
