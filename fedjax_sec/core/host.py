"""Settings of the caller's process that libraries below change, and that are put back."""

import contextlib
import functools
import logging
import random
import threading
from collections.abc import Callable

from fedjax_sec.core.caching import compiled_programs_kept

_lock = threading.Lock()
_users = 0
#: Python's handler of warnings where nobody has configured logging.
_LAST_RESORT = logging.lastResort or logging.StreamHandler()


@contextlib.contextmanager
def _logging_unconfigured():
    """Keeps absl from configuring the root logger, which its first message does otherwise.

    With a handler of its own the root logger would ignore the caller's `logging.basicConfig`. The
    handler here is the one that Python falls back to without any, so nothing is printed otherwise.
    """
    global _users
    with _lock:
        if _users == 0 and not logging.root.handlers:
            logging.root.addHandler(_LAST_RESORT)
        _users += 1
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if _users == 0:
                logging.root.removeHandler(_LAST_RESORT)


@contextlib.contextmanager
def imports_unnoticed():
    """Puts back Python's random state, from which a library draws when it is imported."""
    state = random.getstate()
    try:
        yield
    finally:
        random.setstate(state)


def undisturbed(function: Callable) -> Callable:
    """A function after which the process is as before: JAX's settings and the root logger.

    While it runs, JAX keeps compiled programs in our cache.
    """

    @functools.wraps(function)
    def wrapped(*args, **kwargs):
        with _logging_unconfigured(), compiled_programs_kept():
            return function(*args, **kwargs)

    return wrapped
