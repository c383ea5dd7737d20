"""Checks that the attacks share."""

from fedjax_sec.schema import ConfigError


def check_z_max(path, formula, setting) -> None:
    """Raises `ConfigError` when z is to be computed but its formula has no finite value."""
    n, m = setting.num_clients, setting.num_malicious
    if m is None or setting.sampled:
        return  # m differs from round to round; `z_max` handles each
    s = n // 2 + 1 - m
    rest = n - s if formula == "text" else n - m - s
    if s < 1 or rest < 1:
        raise ConfigError(
            f"{path}.z: z_max has no finite value for n = {n} clients and m = {m} malicious ones "
            f"(s = floor(n/2 + 1) - m = {s} must be at least 1 and leave a positive share); give z."
        )
