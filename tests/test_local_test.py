"""Clients' own test data, and the global model's metrics on it."""

import jax.numpy as jnp
import numpy as np
import pytest
from helpers import small

import fedjax_sec
from fedjax_sec.core import ConfigError
from fedjax_sec.data import Source
from fedjax_sec.data.local_test import LocalTest
from fedjax_sec.runs import loading
from fedjax_sec.runs import source as source_lib
from fedjax_sec.runs.config import from_mapping
from fedjax_sec.runs.prepare import make_population
from fedjax_sec.runs.source import load_source


def population(**data):
    experiment = from_mapping(small(data=data))
    source = load_source(experiment)
    return make_population(experiment, source)[0], source


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5])
def test_held_out_examples_are_not_trained_on(share):
    whole, _ = population(max_train=203)
    spec = {"data": "held_out", "share": share}
    some, _ = population(max_train=203, local_test=spec)
    for row in range(5):
        before = set(whole.index[row, : whole.counts[row]].tolist())
        left = some.index[row, : some.counts[row]].tolist()
        mine = [position for position in some.local[row].tolist() if position >= 0]
        assert len(mine) == int(share * whole.counts[row])
        assert set(left) | set(mine) == before and not set(left) & set(mine)
        assert len(set(left)) == len(left) == some.counts[row]
    again, _ = population(max_train=203, local_test=spec)
    np.testing.assert_array_equal(some.local, again.local)


def test_a_dealt_test_part_is_used_up_evenly():
    got, source = population(local_test="dealt")
    mine = [row[row >= 0] for row in got.local]
    assert sorted(np.concatenate(mine).tolist()) == list(range(len(source.y_test)))
    assert {len(row) for row in mine} == {72}
    whole, _ = population()
    np.testing.assert_array_equal(got.index, whole.index)  # the partition is as without


def with_users(monkeypatch, users_test):
    rng = np.random.default_rng(0)
    users = np.repeat(np.arange(4), 10)
    source = Source(
        "toy",
        rng.integers(0, 256, (40, 4, 4, 1), np.uint8),
        (np.arange(40) % 3).astype(np.int32),
        rng.integers(0, 256, (8, 4, 4, 1), np.uint8),
        (np.arange(8) % 3).astype(np.int32),
        num_classes=3,
        scale=255.0,
        mean=(0.5,),
        std=(0.5,),
        official_sizes=(40, 8),
        origin="nowhere",
        users_train=users.astype(np.int32),
        users_test=np.asarray(users_test, np.int32),
    )
    monkeypatch.setattr(source_lib, "_load", lambda *_: source)
    return source


def test_a_users_test_examples_are_its_clients(monkeypatch):
    source = with_users(monkeypatch, [3, 1, 1, 0, 2, 2, 2, 0])
    spec = small(data={"num_clients": 3, "partition": "natural", "local_test": "users"})
    spec["data"].pop("max_train")
    got, _ = make_population(from_mapping(spec), source)
    for index, local in zip(got.index, got.local, strict=True):
        user = source.users_train[index[0]]
        assert local[local >= 0].tolist() == np.flatnonzero(source.users_test == user).tolist()


def test_users_without_test_examples_are_refused(monkeypatch):
    source = with_users(monkeypatch, [4, 5, 6, 7, 4, 5, 6, 7])
    spec = small(data={"num_clients": 3, "partition": "natural", "local_test": "users"})
    spec["data"].pop("max_train")
    with pytest.raises(ConfigError, match="by other users than the clients; use 'held_out'"):
        make_population(from_mapping(spec), source)
    iid = small(data={"num_clients": 3, "local_test": "users"})
    with pytest.raises(ConfigError, match="the partition 'natural'"):
        fedjax_sec.run(iid)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"data": "dealt", "share": 0.2}, "share belongs to data 'held_out'"),
        ({"data": "held_out", "share": 1.0}, "local_test.share must be > 0 and < 1"),
        ("delt", "Did you mean 'dealt'"),
        (3, "must be true, false, null or a mapping"),
    ],
)
def test_wrong_settings_are_refused(spec, message):
    with pytest.raises(ConfigError, match=message):
        from_mapping(small(data={"local_test": spec}))


def test_a_share_that_holds_out_nothing_is_refused():
    index, counts = np.arange(18).reshape(2, 9), np.array([9, 7])
    with pytest.raises(ConfigError, match="share = 0.1 holds out no example, .* raise it to 0.12"):
        LocalTest().hold_out(np.random.default_rng(0), index, counts)
    mine = LocalTest(share=0.12).hold_out(np.random.default_rng(0), index, counts)[2]
    assert (mine >= 0).sum(axis=1).tolist() == [1, 0]
    with pytest.raises(ConfigError, match="3 test examples cannot be dealt to 5 clients; lower"):
        LocalTest("dealt").of_test_part(np.random.default_rng(0), None, None, 3, 5)


@pytest.mark.slow
@pytest.mark.parametrize("data", ["held_out", "dealt"])
def test_metrics_of_each_client(data):
    pgd = {"name": "pgd", "eps": 0.05, "random_start": False, "steps": 5}
    spec = small(
        data={
            "max_train": 403,
            "local_test": {"data": data},
            "partition": {"name": "dirichlet", "alpha": 1.0},
        },
        evaluation={"every": 3, "evasions": [pgd], "evasion_images": 50},
    )
    result = fedjax_sec.run(spec)
    m, experiment = result.metrics, result.experiment
    source = load_source(experiment)
    got = make_population(experiment, source)[0]
    x, y = (
        (source.x_train, source.y_train) if data == "held_out" else (source.x_test, source.y_test)
    )
    logits = loading.logits_of(experiment)
    shares, counts = [], []
    for mine in got.local:
        mine = mine[mine >= 0]
        read = np.argmax(np.asarray(logits(result.params, jnp.asarray(x[mine] / 16.0))), axis=1)
        shares.append(np.mean(read == y[mine]))
        counts.append(len(mine))
    assert data == "dealt" or len(set(counts)) > 2
    np.testing.assert_allclose(m["per_client_accuracy"][-1], shares, atol=1e-6)
    assert m["local_accuracy"][-1] == pytest.approx(np.average(shares, weights=counts), abs=1e-6)
    robust = m["per_client_robust_accuracy/pgd"][-1]
    assert robust.shape == (5,) and np.all(robust <= np.array(shares) + 1e-6)
    assert m["local_robust_accuracy/pgd"][-1] == pytest.approx(
        np.average(robust, weights=counts), abs=1e-6
    )
    if data == "dealt":  # all test images
        assert m["local_accuracy"][-1] == pytest.approx(m["accuracy"][-1], abs=1e-6)
