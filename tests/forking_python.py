"""A server that has imported torch already and runs scripts for the recipes' tests, each in its own fork, so that a
recipe's ten short commands don't spend half a minute on imports.

    forking_python.py serve ADDRESS LOG     and, for each command,     forking_python.py run ADDRESS SCRIPT ARGUMENTS
"""

import os
import runpy
import sys
from multiprocessing.connection import Client, Listener


def serve(address: str, log: str) -> None:
    sys.path.insert(0, os.getcwd())
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    with Listener(address) as listener:
        for name in ("train_dpo", "train_grpo", "train_kimi", "train_pg", "train_ppo", "train_rm", "train_sft"):
            __import__(name)
        while True:
            with listener.accept() as connection:
                argv = connection.recv()
                child = os.fork()
                if child == 0:
                    os.dup2(output, 1)
                    os.dup2(output, 2)
                    sys.argv = argv
                    sys.path[0] = os.path.dirname(os.path.abspath(argv[0]))
                    runpy.run_path(argv[0], run_name="__main__")
                    sys.stdout.flush()
                    os._exit(0)
                connection.send(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))


def run(address: str, argv: list[str]) -> int:
    with Client(address) as connection:
        connection.send(argv)
        return connection.recv()


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(*sys.argv[2:])
    sys.exit(run(sys.argv[2], sys.argv[3:]))
