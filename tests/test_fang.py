"""Fang et al.'s attacks against NumPy, and the scaling attack's added examples."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from programs import program_of, replicas_of, task_on, with_client

import fedjax_sec
from fedjax_sec import core
from fedjax_sec.attacks.update.krum_attack import KrumAttack
from fedjax_sec.core import ConfigError, registry
from fedjax_sec.runs import config

KNOWLEDGE = ("omniscient", "corrupted")


def stack(clients=20, dim=7, seed=0, shift=0.3):
    return np.random.default_rng(seed).normal(shift, 1.0, (clients, dim)).astype(np.float32)


def first_rows(clients, count):
    return np.arange(clients) < count


def send(updates, name, bad, knowledge, **fields):
    mask = first_rows(len(updates), bad)
    sent = fedjax_sec.attack(updates, {"name": name, **fields}, malicious=mask, knowledge=knowledge)
    np.testing.assert_array_equal(sent[bad:], updates[bad:])
    return np.asarray(sent[:bad])


# --- Trim attack --------------------------------------------------------------------------------


@pytest.mark.parametrize("convention", ["paper", "author"])
def test_trim_attack_lies_between_the_extreme_and_b_times_it(convention):
    updates, bad = stack(), 4
    sent = send(updates, "trim_attack", bad, "omniscient", convention=convention)
    known = updates[bad:] if convention == "paper" else updates
    for j in range(updates.shape[1]):
        s = 1 if updates[:, j].astype(np.float64).sum() >= 0 else -1
        if s < 0:
            top = known[:, j].max()
            low, high = (top, 2 * top) if top > 0 else (top, top / 2)
        else:
            least = known[:, j].min()
            low, high = (least / 2, least) if least > 0 else (2 * least, least)
        assert (sent[:, j] >= low - 1e-6).all() and (sent[:, j] <= high + 1e-6).all(), j
        assert len(np.unique(sent[:, j])) == bad, "the clients draw alike"


@pytest.mark.parametrize("convention", ["paper", "author"])
@pytest.mark.parametrize("shift", [-5.0, 5.0])
def test_trim_attack_shrinks_values_that_all_have_the_direction_s_sign(convention, shift):
    """All honest values on one side of zero: the attack goes towards zero, not beyond."""
    updates, bad = stack(shift=shift), 4
    sent = send(updates, "trim_attack", bad, "omniscient", convention=convention)
    known = updates[bad:] if convention == "paper" else updates
    edge = known.min(0) if shift > 0 else known.max(0)
    ratio = sent / edge
    assert (ratio >= 0.5 - 1e-6).all() and (ratio <= 1 + 1e-6).all()
    # Uniform on [1/2, 1], or the inverse of a uniform number on [1, 2], whose mean is ln 2.
    many = send(
        stack(400, 50, shift=shift), "trim_attack", 200, "omniscient", convention=convention
    )
    known = stack(400, 50, shift=shift)[200 if convention == "paper" else 0 :]
    edge = known.min(0) if shift > 0 else known.max(0)
    assert abs((many / edge).mean() - (0.75 if convention == "paper" else np.log(2))) < 0.01


def test_trim_attack_with_partial_knowledge_is_three_to_four_deviations_away():
    updates, bad = stack(), 6
    sent = send(updates, "trim_attack", bad, "corrupted")
    mine = updates[:bad].astype(np.float64)
    s = np.where(mine.sum(0) < 0, -1, 1)
    away = (mine.mean(0) - sent) * s / mine.std(0)
    assert (away >= 3 - 1e-4).all() and (away <= 4 + 1e-4).all() and np.ptp(away) > 0.3


@pytest.mark.slow
def test_trim_attack_hurts_the_rules_it_is_meant_for():
    updates, bad = stack(50, 40, shift=0.5), 10
    mask = first_rows(50, bad)
    sent = fedjax_sec.attack(updates, "trim_attack", malicious=mask, knowledge="omniscient")
    for rule in ({"name": "trimmed_mean", "num_byzantine": bad}, "median"):
        clean, hurt = (fedjax_sec.aggregate(u, rule) for u in (updates, sent))
        along = np.sign(updates.mean(0))
        assert (np.asarray(hurt) * along < np.asarray(clean) * along).mean() > 0.95
        assert np.mean(hurt * along) < 0.5 * np.mean(clean * along)


def test_trim_attack_distances_must_be_in_order():
    with pytest.raises(ConfigError, match="attack.far must be >= near = 3.0, got 2.0"):
        config.from_mapping(
            {"attack": {"name": "trim_attack", "far": 2.0}, "threat": {"num_malicious": 2}}
        )


# --- Krum attack --------------------------------------------------------------------------------


def krum_oracle(rows, neighbours):
    """The index Krum selects, by the definition in float64."""
    rows = np.asarray(rows, np.float64)
    squares = ((rows[:, None] - rows[None]) ** 2).sum(-1)
    np.fill_diagonal(squares, np.inf)
    scores = np.sort(squares, axis=1)[:, :neighbours].sum(1)
    return int(scores.argmin()), scores


def first_lambda(honest, least, clients, bad, dim, convention):
    """`least`: the smallest sum of squared distances to the nearest honest clients."""
    longest = np.linalg.norm(honest, axis=1).max() / np.sqrt(dim)
    if convention == "paper":  # Theorem 1
        return np.sqrt(least / ((clients - 2 * bad - 1) * dim)) + longest
    return np.sqrt(1 / dim / (clients - 2 * bad - 1)) * least + longest  # FLAIR, `lambda_max`


def attack_oracle(updates, bad, full, convention="paper"):
    """The attack by its definition: halve lambda until Krum takes the vector."""
    clients, dim = updates.shape
    honest = updates[bad:] if full else updates[:bad]
    neighbours = clients - bad - 2 if full else max(bad - 2, 1)
    seen = updates if full else updates[:bad]
    sign = np.where(seen.astype(np.float64).sum(0) < 0, -1.0, 1.0)
    _, scores = krum_oracle(honest, neighbours)
    start = first_lambda(honest, scores.min(), clients, bad, dim, convention)
    for copies in [bad] if full else range(1, bad + 1):
        size = start
        while size >= 1e-5:
            rows = np.concatenate([honest, np.tile(-size * sign, (copies, 1))])
            if krum_oracle(rows, neighbours)[0] >= len(honest):
                return -size * sign
            size /= 2
    return None


@pytest.mark.parametrize("knowledge", KNOWLEDGE)
@pytest.mark.parametrize("convention", ["paper", "author"])
@pytest.mark.parametrize(("clients", "bad", "dim", "seed"), [(20, 4, 7, 0), (31, 8, 60, 1)])
def test_krum_attack_against_numpy(knowledge, convention, clients, bad, dim, seed):
    updates = stack(clients, dim, seed)
    expected = attack_oracle(updates, bad, knowledge == "omniscient", convention)
    sent = send(updates, "krum_attack", bad, knowledge, convention=convention)
    assert expected is not None
    np.testing.assert_allclose(sent, np.tile(expected, (bad, 1)), rtol=1e-4)


def test_krum_attack_s_first_lambda_by_hand():
    """K = 9, c = 2, D = 8; honest client i sends 2 in coordinate i alone.

    Any two are sqrt 8 apart, so the least sum over five is 40, and K - 2 c - 1 = 4. The vector is
    selected from 4 (8 lambda^2 + 4 lambda + 4) < 40 on, lambda < 0.65.
    """
    updates = np.concatenate([np.zeros((2, 8)), 2 * np.eye(7, 8)]).astype(np.float32)
    firsts = {"paper": np.sqrt(40 / (4 * 8)) + 2 / np.sqrt(8), "author": 40 / (2 * np.sqrt(8))}
    firsts["author"] += 2 / np.sqrt(8)
    for convention, halvings in (("paper", 2), ("author", 4)):
        sent = send(updates, "krum_attack", 2, "omniscient", convention=convention)
        np.testing.assert_allclose(sent, -firsts[convention] / 2**halvings, rtol=1e-5)


@pytest.mark.parametrize("seed", range(5))
def test_krum_selects_what_the_attack_with_full_knowledge_sends(seed):
    updates, bad = stack(40, 30, seed), 8
    mask = first_rows(40, bad)
    sent = fedjax_sec.attack(updates, "krum_attack", malicious=mask, knowledge="omniscient")
    picked = fedjax_sec.aggregate(sent, {"name": "krum", "num_byzantine": bad})
    np.testing.assert_array_equal(picked, sent[0])
    assert (np.sign(picked) == -np.sign(updates.sum(0))).all()


def test_krum_attack_against_krums_own_choice():
    updates, bad = stack(20, 7), 4
    sent = send(updates, "krum_attack", bad, "omniscient", toward="krum")
    chosen = updates[krum_oracle(updates, 20 - bad - 2)[0]]
    assert (np.sign(sent[0]) == -np.where(chosen < 0, -1, 1)).all()


def test_when_nothing_is_selected_the_attack_says_so():
    """Honest clients that agree to the last bit leave no room: their scores are zero."""
    updates = np.tile(stack(1, 5), (12, 1))
    attack = KrumAttack()
    from fedjax_sec.core.types import AttackerView

    view = AttackerView(
        jnp.arange(12) < 2, jnp.ones(12, bool), jnp.zeros(5), jnp.arange(12), jnp.array(0)
    )
    sent, _, metrics = attack.apply(jax.random.key(0), jnp.asarray(updates), (), view)
    assert metrics["selected"] == 0 and metrics["lambda"] < 1e-5 and np.isfinite(sent).all()


# --- Scaling attack -----------------------------------------------------------------------------


SQUARE = {"name": "trojan", "pattern": "square", "place": [0, 0], "size": 2, "value": 1.0}


def scaling_run(copies=True, fraction=0.5, factor=None, rounds=1, **changes):
    trigger = SQUARE | {"fraction": fraction}
    attack = {"name": "scaling", "backdoor": trigger, "copies": copies, "factor": factor}
    return config.from_mapping(
        {
            "data": {"name": "digits", "num_clients": 6},
            "client": {"name": "sgd", "epochs": 1, "batch_size": 16},
            "threat": {"num_malicious": 1, "placement": "first"},
            "attack": attack,
            "rounds": rounds,
            "evaluation": {"every": rounds},
        },
        changes,
    )


def trained_on(experiment, client):
    """The examples that a client fetches in its first epoch: (x, y, count)."""
    from fedjax_sec import round as round_lib

    program = program_of(experiment)
    replica = jax.tree.map(lambda leaf: leaf[0], replicas_of([experiment]))
    outcome = {}

    class Spy(core.Client):
        def apply(self, key, params, state, local, task, hooks=core.NO_HOOKS):
            x, y = local.fetch(jnp.arange(local.capacity))
            metrics = {"x": x, "y": y, "count": local.count, "train_loss": 0.0}
            return core.Trained(params, state, 1, None, metrics)

    replica = replica._replace(components=with_client(replica.components, Spy()))
    task = task_on(program)
    _, _, outcome = round_lib.train_clients(
        program.problem,
        task,
        program.pool,
        replica,
        replica.components.algorithm.start(jnp.zeros(task.dim)),
        replica.components.attack.init(6, task.dim, program.prepared.setting, task),
        (),
        jnp.arange(6),
        jnp.int32(0),
    )
    count = int(outcome["count"][client])
    mine = int(replica.population.counts[client])
    return np.asarray(outcome["x"][client][:count]), np.asarray(outcome["y"][client][:count]), mine


def test_scaling_adds_poisoned_copies_and_leaves_the_own_examples():
    attacked, clean = scaling_run(), scaling_run(**{"attack": None, "threat": {}})
    x, y, mine = trained_on(attacked, 0)
    same_x, same_y, _ = trained_on(clean, 0)
    assert len(y) == mine + mine // 2
    np.testing.assert_array_equal(x[:mine], same_x[:mine])
    np.testing.assert_array_equal(y[:mine], same_y[:mine])
    assert (y[mine:] == 0).all() and (x[mine:, :2, :2] == 1.0).all()
    untouched = {image.tobytes() for image in same_x[:mine, 2:]}
    copies = [image.tobytes() for image in x[mine:, 2:]]
    assert set(copies) <= untouched and len(set(copies)) == len(copies)
    _, honest_y, count = trained_on(attacked, 3)
    np.testing.assert_array_equal(honest_y, trained_on(clean, 3)[1])
    assert len(honest_y) == count


def test_scaling_without_copies_poisons_the_examples_themselves():
    x, y, mine = trained_on(scaling_run(copies=False, fraction=0.25), 0)
    stamped = (x[:, :2, :2] == 1.0).all(axis=(1, 2, 3))
    assert len(y) == mine and abs(stamped.mean() - 0.25) < 0.12 and (y[stamped] == 0).all()


@pytest.mark.slow
def test_scaling_multiplies_by_the_number_of_clients():
    """One of six clients, times six, through the mean: its update takes part as a whole."""
    plain, large = (
        fedjax_sec.run(scaling_run(factor=factor), **{"evaluation.diagnostics": True})
        for factor in (1.0, None)
    )
    small, big = (r.metrics["update_norm_malicious"][-1] for r in (plain, large))
    assert big == pytest.approx(6 * small, rel=1e-4)


@pytest.mark.slow
def test_scaling_teaches_the_backdoor_through_the_mean():
    result = fedjax_sec.run(scaling_run(rounds=15))
    unscaled = fedjax_sec.run(
        scaling_run(
            rounds=15,
            attack=None,
            threat={},
            **{
                "evaluation.backdoor": SQUARE,
            },
        )
    )
    assert result.metrics["attack_success_rate"][-1] > 0.9
    assert unscaled.metrics["attack_success_rate"][-1] < 0.3


def test_two_attacks_that_add_copies_are_refused():
    with pytest.raises(ConfigError, match="only one attack of a pipeline can add"):
        config.from_mapping({"attack": ["scaling", "scaling"], "threat": {"num_malicious": 2}})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"backdoor": "alie"}, "scaling.*|backdoor must be an attack on data"),
        ({"backdoor": {"name": "trojan", "target": 99}}, "target must be < 10"),
    ],
)
def test_scaling_checks_its_backdoor(fields, message):
    experiment = {"data": {"name": "digits"}, "threat": {"num_malicious": 2}, "rounds": 1}
    with pytest.raises(ConfigError, match=message):
        fedjax_sec.run(experiment | {"attack": {"name": "scaling", **fields}})


# --- Feature trigger ----------------------------------------------------------------------------


def test_every_twentieth_feature_is_set():
    part = registry.attacks.build("feature_trigger")
    x = jnp.ones((2, 561))
    changed = np.flatnonzero(np.asarray(part.trigger((), x))[0] == 0)
    assert changed.tolist() == list(range(0, 561, 20))


def test_a_first_feature_beyond_the_last_is_refused():
    experiment = {"data": {"name": "digits"}, "threat": {"num_malicious": 2}, "rounds": 1}
    attack = {"name": "feature_trigger", "first": 64}
    with pytest.raises(ConfigError, match="first must be < 64"):
        fedjax_sec.run(experiment | {"attack": attack})
