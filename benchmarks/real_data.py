r"""Writes the training data of benchmarks/real_model.sh, which trains a real pretrained model.

    python benchmarks/real_data.py OUT [--gsm8k DIR]

words.jsonl                  chains of one or two operations in words: "What is 12 plus 7 minus 5?"
words_demonstrations.jsonl   300 of its training problems with worked steps in our tags, for a cold start

With GSM8K's train.jsonl, test.jsonl, example_model_solutions.jsonl (https://github.com/openai/grade-school-math):

gsm8k_demonstrations.jsonl   its worked solutions in our tags, without calculator marks such as <<1+1=2>>
gsm8k_few.jsonl              40 of the test problems whose pairs are held out, for DPO's evaluations
gsm8k_samples.jsonl          four models' solutions of each test problem, scored: for train_rm and train_dpo
"""

import json
import random
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

sys.path.insert(0, str(Path(__file__).parent.parent))

from data import is_held_out, placed_rows  # noqa: E402
from plumbing.files import write_jsonl  # noqa: E402
from tasks.arithmetic import draw_chain  # noqa: E402

PROBLEMS, DEMONSTRATIONS, HARDEST, FEW = 4000, 300, 2, 40


@dataclass
class Args:
    out: tyro.conf.Positional[Path]
    gsm8k: Path | None = None
    """directory with GSM8K's three files"""


def words(out: Path) -> None:
    rng, problems, demonstrations = random.Random("words"), {}, []
    while len(problems) < PROBLEMS:
        first, steps = draw_chain(rng, rng.randint(1, HARDEST))
        asked = " ".join(f"{'plus' if step > 0 else 'minus'} {abs(step)}" for step in steps)
        question, total, thoughts = f"What is {first} {asked}?", first, []
        for step in steps:
            thoughts.append(f"{total} {'+' if step > 0 else '-'} {abs(step)} = {total + step}")
            total += step
        if question not in problems and not is_held_out(question) and len(demonstrations) < DEMONSTRATIONS:
            completion = f"<think>{', '.join(thoughts)}</think><answer>{total}</answer>"
            demonstrations.append({"prompt": question, "completion": completion})
        problems[question] = {"question": question, "answer": str(total), "difficulty": len(steps)}
    write_jsonl(str(out / "words.jsonl"), list(problems.values()))
    write_jsonl(str(out / "words_demonstrations.jsonl"), demonstrations)


def without_marks(text: str) -> str:
    return re.sub(r"<<.*?>>", "", text)


def model_solutions(directory: Path) -> list[dict]:
    """The rows of a samples file: each test problem with four models' solutions, scored by the file's own verdict."""
    names = ("example_model_solutions.jsonl", "model_solutions.jsonl")
    path = next(directory / name for name in names if (directory / name).exists())
    records = []
    for _, row in placed_rows(str(path)):
        completions = []
        for solution in (value for value in row.values() if isinstance(value, dict)):
            text = without_marks("\n####".join(solution["solution"].rsplit("\nA:", 1)))
            right = solution["is_correct"]
            completions.append({"text": text, "reward": float(right), "correct": right, "finished": True})
        answer = row["ground_truth"].rpartition("A:")[2].strip()
        records.append({"question": row["question"], "answer": answer, "completions": completions})
    return records


def gsm8k(directory: Path, out: Path) -> None:
    demonstrations = []
    for _, row in placed_rows(str(directory / "train.jsonl")):
        thoughts, _, answer = without_marks(row["answer"]).partition("\n#### ")
        completion = f"<think>{thoughts}</think><answer>{answer}</answer>"
        demonstrations.append({"prompt": row["question"], "completion": completion})
    write_jsonl(str(out / "gsm8k_demonstrations.jsonl"), demonstrations)
    write_jsonl(str(out / "gsm8k_samples.jsonl"), model_solutions(directory))
    few = [row for _, row in placed_rows(str(directory / "test.jsonl")) if is_held_out(row["question"])][:FEW]
    write_jsonl(str(out / "gsm8k_few.jsonl"), few)


if __name__ == "__main__":
    args = tyro.cli(Args)
    args.out.mkdir(parents=True, exist_ok=True)
    words(args.out)
    if args.gsm8k:
        gsm8k(args.gsm8k, args.out)
    print(json.dumps({path.name: sum(1 for _ in path.open()) for path in sorted(args.out.glob("*.jsonl"))}))
