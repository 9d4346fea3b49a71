"""Fault tests: runs that are killed and resumed, and one process that trains for a long time.

    python tests/tools/kills.py                       # kill -9 at random moments, every script; 10 minutes
    python tests/tools/kills.py --soak-minutes 30     # train_grpo.py's default run again and again in one process

A run is killed several times, possibly while it writes a checkpoint or before its first one, and resumed each time. Its
kills count as survived if the final weights, events and sampler ledger equal those of an uninterrupted run.
"""

import contextlib
import io
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import tyro

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

import train_grpo  # noqa: E402
from benchmarks.learning import ROOT, machine, read_scalars  # noqa: E402
from plumbing.flags import from_flat  # noqa: E402
from plumbing.runs import load_checkpoint  # noqa: E402
from plumbing.statistics import format_table  # noqa: E402
from tests.tools.hostile import resident_mb  # noqa: E402

RL = "--prompts-per-step 4 --group-size 4 --problem-sampling prioritized"
PAIRS = "--pair-problems 60 --minibatch-size 8"
FLAGS = {
    "train_pg": f"{RL} --baseline value --iterations 50",
    "train_ppo": f"{RL} --iterations 25",
    "train_grpo": f"{RL} --dynamic-sampling --kl-coef 0.01 --iterations 50",
    "train_kimi": f"{RL} --iterations 50",
    "train_dpo": f"{PAIRS} --iterations 60",
    "train_rm": f"{PAIRS} --iterations 100",
    "train_sft": "--demonstrations 200 --minibatch-size 16 --iterations 80",
}
SHARED = "--device cpu --eval-problems 12 --eval-every 10 --save-every 1 --keep-checkpoints 2"


@dataclass
class Args:
    kills: int = 28
    """number of kills, spread evenly over the scripts"""
    soak_minutes: float = 0.0
    """minutes of the long run, which replaces the kills; 0: no long run"""
    seed: int = 0


def start(script: str, *flags: str) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, f"{script}.py", *flags], cwd=ROOT, stdout=-3, stderr=-3)


def same(first: Path, second: Path) -> bool:
    """True if both runs have the same final weights, sampler ledger and events (values of times and memory aside)."""
    weights = [(run / "final" / "model.safetensors").read_bytes() for run in (first, second)]
    ledgers = [load_checkpoint(str(run))["stateful"]["sampler"] for run in (first, second)]
    scalars = [read_scalars(run) for run in (first, second)]
    for values in scalars:
        for tag in [tag for tag in values if tag.startswith(("time/", "memory/")) or tag.endswith("per_second")]:
            values[tag] = [x for x, _ in values[tag]]
    return weights[0] == weights[1] and ledgers[0] == ledgers[1] and scalars[0] == scalars[1]


def kill_runs(args: Args) -> None:
    rng, rows, survived = random.Random(args.seed), [], 0
    for number, (script, flags) in enumerate(FLAGS.items()):
        kills = args.kills // len(FLAGS) + (number < args.kills % len(FLAGS))
        root = Path(tempfile.mkdtemp())
        arguments = [*flags.split(), *SHARED.split(), "--run-root"]
        begun = time.time()
        assert start(script, *arguments, str(root / "whole")).wait() == 0
        seconds, whole = time.time() - begun, next((root / "whole").iterdir())
        equal, killed, writing, early, run = True, 0, 0, 0, None
        while killed < kills or run is not None:
            started = time.time()
            process = start(script, *(["--resume", str(run)] if run else [*arguments, str(root / "killed")]))
            while killed < kills and run is None and process.poll() is None:
                run = next((path.parent for path in (root / "killed").glob("*/checkpoints")), None)
                time.sleep(0.01)
            if killed < kills:  # kill at a random moment; the run may have ended before
                time.sleep(rng.uniform(0, 0.8 * seconds))
                process.kill()
            if process.wait() == -signal.SIGKILL:
                killed += 1
                parts = [*run.glob("checkpoints/*.tmp"), *run.glob("final.tmp")]
                writing += any(part.stat().st_mtime > started for part in parts)  # not left by an earlier kill
                early += not list(run.glob("checkpoints/step_*[0-9]"))
                continue
            run = next((root / "killed").iterdir())
            equal &= process.returncode == 0 and same(whole, run)
            shutil.rmtree(root / "killed")
            run = None
        survived += killed * equal
        rows.append([script, killed, killed if equal else 0, early, writing])
        print(rows[-1], file=sys.stderr)
        shutil.rmtree(root)
    print(f"{machine()}\n\nkills survived: {survived} of {args.kills}\n")
    print(format_table(["", "kills", "survived", "before a checkpoint", "while one was written"], rows))


def soak(args: Args) -> None:
    rows, warnings, end = [], 0, time.time() + 60 * args.soak_minutes
    root = Path(tempfile.mkdtemp())
    while time.time() < end:
        seed, printed = len(rows) + 1, io.StringIO()
        with contextlib.redirect_stderr(printed), contextlib.redirect_stdout(printed):
            flags = {"seed": seed, "run_root": str(root), "keep_checkpoints": 1}
            train_grpo.main(from_flat(train_grpo.Args(), flags))
        (run,) = root.iterdir()
        scalars = read_scalars(run)
        warned = printed.getvalue().lower().count("warning")
        warnings += warned
        rows.append([seed, f"{resident_mb():.0f}", scalars["eval/accuracy"][-1][1], warned])
        print(rows[-1], file=sys.stderr)
        shutil.rmtree(run)
    print(f"{machine()}\n\n{len(rows)} runs in {args.soak_minutes:g} minutes, {warnings} warnings\n")
    print(format_table(["seed", "resident MB after it", "accuracy", "warnings"], rows))


def main(args: Args) -> None:
    soak(args) if args.soak_minutes else kill_runs(args)


if __name__ == "__main__":
    main(tyro.cli(Args))
