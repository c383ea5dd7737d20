"""Whether a measured robustness is to be believed: signs of masked gradients, in words."""

import math
from collections.abc import Mapping
from typing import NamedTuple

#: By how much stronger attacks may go below plain PGD before its number misleads: a choice.
STRONGER = 0.1
#: Share of inputs with a gradient of exactly zero that is too many: a choice.
VANISHING = 0.05

#: Inputs of `judge`, by the name under which each one's share is given.
ROLES = {
    "clean": "untouched",
    "noise": "the worst of many random inputs in the ball",
    "one_step": "FGSM",
    "white_box": "PGD, the apparent robustness",
    "stronger": "Auto-PGD, cross-entropy and difference of logits with targets, whichever is worse",
    "scaled": "PGD on scaled logits, the worst of several scales",
    "transfer": "PGD on a surrogate model",
    "unbounded": "PGD in a ball that holds every image",
}


class Finding(NamedTuple):
    """One check: what has to hold for gradients that lead somewhere, and whether it does."""

    check: str
    holds: bool
    words: str


def judge(shares: Mapping[str, float], vanishing: float, images: int) -> tuple[list[Finding], str]:
    """Checks on the shares of examples that robust_mask each attack, and the verdict in a sentence.

    `shares` maps names of `ROLES` to shares in [0, 1]; `transfer` may be missing. `vanishing` is
    the share of inputs where the loss's gradient is exactly zero. Two shares of n = `images`
    examples count as different where they differ by more than two standard errors,
    :math:`2 / \\sqrt{2 n}`.

    "Not believable" is the verdict where gradients seem to be masked, "Overstated" where only
    Auto-PGD is stronger: it finds its way along the gradients, so they are there, and plain PGD
    makes too little of them.

    Source: the behaviours that Athalye, Carlini, Wagner: Obfuscated gradients give a false sense of
    security (ICML 2018), Section 3.1, name as signs of masked gradients. Scaled logits: Carlini and
    Wagner 2016 (as in Zizzo et al. 2020, Section 3.2); stronger attacks: Croce and Hein 2020.

    >>> shares = {"clean": 0.9, "noise": 0.9, "one_step": 0.9, "white_box": 0.85,
    ...           "stronger": 0.84, "scaled": 0.02, "unbounded": 0.8}
    >>> findings, verdict = judge(shares, vanishing=0.7, images=1000)
    >>> [finding.check for finding in findings if not finding.holds]
    ['scaled', 'unbounded', 'vanishing']
    >>> verdict.startswith("Not believable")
    True
    >>> weak = shares | {"scaled": 0.85, "stronger": 0.6, "unbounded": 0.0}
    >>> print(judge(weak, 0.0, images=1000)[1].split(". ")[0])
    Overstated: PGD shows 85.0%, Auto-PGD leaves 60.0%
    """
    apart = 2 / math.sqrt(2 * images)
    pgd = shares["white_box"]
    percent = lambda share: f"{100 * share:.1f}%"  # noqa: E731

    def beside(name, what):
        rate = shares[name]
        holds = rate >= pgd - apart
        relation = "is no stronger than" if holds else "is stronger than"
        return Finding(
            name,
            holds,
            f"{what} {relation} white-box PGD: {percent(rate)} withstand it, {percent(pgd)} PGD.",
        )

    findings = [
        beside("noise", "A random search"),
        beside("one_step", "A single step (FGSM)"),
    ]
    if "transfer" in shares:
        findings.append(beside("transfer", "A black-box transfer attack"))
    findings.append(beside("scaled", "PGD on scaled logits"))
    hard, far = shares["stronger"], shares["unbounded"]
    findings += [
        Finding(
            "stronger",
            hard >= pgd - max(apart, STRONGER),
            f"Auto-PGD leaves {percent(hard)}, plain PGD {percent(pgd)}.",
        ),
        Finding(
            "unbounded",
            far <= apart,
            f"With a radius that allows every image PGD leaves {percent(far)}; gradients that lead "
            f"somewhere leave nothing.",
        ),
        Finding(
            "vanishing",
            vanishing <= VANISHING,
            f"The loss's gradient is exactly zero at {percent(vanishing)} of the inputs.",
        ),
    ]
    bounded = [share for name, share in shares.items() if name not in ("clean", "unbounded")]
    broken = [finding.check for finding in findings if not finding.holds]
    if broken == ["stronger"]:
        verdict = (
            f"Overstated: PGD shows {percent(pgd)}, Auto-PGD leaves {percent(hard)}. Plain PGD is "
            f"too weak a test; there is no sign of masked gradients."
        )
    elif broken:
        verdict = (
            f"Not believable: gradients seem to be masked ({', '.join(broken)}). PGD shows "
            f"{percent(pgd)}, and at most {percent(min(bounded))} are robust."
        )
    else:
        verdict = (
            f"Believable: no sign of masked gradients. At most {percent(min(bounded))} are robust; "
            f"PGD shows {percent(pgd)}."
        )
    return findings, verdict
