"""Audits the robustness of a finished run: is it there, or are its gradients masked?"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import filelock
import jax
import jax.numpy as jnp
import numpy as np

from fedjax_sec.core import ConfigError, files, registry, value_of
from fedjax_sec.core.host import undisturbed
from fedjax_sec.core.optional import require
from fedjax_sec.evaluation.masking import ROLES, Finding, judge
from fedjax_sec.evaluation.robustness import robust_mask
from fedjax_sec.ops.evasion import objective
from fedjax_sec.runs import config as config_lib
from fedjax_sec.runs import results
from fedjax_sec.runs.loading import final_params, logits_of
from fedjax_sec.runs.source import load_source

#: Scales of the logits that are tried: temperatures 10, 100 and 1,000.
SCALES = (0.1, 0.01, 0.001)
#: The fields of an audit that are measured, the others being said about them.
MEASURED = ("label", "eps", "images", "shares", "vanishing")


class Audit(NamedTuple):
    """`shares` of `images` test examples that withstand each attack, and what follows."""

    label: str
    eps: float
    images: int
    shares: dict[str, float]
    vanishing: float
    findings: list[Finding]
    verdict: str

    def to_json(self) -> str:
        """The measurements as JSON; `from_json` judges them again."""
        return json.dumps({name: getattr(self, name) for name in MEASURED}, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Audit":
        """The audit with these measurements, judged as this version judges."""
        kept = json.loads(text)
        findings, verdict = judge(kept["shares"], kept["vanishing"], kept["images"])
        return cls(**{name: kept[name] for name in MEASURED}, findings=findings, verdict=verdict)

    def to_markdown(self) -> str:
        """The table, the findings and the verdict."""
        lines = [
            {"attack": name, "what": ROLES[name], "withstand (%)": 100 * share}
            for name, share in self.shares.items()
        ]
        table = (
            require("pandas", "The table of an audit")
            .DataFrame(lines)
            .to_markdown(index=False, floatfmt=".1f")
        )
        said = "\n".join(
            f"- {'holds' if f.holds else '**fails**'}: {f.words}" for f in self.findings
        )
        head = f"{self.label}, radius {self.eps:g} (L-infinity), first {self.images} test examples."
        return f"{head}\n\n{table}\n\n{said}\n\n**{self.verdict}**\n"


@undisturbed
def audit(
    run: str | Path,
    *,
    surrogate: str | Path | None = None,
    eps: float | None = None,
    step_size: float | None = None,
    steps: int = 40,
    restarts: int = 1,
    images: int = 500,
    batch_size: int = 250,
    seed: int = 0,
) -> Audit:
    """Attacks the final model of a finished run in several ways and compares what withstands them.

    `run` and `surrogate` are folders of finished runs that kept their parameters; without a
    surrogate there is no transfer attack. `eps` and `step_size` are in pixels and come from the
    run's own adversarial training where it has any; step_size is otherwise a tenth of eps. `steps`
    and `restarts` are PGD's; Auto-PGD takes 100 steps. See `fedjax_sec.evaluation.masking.judge`.

    Raises: `ConfigError` for a folder without a finished run, a radius that nobody has given, or
    more images than there are.
    """
    folder = results.RunFolder(Path(run))
    params = final_params(run)
    experiment = config_lib.load(folder.path / results.CONFIG)
    eps = _own(experiment, "eps", eps)
    if eps is None:
        raise ConfigError(
            f"audit: {str(run)!r} was not trained adversarially, so it has no radius; give eps."
        )
    step_size = _own(experiment, "step_size", step_size) or eps / 10
    source = load_source(experiment)
    if not 1 <= images <= len(source.y_test):
        raise ConfigError(
            f"audit: images must be between 1 and {len(source.y_test)}, the test examples of "
            f"{source.label}, got {images}."
        )
    x = jnp.asarray(source.x_test[:images] / np.float32(source.scale))
    y = jnp.asarray(source.y_test[:images])
    victim, other = logits_of(experiment), None
    task = experiment.task or registry.tasks.build(source.task)
    if surrogate is not None:
        config = config_lib.load(Path(surrogate) / results.CONFIG)
        other = logits_of(config), final_params(surrogate)

    def share(specs: Sequence[dict], surrogate=None) -> float:
        """Of the examples that withstand all of these attacks."""
        held = np.ones(images, bool)
        for spec in specs:
            attack = registry.evasions.build({"eps": eps} | spec)

            @jax.jit
            def run_attack(params, others, key, attack=attack):
                def logits(inputs):
                    return victim(params, inputs)

                def beside(inputs):
                    return other[0](others, inputs)

                if surrogate is None:
                    return robust_mask(attack, key, logits, task.right, x, y, batch_size)
                moved = registry.evasions.get("transfer")(surrogate="-", attack=attack)
                return robust_mask(moved, key, logits, task.right, x, y, batch_size, beside)

            held &= np.asarray(run_attack(params, surrogate, jax.random.key(seed)))
        return float(held.mean())

    pgd = {"name": "pgd", "step_size": step_size, "steps": steps, "restarts": restarts}
    targets = min(9, source.num_classes - 1)
    ratio = {"name": "apgd", "loss": "dlr", "targets": targets}
    if source.num_classes < 4:
        ratio = {"name": "apgd", "loss": "margin", "targets": targets}
    shares = {
        "clean": share([{"name": "noise", "eps": 0.0, "tries": 1}]),
        "noise": share([{"name": "noise"}]),
        "one_step": share([{"name": "fgsm"}]),
        "white_box": share([pgd]),
        "stronger": share([{"name": "apgd"}, ratio]),
        "scaled": share([pgd | {"logit_scale": scale} for scale in SCALES]),
    }
    if other is not None:
        shares["transfer"] = share([pgd], other[1])
    shares["unbounded"] = share([pgd | {"eps": 1.0, "step_size": 0.05, "steps": max(steps, 100)}])

    @jax.jit
    def slopes(params):
        def loss(inputs):
            return objective("cross_entropy", victim(params, inputs), y).sum()

        return jnp.all(jax.grad(loss)(x).reshape(images, -1) == 0, axis=1)

    vanishing = float(np.mean(slopes(params)))
    findings, verdict = judge(shares, vanishing, images)
    return Audit(source.label, float(eps), images, shares, vanishing, findings, verdict)


def _own(experiment, field: str, given):
    """The given value, else the field of the run's adversarial training, else None."""
    if given is not None:
        return given
    value = value_of(experiment.client, field)
    return float(value) if isinstance(value, (int, float)) else None


def kept(run: Path, *, surrogate: Path | None = None, **arguments) -> Audit:
    """The audit of a run; one made before with the same arguments is kept beside its metrics.

    `arguments` are numbers that `audit` takes. Processes that share the output folder make it once:
    the others wait.
    """
    against = "" if surrogate is None else f"-{surrogate.parent.name}-{surrogate.name}"
    asked = "-".join(f"{name}{value:g}" for name, value in arguments.items())
    path = run / f"audit-{asked}{against}.json"
    with filelock.FileLock(run / "audit.lock"):
        if not path.exists():
            files.write_atomically(path, audit(run, surrogate=surrogate, **arguments).to_json())
    return Audit.from_json(path.read_text())
