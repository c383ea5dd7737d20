"""The audit of a run's robustness: honest robustness, none, and masked gradients."""

import jax
import numpy as np
import pytest
from helpers import small

import fedjax_sec
from fedjax_sec.core import ConfigError
from fedjax_sec.evaluation.masking import ROLES, judge
from fedjax_sec.report.audit import Audit, audit
from fedjax_sec.runs.loading import final_params
from fedjax_sec.runs.results import RunFolder

HONEST = {
    "clean": 0.95,
    "noise": 0.94,
    "one_step": 0.8,
    "white_box": 0.7,
    "stronger": 0.66,
    "scaled": 0.7,
    "transfer": 0.9,
    "unbounded": 0.0,
}


def test_honest_robustness_is_believed():
    findings, verdict = judge(HONEST, 0.0, 1000)
    assert all(finding.holds for finding in findings) and len(findings) == 7
    assert verdict.startswith("Believable") and "At most 66.0%" in verdict


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("noise", 0.6),
        ("one_step", 0.6),
        ("transfer", 0.6),
        ("scaled", 0.6),
        ("unbounded", 0.2),
    ],
)
def test_every_sign_is_seen_alone(name, value):
    findings, verdict = judge(HONEST | {name: value}, 0.0, 1000)
    assert [finding.check for finding in findings if not finding.holds] == [name]
    assert verdict.startswith("Not believable") and name in verdict


def test_a_weak_test_is_told_from_masked_gradients():
    findings, verdict = judge(HONEST | {"stronger": 0.55}, 0.0, 1000)
    assert [finding.check for finding in findings if not finding.holds] == ["stronger"]
    assert verdict.startswith("Overstated: PGD shows 70.0%, Auto-PGD leaves 55.0%")
    both = judge(HONEST | {"stronger": 0.55, "scaled": 0.1}, 0.0, 1000)[1]
    assert both.startswith("Not believable: gradients seem to be masked (scaled, stronger)")
    assert judge(HONEST | {"stronger": 0.55}, 0.3, 1000)[1].startswith("Not believable")


def test_vanishing_gradients_are_seen_and_chance_is_not():
    findings, _ = judge(HONEST, 0.3, 1000)
    assert [finding.check for finding in findings if not finding.holds] == ["vanishing"]
    close = HONEST | {"one_step": 0.69, "scaled": 0.68}
    assert judge(close, 0.0, 1000)[1].startswith("Believable")  # 1 and 2 points of 1,000 examples
    assert judge(close, 0.0, 100_000)[1].startswith("Not believable")


def test_no_surrogate_no_check():
    shares = {name: share for name, share in HONEST.items() if name != "transfer"}
    assert "transfer" not in [finding.check for finding in judge(shares, 0.0, 1000)[0]]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Runs on digits: with adversarial training, without, and one without whose logits are huge."""
    folder = tmp_path_factory.mktemp("audit")
    common = {
        "data": {"num_clients": 4, "max_train": 1437},
        "rounds": 12,
        "model": {"name": "mlp", "hidden": [48]},
        "checkpoint": {"keep_params": True},
    }
    local = {"epochs": 1, "batch_size": 30, "optimizer": {"name": "adam", "learning_rate": 0.005}}
    plain = {"name": "sgd"} | local
    robust = {"name": "adversarial", "eps": 0.1, "step_size": 0.02, "pgd_steps": 10} | local
    for name, client in (("robust", robust), ("plain", plain), ("masked", plain)):
        fedjax_sec.run(small(client=client, **common), out=folder / name)
    # As a student distilled at a high temperature: the same decisions, logits 10,000 times larger.
    experiment = RunFolder(folder / "masked")
    flat = experiment.params()
    model = final_params(folder / "masked")
    last = sorted(model["params"])[-1]
    model["params"][last] = jax.tree.map(lambda leaf: 1e4 * leaf, model["params"][last])
    experiment.write_params(jax.flatten_util.ravel_pytree(model)[0])
    experiment.write_summary(experiment.summary())  # with the new parameters' digest
    assert not np.array_equal(flat, RunFolder(folder / "masked").params())
    return folder


@pytest.mark.slow
def test_a_robust_model_is_believed(trained):
    result = audit(trained / "robust", surrogate=trained / "plain", images=200)
    assert result.verdict.startswith("Believable"), result.to_markdown()
    assert result.eps == pytest.approx(0.1) and set(result.shares) == set(ROLES)
    assert result.shares["white_box"] > 0.5


def test_a_plain_model_is_not_robust_and_not_masked(trained):
    result, robust = (audit(trained / run, eps=0.2, images=200) for run in ("plain", "robust"))
    assert result.verdict.startswith("Believable"), result.to_markdown()
    assert "transfer" not in result.shares
    assert result.shares["white_box"] < robust.shares["white_box"] - 0.1


def test_a_masked_model_is_found_out(trained):
    plain = audit(trained / "plain", eps=0.1, images=200)
    result = audit(trained / "masked", eps=0.1, images=200, surrogate=trained / "plain")
    assert result.shares["clean"] == plain.shares["clean"]  # the same decisions
    assert result.shares["white_box"] > plain.shares["white_box"] + 0.2  # apparent robustness
    assert result.verdict.startswith("Not believable")
    broken = {finding.check for finding in result.findings if not finding.holds}
    assert {"scaled", "transfer", "unbounded", "vanishing"} <= broken, result.to_markdown()
    text = result.to_markdown()
    assert "**fails**" in text and result.verdict in text
    assert Audit.from_json(result.to_json()) == result


def test_what_cannot_be_audited_is_refused(trained, tmp_path):
    with pytest.raises(ConfigError, match="has no radius; give eps"):
        audit(trained / "plain")
    with pytest.raises(ConfigError, match="images must be between 1 and 360, .* got 361"):
        audit(trained / "plain", eps=0.1, images=361)
    with pytest.raises(ConfigError, match="holds no finished run"):
        audit(tmp_path / "nothing", eps=0.1)
