r"""CRFL's certificate (Xie et al. 2021): how large a backdoor may be that changes no prediction.

A model that was trained with clipping and noise is smoothed: a class's share of the votes of many
copies of it, each with noise of its own, bounds the probability of that class. If the leading class
has probability :math:`p_A` at least and every other one :math:`p_B` at most, the prediction is that
of training without the backdoor as long as the backdoor's norm is below a radius.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from fedjax_sec.evaluation.batches import in_batches


def votes(
    outputs: Callable,
    params: Float[Array, " D"],
    key: PRNGKeyArray,
    x: Any,
    num_classes: int,
    *,
    copies: int,
    std: float,
    together: int = 20,
    batch_size: int = 500,
) -> Int[Array, "T C"]:
    """How many of the copies `params + N(0, std^2)` read each example as each class.

    `outputs(params [D], x [B, ...]) -> [B, C]`, of examples as stored. So many copies are computed
    `together`; copy number m has the same noise whatever that is.
    """

    def one(number):
        noise = jax.random.normal(jax.random.fold_in(key, number), params.shape)
        noisy = params + std * noise
        return in_batches(lambda batch: jnp.argmax(outputs(noisy, batch), axis=-1), batch_size, x)

    def add(counts, numbers):
        read = jax.vmap(one)(numbers)
        hits = read[:, :, None] == jnp.arange(num_classes)[None, None]
        return counts + jnp.sum(hits & (numbers < copies)[:, None, None], axis=0), None

    together = min(together, copies)
    numbers = jnp.arange(-(-copies // together) * together).reshape(-1, together)
    counts = jnp.zeros((x.shape[0], num_classes), jnp.int32)
    return jax.lax.scan(add, counts, numbers)[0]


class Bounds(NamedTuple):
    """The class that most copies read, and bounds of its and all others' probability, each [T]."""

    label: np.ndarray
    lower: np.ndarray
    upper: np.ndarray


def hoeffding(copies: int, alpha: float) -> float:
    r"""How far a share of `copies` votes is from its probability, but with probability `alpha`.

    .. math:: \sqrt{\ln(1 / \alpha) / (2 M)}

    >>> round(hoeffding(1000, 0.001), 6)
    0.05877
    """
    return math.sqrt(math.log(1 / alpha) / (2 * copies))


def bounds(counts: Any, alpha: float, floor: float = 0.0) -> Bounds:
    """The bounds from votes [T, C]: p_A below, and p_B above, each but with probability `alpha`.

    They stay `floor` away from 0 and 1.

    >>> label, lower, upper = bounds(np.array([[900, 100, 0]]), 0.001)
    >>> label.item(), lower.item().__round__(3), upper.item().__round__(3)
    (0, 0.841, 0.159)
    """
    counts = np.asarray(counts, np.int64)
    copies, label = counts[0].sum(), counts.argmax(axis=1)
    rest = counts.copy()
    rest[np.arange(len(rest)), label] = 0
    apart = hoeffding(int(copies), alpha)
    lower = np.maximum(floor, counts.max(axis=1) / copies - apart)
    return Bounds(label, lower, np.minimum(1 - floor, rest.max(axis=1) / copies + apart))


class Terms(NamedTuple):
    """Quantities that the radius depends on beside the votes.

    In the attacked round each of the R attackers has a `weight` in the mean, takes `steps` local
    steps with the learning rate `rate`, in each of which a share `poisoned` of the batch carries
    the backdoor, and multiplies its update by `scale`: sequences of R numbers, or one for all.
    `std` is the deviation of the noise in that round, `lipschitz` the constant of the loss's
    gradient in the example, and `later` holds (largest norm, deviation of the noise) of each later
    round, the last one's being the smoothing noise.
    """

    weight: Any
    steps: Any
    rate: float
    poisoned: Any
    scale: Any
    std: float
    lipschitz: float
    later: tuple[tuple[float, float], ...]


def lipschitz_constant(radius: float) -> float:
    r"""The constant of multi-class logistic regression whose parameters have this norm at most.

    .. math:: L = \sqrt{2 + 2 \rho + \rho^2}

    It bounds how fast the gradient of the loss in the parameters changes with the inputs. That is
    true of short inputs only: see `lipschitz_on_inputs`.

    Source: Xie et al. 2021, by the author code (AI-secure/CRFL, `certify_mnist.py`,
    `cal_prob_bound`).

    >>> lipschitz_constant(3.0) == math.sqrt(17.0)
    True
    """
    return math.sqrt(2 + 2 * radius + radius**2)


def lipschitz_on_inputs(radius: float, norm: float) -> float:
    r"""A constant that holds for inputs of this norm at most, ours and not the paper's.

    With W and b of norm :math:`\rho` at most, the gradient of an example of class y is
    :math:`(p - e_y) (x, 1)^T`. As x moves by dx, p moves by :math:`\frac{1}{2} \rho \|dx\|` at
    most, since 1/2 bounds the derivative of softmax; :math:`\|p - e_y\| \le \sqrt 2`. So

    .. math:: L = \frac{\rho}{2} \sqrt{\|x\|^2 + 1} + \sqrt 2

    It speaks of a change of the inputs. A changed label moves the gradient by
    :math:`\sqrt{2 (\|x\|^2 + 1)}` however small the pattern is.

    >>> lipschitz_on_inputs(2.0, 0.0) == 1.0 + math.sqrt(2.0)
    True
    """
    return 0.5 * radius * math.sqrt(norm**2 + 1) + math.sqrt(2)


def log_contraction(radius: float, std: float) -> float:
    r"""The logarithm of what a round of clipping and noise leaves of a difference, in float64.

    .. math:: \ln (2 \Phi(\rho / \sigma) - 1)

    From :math:`\rho / \sigma` of about 39 on it is smaller than any number of float64: then a round
    leaves everything, and waiting for more rounds makes no radius larger. With the paper's
    :math:`\sigma = 0.01` and :math:`\rho \ge 2` it is 200.

    >>> round(log_contraction(1.0, 1.0), 6), log_contraction(2.0, 0.01) == 0
    (-0.381715, True)
    """
    if std == 0:
        return 0.0
    at = radius / std / math.sqrt(2)
    return math.log(math.erf(at)) if at < 1 else math.log1p(-math.erfc(at))


def radius(lower: Any, upper: Any, terms: Terms, abstains: bool = True) -> np.ndarray:
    r"""The radius of each example [T], NaN where there is none: the certificate abstains.

    .. math:: RAD = \sqrt{\frac{-\ln\left(1 - (\sqrt{p_A} - \sqrt{p_B})^2\right) \sigma^2}
              {2 R L^2 \sum_i \left(w_i \gamma_i \tau_i \eta \frac{q_i}{B}\right)^2
               \prod_t (2 \Phi(\rho_t / \sigma_t) - 1)}}

    The backdoor's norm is that of the change of an example. It abstains where
    :math:`p_A \le p_B`; without `abstains` the square hides that, as in the author code.

    >>> one = Terms(1.0, 1.0, 1.0, 1.0, 1.0, std=1.0, lipschitz=1.0, later=())
    >>> radius([1 - 2 / math.e**2 / 2, 0.4], [0.0, 0.5], one).round(6)
    array([ 1., nan])
    """
    lower, upper = np.asarray(lower, np.float64), np.asarray(upper, np.float64)
    parts = (terms.weight, terms.scale, terms.steps, terms.rate, terms.poisoned)
    change = np.atleast_1d(np.prod(np.broadcast_arrays(*map(np.float64, parts)), axis=0))
    left = math.fsum(log_contraction(*later) for later in terms.later)
    spread = 2 * len(change) * terms.lipschitz**2 * np.sum(change**2) * math.exp(left)
    apart = (np.sqrt(lower) - np.sqrt(upper)) ** 2
    with np.errstate(divide="ignore", invalid="ignore"):
        largest = np.sqrt(-np.log1p(-apart) * terms.std**2 / spread)
    return np.where(lower > upper, largest, np.nan) if abstains else largest


class Certified(NamedTuple):
    """At each radius, the shares of the examples that are certified, and correct too."""

    radius: np.ndarray
    rate: np.ndarray
    accuracy: np.ndarray


def certified(radii: Any, correct: Any, at: Any) -> Certified:
    """Certified rate and accuracy `at` some radii, from each example's; NaN is never certified.

    >>> certified([1.0, 3.0, np.nan, 2.0], [True, True, True, False], [0.0, 2.0]).accuracy
    array([0.5 , 0.25])
    """
    at, radii = np.asarray(at, np.float64), np.asarray(radii, np.float64)
    holds = radii[None] >= at[:, None]
    right = holds & np.asarray(correct, bool)[None]
    return Certified(at, holds.mean(axis=1), right.mean(axis=1))
