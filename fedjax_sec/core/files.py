"""Files that a reader sees whole or not at all, that carry a digest, and that are removed singly.

Imports nothing of ours but `ConfigError`.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import os
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

import filelock

from fedjax_sec.core.fields import ConfigError

_log = logging.getLogger(__name__)

PROBE = "probe"  # of which only the temporary file is ever there
_DIGEST = "sha256"  # the key of a JSON file's own digest
_STALE = 24 * 3600.0  # seconds after which nobody writes a temporary file any more
_REMEDIES = {
    errno.ENOSPC: "Make room there, or choose another folder.",
    errno.EDQUOT: "Make room there, or choose another folder.",
    errno.EACCES: "Choose a folder that you may write to.",
    errno.EPERM: "Choose a folder that you may write to.",
    errno.EROFS: "Choose a folder that you may write to.",
    errno.ENAMETOOLONG: "Choose a shorter name.",
    errno.EEXIST: "A file or a broken link has this name; choose another folder.",
    errno.ENOTDIR: "A file has the name of a folder; choose another folder.",
    errno.EISDIR: "A folder has the name of a file; choose another name.",
    errno.ELOOP: "Links point to each other; choose another folder.",
}


# --- Errors of the operating system -------------------------------------------------------------


def describe(error: OSError) -> str:
    """One line: the path, the reason and the remedy, as far as the error knows them.

    >>> describe(OSError(errno.ENOSPC, "No space left on device", "out/metrics.jsonl"))
    "'out/metrics.jsonl': No space left on device. Make room there, or choose another folder."
    """
    if error.errno is None or error.strerror is None:
        return str(error)
    path = "" if error.filename is None else f"{os.fspath(error.filename)!r}: "
    return f"{path}{error.strerror}. {_REMEDIES.get(error.errno, '')}".rstrip()


@contextlib.contextmanager
def naming(path: Path, temporary: Path | None = None) -> Iterator[None]:
    """Gives an `OSError` within the path that it lacks: a full disk does not say which file."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename not in (None, str(temporary)):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def check_writable(folder: Path) -> list[Path]:
    """Makes a folder; gives what it made, the innermost first.

    Raises: `ConfigError` where no file can be written in it.
    """
    missing, probe = [], folder / f".{PROBE}.{os.getpid()}.tmp"
    try:
        missing += [parent for parent in (folder, *folder.parents) if not parent.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        with naming(folder), open(probe, "wb") as file:
            file.write(b"can this be written?")
            file.flush()
            os.fsync(file.fileno())
        probe.unlink(missing_ok=True)
    except OSError as error:
        with contextlib.suppress(OSError):
            probe.unlink()
        remove_empty(missing)
        raise refusal(folder, error) from error
    return missing


@contextlib.contextmanager
def trying(folder: Path) -> Iterator[None]:
    """`check_writable`, taken back where what follows fails."""
    made = check_writable(folder)
    try:
        yield
    except BaseException:
        remove_empty(made)
        raise


def refusal(folder: Path, error: OSError) -> ConfigError:
    """The error for a folder that cannot be used."""
    path = str(folder) if error.filename is None else error.filename
    return ConfigError(f"Output folder {describe(OSError(error.errno, error.strerror, path))}")


# --- Writing ------------------------------------------------------------------------------------


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write that then takes the place of `path`: a reader sees the old or the new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with naming(path, temporary):
        try:
            with open(temporary, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise


def write_atomically(path: Path, text: str) -> None:
    """Writes a text so that a reader sees the old or the new one, never a part."""
    with replacing(path) as file:
        file.write(text.encode())


def write_json(path: Path, content: Mapping) -> None:
    """Writes a mapping with the digest of its content."""
    content = json.loads(json.dumps(content))  # as it is read back
    written = {**content, _DIGEST: _digest(content)}
    write_atomically(path, json.dumps(written, indent=2) + "\n")


def read_json(path: Path, digest: bool = False) -> dict:
    """The mapping in a file of `write_json`, without its digest, which may be required.

    Raises: `ConfigError` where the file is missing, no such mapping, or not as it was written.
    """
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ConfigError(f"{str(path)!r} is missing.") from None
    except OSError as error:
        raise ConfigError(describe(error)) from error
    except ValueError as error:
        raise ConfigError(f"{str(path)!r} is damaged: it is no JSON ({error}).") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{str(path)!r} is damaged: it holds no mapping.")
    written = content.pop(_DIGEST, None)
    if (written is not None or digest) and written != _digest(content):  # older files have none
        raise ConfigError(f"{str(path)!r} is damaged: it is not as it was written.")
    return content


def _digest(content) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- Removing -----------------------------------------------------------------------------------


def leftovers(folder: Path, name: str = r".+") -> list[Path]:
    """Temporary files that writers of `name`, a regular expression, left in a folder."""
    if not folder.is_dir():
        return []
    pattern = re.compile(rf"\.(?:{name})\.\d+\.tmp")
    return sorted(path for path in folder.iterdir() if pattern.fullmatch(path.name))


def remove_stale(folder: Path, name: str = r".+") -> None:
    """Removes what writers of `name` left in a folder that has no lock: what is a day old."""
    with contextlib.suppress(OSError):
        for path in leftovers(folder, name):
            if time.time() - path.stat().st_mtime > _STALE:
                path.unlink(missing_ok=True)


def remove_files(paths: Iterable[Path]) -> None:
    """Removes files, one by one; those that are not there are no error."""
    for path in paths:
        if path.is_file() or path.is_symlink():
            path.unlink(missing_ok=True)


def remove_empty(folders: Iterable[Path]) -> None:
    """Removes folders in which nothing is left."""
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()


def mention_rest(folder: Path, known: Iterable[Path] = ()) -> None:
    """Names what stays in a folder from which our files were removed."""
    if not folder.is_dir():
        return
    known = set(known)
    rest = [path for path in sorted(folder.rglob("*")) if path not in known and not path.is_dir()]
    if rest:
        names = ", ".join(str(path.relative_to(folder)) for path in rest[:5])
        more = f" and {len(rest) - 5} more" if len(rest) > 5 else ""
        _log.warning("Not ours, so left in %r: %s%s.", str(folder), names, more)


# --- Locks --------------------------------------------------------------------------------------


def acquire(path: Path) -> filelock.BaseFileLock | None:
    """A lock that one holder has at a time, of this process or another; None where one has it.

    The system lets go of it when its holder dies. On file systems whose locks exclude nobody, which
    is tried, a warning says so.
    """
    lock = filelock.FileLock(path)
    try:
        lock.acquire(blocking=False)
    except filelock.Timeout:
        return None
    other = filelock.FileLock(path)
    try:
        other.acquire(blocking=False)
    except filelock.Timeout:
        return lock
    other.release()
    _log.warning(
        "Locks exclude nobody on the file system of %r: start no second process in this folder.",
        str(path.parent),
    )
    return lock


def check_locks(folder: Path) -> None:
    """Raises `ConfigError` where locks in the folder exclude nobody."""
    path = folder / f".{PROBE}.lock"
    first, second = filelock.FileLock(path), filelock.FileLock(path)
    try:
        first.acquire(timeout=10)
        second.acquire(blocking=False)
    except filelock.Timeout:
        return
    except (OSError, NotImplementedError) as error:
        said = f" ({error})"
    else:
        said = ""
    finally:
        for lock in (second, first):
            lock.release(force=True)
    raise ConfigError(
        f"Locks exclude nobody on the file system of {str(folder)!r}{said}, so several workers "
        f"would run the same cells. Choose a folder on a local disk, or on a shared file system "
        f"that has locks (NFS 4; Lustre mounted with the option flock), or use one worker."
    )


def is_locked(path: Path) -> bool:
    """Whether a living process holds the lock; changes nothing, and needs no right to write.

    A shared lock is tried for a moment, which others do not notice but those who try to acquire the
    lock at that very moment.
    """
    try:
        with open(path, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    except OSError as error:  # a file system without locks
        if error.errno in (errno.ENOLCK, errno.ENOTSUP, errno.EINVAL):
            return False
        raise
    return False
