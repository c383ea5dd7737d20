"""A stage that merges rows, alone and in a run: bounds, diagnostics and errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import CLIENT_OF_TWENTY, small

import fedjax_sec
from fedjax_sec.core import ConfigError, registry, static
from fedjax_sec.core.types import ServerView
from fedjax_sec.round.pipeline import Defense
from fedjax_sec.testing import defenses


class Bucketing:
    """Means of `size` rows at random (Karimireddy et al. 2022, Algorithm 1)."""

    stage = "before"
    size: int = static(2, "Clients in a bucket.", low=1)

    def after(self, setting):
        return setting._replace(num_clients=-(-setting.num_clients // self.size), merged=True)

    def init(self, num_clients, dim):
        return ()

    def apply(self, key, updates, state, view):
        clients = updates.shape[0]
        order = jax.random.permutation(key, clients)
        bucket = jnp.zeros(clients, int).at[order].set(jnp.arange(clients) // self.size)
        members = jax.nn.one_hot(bucket, -(-clients // self.size), dtype=updates.dtype).T
        used = members * view.valid[None, :]
        count = used.sum(axis=1)
        safe = jnp.where(view.valid[:, None], updates, 0.0)
        rows = used @ safe / jnp.maximum(count, 1.0)[:, None]
        view = view._replace(valid=count > 0, weights=used @ view.weights, members=used)
        return rows, view, state, {}


@pytest.fixture
def bucketing():
    yield from registered("bucketing", Bucketing)


def registered(name, cls):
    registry.defenses.names()
    before = dict(registry.defenses._entries)
    registry.defenses._entries.pop(name, None)  # ours of that name steps aside
    yield registry.defenses.register(name)(type(cls.__name__, (cls,), dict(vars(cls))))
    registry.defenses._entries = before


SPEC = {
    "data": {"num_clients": 20},
    "client": CLIENT_OF_TWENTY,
    "threat": {"num_malicious": 4},
    "attack": {"name": "boost", "factor": 100.0},
}


def test_a_run_reports_what_was_kept_of_each_client(bucketing):
    krum = {"name": "krum", "num_byzantine": 3}
    metrics = fedjax_sec.run(small(**SPEC, defense=["bucketing", krum], rounds=2)).metrics
    kept = metrics["kept"][-1]
    assert kept.shape == (20,) and kept.sum() == 2  # the bucket that Krum chose
    assert metrics["kept_malicious"][-1] == 0 and metrics["kept_honest"][-1] == 2 / 16
    assert metrics["detection/true_positive_rate"][-1] == 1


def test_shares_of_merged_rows_are_the_members_shares(bucketing):
    """Of seven clients in buckets of two the last is alone."""
    updates = jnp.arange(7.0)[:, None] * jnp.ones((7, 3))
    defense = Defense.build(["bucketing", {"name": "mean", "weighted": False}])
    view = ServerView(
        jnp.zeros(3), jnp.ones(7), jnp.arange(7), jnp.ones(7, bool).at[3].set(False), jnp.array(0)
    )
    aggregate, _, metrics, *_ = defense.apply(jax.random.key(0), updates, ((), ()), view)
    assert metrics["kept"].shape == (7,)
    order = np.asarray(jax.random.permutation(jax.random.fold_in(jax.random.key(0), 0), 7))
    buckets = [[i for i in order[at : at + 2] if i != 3] for at in (0, 2, 4, 6)]
    means = [np.mean(bucket) for bucket in buckets if len(bucket)]
    np.testing.assert_allclose(aggregate, np.full(3, np.mean(means)), rtol=1e-6)
    np.testing.assert_array_equal(metrics["kept"], np.arange(7) != 3)


def test_the_bound_is_that_of_the_merged_rows(bucketing):
    krum = {"name": "krum", "num_byzantine": 4}
    words = r"krum needs 2 f \+ 2 < K; with K = 7 clients that allows num_byzantine <= 2, got 4"
    defense = [{"name": "bucketing", "size": 3}, krum]
    with pytest.raises(ConfigError, match=words):
        fedjax_sec.run(small(**SPEC, defense=defense))
    with pytest.raises(ConfigError, match=words):
        fedjax_sec.aggregate(np.ones((20, 3)), defense)
    fewer = ["bucketing", krum | {"num_byzantine": 3}]
    assert fedjax_sec.aggregate(np.ones((20, 3)), fewer).tolist() == [1, 1, 1]


def test_rules_with_a_history_of_clients_refuse_merged_rows(bucketing):
    with pytest.raises(ConfigError, match="foolsgold adds up each client's updates, .* merges"):
        fedjax_sec.run(small(**SPEC, defense=["bucketing", "foolsgold"]))


def drops_rows(self, key, updates, state, view):
    return updates[:5], view, state, {}


def test_a_stage_must_say_that_it_changes_rows():
    for cls in registered(
        "halving", type("Halving", (), dict(vars(Bucketing)) | {"apply": drops_rows})
    ):
        assert cls.registered_name == "halving"
        with pytest.raises(ConfigError, match=r"'halving' .* view.valid must be \[5\], got \[20\]"):
            fedjax_sec.aggregate(np.ones((20, 3)), ["halving", "mean"])
    silent = {name: value for name, value in vars(Bucketing).items() if name != "after"}
    for _ in registered("silent", type("Silent", (), silent)):
        with pytest.raises(ConfigError, match=r"'silent' makes 10 rows of 20, .* after\(setting\)"):
            fedjax_sec.aggregate(np.ones((20, 3)), ["silent", "mean"])


def test_a_merging_stage_passes_the_contract(bucketing):
    for check in defenses.CHECKS:
        if check is not defenses.check_bad_rows_are_left_out:  # other rows are other buckets
            check(bucketing(size=2))
