"""Files on disk: written whole or not at all, and told apart by digests. Only flags.py is below it."""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import socket
from collections.abc import Iterable, Iterator
from pathlib import Path

from plumbing.flags import fail


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yields the path of a new file, which replaces `path` at the end, so that an old file stays whole until the new
    one is. A link's target is replaced, not the link; a pipe or a device is written to. Errors of the file system end
    the program in one line."""
    target = Path(path).resolve()
    special = target.exists() and not target.is_file()
    new = target if special else target.with_name(f".{os.getpid()}.tmp")  # short, and no other process's
    try:
        yield new
        if not special:
            with new.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(new, target)
    except OSError as error:
        fail(f"{path}: can't be written ({error.strerror})")
    finally:
        if not special:
            new.unlink(missing_ok=True)


def write_jsonl(path: str | Path, rows: Iterable[dict]) -> None:
    """Writes one JSON object per line (see `replacing`). Half a surrogate pair is written as its escape."""
    with replacing(path) as new, new.open("w", encoding="utf-8", errors="backslashreplace") as file:
        file.writelines(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)


def read_jsonl(path: Path, cut: bool = False) -> list[dict]:
    """The objects of a file with one a line; [] without a file. cut: the last line may be cut short, by a kill or a
    full disk, and is then left out. Any other damage ends the program in one line."""
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    if cut and lines and not lines[-1].endswith(b"\n"):
        lines.pop()
    rows = []
    for line_number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
            if not isinstance(rows[-1], dict):
                raise ValueError
        except (ValueError, RecursionError):
            fail(f"{path}: line {line_number} is damaged (no JSON object)")
    return rows


def lock(directory: Path) -> object:
    """Locks a run directory until the process ends, even by kill -9; an error if another process has it. Returns the
    open file that is the lock."""
    file = (directory / "lock").open("a+")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            return file  # this file system has no locks
        file.seek(0)
        fail(f"{directory}: is being written by {file.read() or 'another process'}; stop it first")
    file.truncate(0)
    print(f"process {os.getpid()} on {socket.gethostname()}", end="", file=file, flush=True)
    return file


# ---- Digests -------------------------------------------------------------------------------------------------------


def file_digests(directory: Path, names: list[str] | None = None) -> dict[str, str]:
    """The sha256 of the named files, by path within the directory; None: of all files, in its folders too."""

    def digest(path: Path) -> str:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    if names is None:
        names = [str(path.relative_to(directory)) for path in sorted(directory.rglob("*")) if path.is_file()]
    return {name: digest(directory / name) for name in names}


MODEL_FILES = ".json", ".safetensors", ".jinja", ".model", ".txt"


def model_fingerprints(directory: Path) -> dict[str, str]:
    """A fingerprint of each file of a model, by name. It tells another model in a moment, whatever the size, because it
    reads 64 blocks of a large file; to find a flipped bit takes `file_digests`."""

    def fingerprint(path: Path, blocks: int = 64, block: int = 1 << 16) -> str:
        size = path.stat().st_size
        digest = hashlib.sha256(f"{size}".encode())
        with path.open("rb") as file:
            for i in range(blocks):
                file.seek(i * max(block, size // blocks))
                digest.update(file.read(block))
        return digest.hexdigest()

    return {path.name: fingerprint(path) for path in sorted(directory.iterdir()) if path.suffix in MODEL_FILES}
