"""Privacy accounting, by Google's dp_accounting."""

import math

from fedjax_sec.core.optional import require


def require_accountant():
    """The package; its absence is an error that names the extra."""
    return require("dp_accounting.rdp", "The epsilon of differentially private training")


def gaussian_epsilon(noise: float, passes: int, delta: float) -> float:
    """epsilon of so many Gaussian mechanisms of sensitivity 1 and this standard deviation.

    By Renyi differential privacy; infinite without noise.

    >>> round(gaussian_epsilon(1.0, 10, 1e-5), 2)
    19.05
    """
    if passes == 0:
        return 0.0
    if noise == 0:
        return math.inf
    rdp = require_accountant()
    import dp_accounting

    accountant = rdp.RdpAccountant()
    event = dp_accounting.SelfComposedDpEvent(dp_accounting.GaussianDpEvent(noise), passes)
    return float(accountant.compose(event).get_epsilon(delta))
