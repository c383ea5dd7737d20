"""A worker of a launcher: a process that takes planned groups of a folder until none is left.

    python -m fedjax_sec.sweeps.launchers.worker JOB.json NUMBER

Workers share the folder and its locks alone, and start, die and come back in any number.
"""

import contextlib
import dataclasses
import json
import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from fedjax_sec.core import ConfigError, files
from fedjax_sec.sweeps import groups as groups_lib
from fedjax_sec.sweeps.groups import Group
from fedjax_sec.sweeps.launchers.local import Local

#: The folder of what workers did, `NUMBER.jsonl`, and of what they printed, `NUMBER.log`.
FOLDER = "workers"
#: The lock that who launched holds, and its sign of life.
LOCK, LAUNCHER = "launcher.lock", "launcher.json"
#: Seconds between two signs of life.
BEAT = 2.0


@dataclasses.dataclass(frozen=True)
class Job:
    """What all workers of a launch are told: the folder, and the names of its groups.

    `retries`: how often a group is begun again, without a new checkpoint, after its worker died.
    """

    out: str
    groups: Sequence[str]
    at_once: int | None = None
    retries: int = 3

    def __call__(self, number: int) -> None:
        """Works as worker `number`; returns when every group is done, failed or in other hands.

        Raises: `ConfigError` where locks do not exclude here, and what every group would meet.
        """
        out = Path(self.out)
        (out / FOLDER).mkdir(exist_ok=True)
        check_exclusion(out)
        log = _Log(out, number)
        log("starts")
        planned = [name for name in self.groups if groups_lib.is_planned(out, name)]
        groups = []
        for name in planned:
            with contextlib.suppress(ConfigError):  # done meanwhile
                groups.append(groups_lib.read_group(out, name))
        try:
            Local(lambda out, group: _held(out, group, number, self.retries, log)).launch(
                out, groups, at_once=self.at_once
            )
        except OSError:
            raise
        except Exception:
            if not any(groups_lib.failure_of(out, name) for name in planned):
                raise  # not an error of a group
        log("ends")

    def checkpoint(self, number: int):
        """What submitit submits again when SLURM takes the machine back: the same."""
        import submitit

        return submitit.helpers.DelayedSubmission(self, number)


def taken(out: Path, number: int) -> int:
    """How many groups a worker has taken, by its log."""
    try:
        lines = _Log(out, number).path.read_text().splitlines()
    except FileNotFoundError:
        return 0
    return sum('"event": "takes"' in line for line in lines)


class _Log:
    """Lines of what one worker did, readable while it works."""

    def __init__(self, out: Path, number: int):
        self.path = out / FOLDER / f"{number}.jsonl"

    def __call__(self, event: str, group: str | None = None) -> None:
        line = {"time": time.time(), "event": event, "where": groups_lib.here()}
        line |= {"group": group} if group else {}
        with contextlib.suppress(OSError), open(self.path, "a") as file:
            file.write(json.dumps(line) + "\n")


def _held(out: Path, group: Group, number: int, retries: int, log: _Log):
    """What surrounds the work on a group: notes, and signs of life; None where it died too often.

    A group is begun again without end only while its checkpoints advance.
    """
    path = out / groups_lib.GROUPS / group.name / groups_lib.WORKER
    before: dict = {}
    with contextlib.suppress(ConfigError):
        before = files.read_json(path)
    round = groups_lib.rounds_kept(out, group.name)
    tries = int(before.get("tries", 0)) + 1 if before.get("round") == round else 1
    if tries > retries + 1:
        groups_lib.record_failure(
            out,
            group,
            f"its workers died {tries - 1} times behind round {round}, without an error of their "
            f"own (killed, or out of memory); the last was {before.get('where')}",
        )
        return None

    @contextlib.contextmanager
    def held() -> Iterator[None]:
        content = {"worker": number, "where": groups_lib.here(), "round": round, "tries": tries}
        files.write_json(path, content)
        log("takes", group.name)
        stop = threading.Event()

        def beat():
            while not stop.wait(BEAT):
                with contextlib.suppress(OSError):
                    os.utime(path)

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
            log("finishes", group.name)
        except BaseException:
            log("fails", group.name)
            raise
        finally:
            stop.set()
            thread.join()

    return held()


@contextlib.contextmanager
def launching(out: Path) -> Iterator[None]:
    """Holds the lock that workers try, and gives signs of life, so that each can tell whether locks
    exclude it on its machine."""
    files.check_locks(out / groups_lib.LOCKS)
    lock = files.acquire(out / groups_lib.LOCKS / LOCK)  # None: another launcher holds it
    path, stop = out / groups_lib.LOCKS / LAUNCHER, threading.Event()

    def beat():
        while not stop.wait(BEAT):
            with contextlib.suppress(OSError):
                files.write_atomically(path, f"{time.time()}\n")

    thread = threading.Thread(target=beat, daemon=True)
    if lock is not None:
        files.write_atomically(path, "begins\n")  # before the first worker looks
        thread.start()
    try:
        yield
    finally:
        stop.set()
        if lock is not None:
            thread.join()
            files.remove_files([path])
            lock.release()


def check_exclusion(out: Path) -> None:
    """Raises `ConfigError` where this process gets the lock of a launcher that lives."""
    lock = files.acquire(out / groups_lib.LOCKS / LOCK)
    if lock is None:
        return
    path = out / groups_lib.LOCKS / LAUNCHER

    def sign():
        with contextlib.suppress(OSError):
            return path.read_text()

    try:
        before = sign()
        if before is None:
            return  # who launched is gone
        time.sleep(3 * BEAT)
        if sign() in (before, None):
            return
    finally:
        lock.release()
    raise ConfigError(
        f"Locks of {groups_lib.here()} do not exclude those of the launcher in {str(out)!r}: "
        f"several workers would run the same cells. Choose a folder on a shared file system whose "
        f"locks hold between machines (NFS 4; Lustre mounted with the option flock), or workers on "
        f"one machine."
    )


def main(job: str, number: str) -> None:
    """The program of a worker."""
    try:
        Job(**json.loads(Path(job).read_text()))(int(number))
    except (ValueError, OSError) as error:
        sys.exit(files.describe(error) if isinstance(error, OSError) else str(error))


if __name__ == "__main__":
    main(*sys.argv[1:])
