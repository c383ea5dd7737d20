"""Checks that the aggregators share."""

from fedjax_sec.core import ConfigError


def check_num_byzantine(path, rule, num_byzantine, num_clients, largest, bound) -> None:
    """Raises `ConfigError` when f is missing or larger than the rule tolerates for K clients.

    `largest` is the largest tolerable f, `bound` the condition in words.
    """
    at = f"{path}.num_byzantine"
    if num_byzantine is None:
        raise ConfigError(f"{at} is required: how many Byzantine clients {rule} is to tolerate.")
    if num_byzantine > largest:
        allowed = f"num_byzantine <= {largest}"
        if largest < 0:
            allowed = "no num_byzantine at all, so more clients must take part in a round"
        raise ConfigError(
            f"{at}: {rule} needs {bound}; with K = {num_clients} clients that allows {allowed}, "
            f"got {num_byzantine}."
        )
