"""What the names of metrics say: whether they are shares, and which end is the bad one."""

import re

_SHARE = re.compile(r"accuracy|rate|kept|success|identified|ssim")
_GOOD = re.compile(r"accuracy|kept_honest|true_positive")


def is_share(metric: str) -> bool:
    """Whether a metric is in [0, 1] and shown in percent.

    >>> is_share("best_accuracy"), is_share("loss")
    (True, False)
    """
    return bool(_SHARE.search(metric))


def lowest_is_worst(metric: str) -> bool:
    """Whether a low value is the bad one, for the server and the honest clients.

    >>> lowest_is_worst("accuracy"), lowest_is_worst("attack_success_rate")
    (True, False)
    """
    return bool(_GOOD.search(metric))
