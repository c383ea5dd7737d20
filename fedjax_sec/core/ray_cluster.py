"""Ray (extra `[ray]`): a cluster that is joined for a while, and what its tasks are given."""

import contextlib
import logging
import os
import signal
import warnings
from collections.abc import Iterator
from typing import Any

from fedjax_sec.core.advice import one_line
from fedjax_sec.core.fields import ConfigError
from fedjax_sec.core.optional import require

#: Settings of the environment that tasks have from the process that starts them.
_INHERITED = (
    *("FEDJAX_SEC_", "JAX_", "XLA_", "TF_CPP_"),
    *("WANDB_MODE", "WANDB_PROJECT", "WANDB_ENTITY", "WANDB_BASE_URL"),  # no key: it would be shown
)


@contextlib.contextmanager
def joined(address: str | None, purpose: str) -> Iterator[Any]:
    """The package Ray, connected to a cluster; a connection that was there before is used and kept.

    Args:
      address: the cluster's, or `auto`; None: a new one of this machine.
      purpose: what needs Ray, the subject of messages.

    Raises: `ConfigError` where Ray is not installed, or no cluster answers.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray = require("ray", purpose)
    ours = not ray.is_initialized()
    try:
        if ours:
            _join(ray, address, purpose)
        yield ray
    finally:
        if ours:
            ray.shutdown()


def _join(ray: Any, address: str | None, purpose: str) -> None:
    before = signal.getsignal(signal.SIGTERM)
    try:
        with warnings.catch_warnings():  # JAX's of a fork, behind which another program is started
            warnings.filterwarnings("ignore", r"os\.fork\(\) was called", RuntimeWarning)
            ray.init(
                address=address or "local",
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.WARNING,
            )
    except Exception as error:  # of many types, a plain one where a node is slow to start
        wanted = f"joined no cluster at {address!r}" if address else "started no cluster"
        hint = " (A cluster that asks for a token is joined at 'auto', or with RAY_AUTH_MODE=token "
        hint += "in the environment.)"
        raise ConfigError(
            f"{purpose} {wanted}: {type(error).__name__}: {one_line(error)}{hint * bool(address)}"
        ) from error
    if callable(before) and signal.getsignal(signal.SIGTERM) is not before:
        # Ray has put a handler of its own in the place of the caller's.
        signal.signal(signal.SIGTERM, before)


def gpus_each(ray: Any, given: float | None) -> float:
    """GPUs of a task: as given, else one where the cluster has any."""
    return float(ray.cluster_resources().get("GPU", 0) > 0) if given is None else given


def environment() -> dict[str, dict[str, str]]:
    """The `runtime_env` of tasks: they have this process's settings of JAX and of fedjax_sec."""
    settings = {k: v for k, v in os.environ.items() if k.startswith(_INHERITED)}
    return {"env_vars": settings}


def go_to(folder: str) -> None:
    """Takes a task to the folder of who started it, if its node has it: for relative paths.

    >>> go_to("/nowhere")
    """
    with contextlib.suppress(OSError):
        os.chdir(folder)
