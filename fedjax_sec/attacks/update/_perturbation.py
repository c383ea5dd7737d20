"""The perturbation range that ALIE's attacks share, and its check."""

from fedjax_sec.attacks.update._directed import stand_ins
from fedjax_sec.core import ConfigError
from fedjax_sec.ops.moments import mean_and_std
from fedjax_sec.ops.perturbation import z_max


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


def check_statistics(path, statistics, setting) -> None:
    """Raises `ConfigError` when honest updates are asked for and the adversary sees none."""
    if statistics == "honest" and setting.knowledge == "corrupted":
        raise ConfigError(
            f"{path}.statistics 'honest' needs an adversary that sees honest clients, but its "
            f"knowledge is 'corrupted'; set threat.knowledge to omniscient, or statistics to seen."
        )


def counted(attack, view):
    """[K]: the rows over which the attack takes its statistics."""
    return view.visible if attack.statistics == "seen" else stand_ins(view)


def perturbation_range(attack, updates, view):
    """Mean [D] and standard deviation [D] of the updates that count, and the attack's z."""
    mean, std = mean_and_std(updates, counted(attack, view), attack.ddof)
    z = attack.z
    if z is None:
        z = z_max(updates.shape[0], view.malicious.sum(), attack.z_formula)
    return mean, std, z
