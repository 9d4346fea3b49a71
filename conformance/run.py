"""Puts trainers to the conformance checks and prints one line for each check that finds something.

    python conformance/run.py                    # our scripts, TRL's trainers and the mutants, on 2 processes
    python conformance/run.py ours trl mutants   # some of them
    python conformance/run.py my_trainer.py      # your adapters: ADAPTERS in a file like conformance/template.py

A file's adapters, or one group alone, are printed with every line. The exit code is 1 if a check of ours or yours finds
something, or if a mutant is not flagged by name.
"""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything is made here
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import importlib.util  # noqa: E402
import multiprocessing  # noqa: E402
import sys  # noqa: E402
import time  # noqa: E402
import warnings  # noqa: E402
from pathlib import Path  # noqa: E402

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch  # noqa: E402
from transformers.utils import logging  # noqa: E402

from conformance.checks import Result, check_all  # noqa: E402

GROUPS = {"trl": "with_trl", "ours": "ours", "mutants": "mutants"}  # the slowest first


def load(name: str) -> list:
    """The adapters of a group or of a file."""
    path = Path(__file__).parent / f"{GROUPS[name]}.py" if name in GROUPS else Path(name)
    if name == "trl" and importlib.util.find_spec("trl") is None:
        print("trl is not installed, so its trainers are left out: pip install trl==1.16.0", file=sys.stderr)
        return []
    if not path.exists():
        sys.exit(f"{name}: neither a file nor one of {', '.join(GROUPS)}")
    spec = importlib.util.spec_from_file_location(f"conformance_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except ModuleNotFoundError as error:
        sys.exit(f"{name}: needs the module {error.name}, which is not there")
    if not hasattr(module, "ADAPTERS"):
        sys.exit(f"{name}: has no list ADAPTERS; see conformance/template.py")
    return module.ADAPTERS


def check_one(place: tuple[str, int]) -> list[Result]:
    """All checks of one adapter, by its file and index: an adapter itself may not fit through a pipe."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    return check_all(load(place[0])[place[1]])


def report(adapter, results: list[Result], in_full: bool) -> bool:
    """Prints the lines, and returns whether all is as it should be."""
    held, found = [r for r in results if r.holds], [r for r in results if r.holds is False]
    print(f"\n{adapter.name}: {len(held)} of {len(held) + len(found)} checks hold")
    for result in results if in_full else found:
        print(f"  {result.check:16} {result.line}")
    flagged = getattr(adapter, "flagged", None)
    return not found if flagged is None else any(flagged in result.line for result in found)


def main(names: list[str]) -> int:
    started, names = time.time(), names or list(GROUPS)
    adapters = {name: load(name) for name in names}
    places = [(name, i) for name in names for i in range(len(adapters[name]))]
    pool = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn").Pool(2)  # forked: no new imports
    done = dict(zip(places, pool.imap(check_one, places), strict=True))
    pool.close()
    pool.join()
    bad = []
    for name in names:
        for i, adapter in enumerate(adapters[name]):
            if not report(adapter, done[name, i], len(names) == 1 and name != "mutants") and name != "trl":
                bad.append(adapter.name)
    print(
        f"\nadapters: {len(places)}, in {time.time() - started:.0f} s"
        + (f"; not as it should be: {', '.join(bad)}" if bad else "")
    )
    return 1 if bad else 0


if __name__ == "__main__":
    if any(name.startswith("-") for name in sys.argv[1:]):
        print(__doc__)
        sys.exit(0 if {"-h", "--help"} & {*sys.argv[1:]} else 2)
    sys.exit(main(sys.argv[1:]))
