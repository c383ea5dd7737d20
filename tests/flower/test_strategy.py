"""The strategy on messages without a network: it aggregates as `fedjax_sec.aggregate` does."""

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict

import fedjax_sec
from fedjax_sec.core import ConfigError
from fedjax_sec.flower import Defended
from fedjax_sec.flower.strategy import _log

NODES = [11, 12, 13, 14, 15, 16]


@pytest.fixture
def warnings(monkeypatch):
    said = []
    for name in ("warning", "error"):
        monkeypatch.setattr(_log, name, lambda text, *args: said.append(text % args))
    return said


class Grid:
    def get_node_ids(self):
        return NODES


RNG = np.random.default_rng(0)
BEFORE = {
    "b": RNG.normal(size=2).astype(np.float32),
    "a": RNG.normal(size=(2, 3)).astype(np.float32),
    "count": np.array(5, np.int64),
}


def model(update):
    """The global model moved by a vector, in the order of the names: a, b, count."""
    a, b, count = update[:6], update[6:8], update[8]
    return {
        "b": BEFORE["b"] + b.astype(np.float32),
        "a": BEFORE["a"] + a.reshape(2, 3).astype(np.float32),
        "count": BEFORE["count"] + np.int64(count),
    }


def record(arrays):
    return ArrayRecord({name: Array(np.asarray(array)) for name, array in arrays.items()})


def ask(strategy, index=1):
    messages = strategy.configure_train(index, record(BEFORE), ConfigRecord({}), Grid())
    return sorted(messages, key=lambda message: message.metadata.dst_node_id)


def answer(message, arrays, examples=3, **metrics):
    values = MetricRecord({"num-examples": examples} | metrics)
    return Message(RecordDict({"arrays": record(arrays), "metrics": values}), reply_to=message)


def updates(seed=1):
    rows = np.random.default_rng(seed).normal(size=(len(NODES), 9))
    rows[:, 8] = np.arange(len(NODES))
    return rows


def seen(rows):
    """The differences as the server computes them from float32 models."""
    out = []
    for row in rows:
        arrays = model(row)
        parts = [np.ravel(arrays[n].astype(float) - BEFORE[n].astype(float)) for n in "ab"]
        out.append(np.concatenate([*parts, [row[8]]]))
    return np.float32(out)


def step_of(arrays):
    got = {name: array.numpy() for name, array in arrays.items()}
    assert list(got) == list(BEFORE)
    for name, array in got.items():
        assert (array.shape, array.dtype) == (BEFORE[name].shape, BEFORE[name].dtype)
    return np.concatenate([np.ravel(got[n].astype(float) - BEFORE[n].astype(float)) for n in "ab"])


@pytest.mark.parametrize(
    "defense",
    [
        "mean",
        {"name": "krum", "num_byzantine": 1},
        [{"name": "clip_norm", "max_norm": 1.0}, "median"],
        {"name": "geometric_median"},
    ],
)
def test_it_aggregates_as_our_function_does(defense):
    strategy, rows = Defended(defense, rate=0.5, fraction_evaluate=0.0), updates()
    messages, examples = ask(strategy), [1, 2, 3, 4, 5, 6]
    replies = [
        answer(*one, n) for *one, n in zip(messages, map(model, rows), examples, strict=True)
    ]
    arrays, metrics = strategy.aggregate_train(1, replies)
    wanted = fedjax_sec.aggregate(seen(rows), defense, weights=examples, params=None)
    np.testing.assert_allclose(step_of(arrays), 0.5 * wanted[:8], atol=2e-6)
    assert metrics["absent"] == 0 and metrics["excluded"] == 0
    np.testing.assert_allclose(metrics["aggregate-norm"], np.linalg.norm(wanted), rtol=1e-5)


def test_bad_answers_are_left_out_and_named(warnings):
    strategy, rows = Defended("median", fraction_evaluate=0.0), updates()
    first, second, third, fourth, fifth, sixth = ask(strategy)
    wide = model(rows[1]) | {"b": np.zeros(3, np.float32)}
    huge = model(rows[1]) | {"a": np.zeros((2, 300000), np.float32)}
    nan = model(rows[1]) | {"b": np.full(2, np.nan, np.float32)}
    replies = [
        answer(first, model(rows[0]), loss=1.0),
        answer(second, wide),
        answer(third, huge),
        Message(Error(2, "Traceback ...\nValueError: it broke"), reply_to=fourth),
        answer(fifth, nan, loss=2.0),
        answer(sixth, model(rows[5]), examples=float("nan")),
    ]
    arrays, metrics = strategy.aggregate_train(1, replies)
    np.testing.assert_allclose(step_of(arrays), seen(rows)[0, :8], atol=2e-6)
    assert (metrics["absent"], metrics["excluded"]) == (4, 1)
    assert metrics["loss"] == pytest.approx(1.5)
    expected = ["float32 (3,)", "bytes", "ValueError: it broke", "number of examples"]
    assert len(warnings) == 4
    for text, said in zip(expected, warnings, strict=True):
        assert text in said


def test_a_bound_that_fails_keeps_the_model(warnings):
    strategy = Defended({"name": "krum", "num_byzantine": 1}, fraction_evaluate=0.0)
    messages = ask(strategy)
    replies = [answer(messages[0], model(updates()[0]))]
    assert strategy.aggregate_train(1, replies) == (None, None)
    assert "keeps the model" in warnings[0] and "krum" in warnings[0]
    assert strategy.aggregate_train(2, []) == (None, None) and "no answer" in warnings[1]


def test_histories_belong_to_nodes():
    """FoolsGold adds up each node's updates: the order in which answers come does not matter."""
    twins = np.random.default_rng(9).normal(size=9)

    def steps(orders):
        strategy = Defended("foolsgold", num_clients=6, fraction_evaluate=0.0)
        for index, order in enumerate(orders, start=1):
            rows, messages = updates(index), ask(strategy, index)
            rows[1] = rows[4] = twins  # two nodes that always agree lose their weight
            replies = [answer(messages[i], model(rows[i])) for i in order]
            yield step_of(strategy.aggregate_train(index, replies)[0])

    straight = list(steps([range(6)] * 3))
    mixed = list(steps([range(6), [5, 3, 1, 0, 2, 4], [2, 0, 5, 4, 1, 3]]))
    np.testing.assert_allclose(mixed, straight, atol=1e-5)
    alone = list(steps([range(6)]))  # without a history the third round is another
    assert np.abs(alone[0] - straight[2]).max() > 1e-3


@pytest.mark.parametrize(("defense", "left_out"), [("foolsgold", 4), ("median", 0)])
def test_histories_have_room_for_the_nodes_of_the_first_round(
    defense, left_out, monkeypatch, warnings
):
    strategy = Defended(defense, fraction_evaluate=0.0)
    monkeypatch.setitem(globals(), "NODES", [11, 12])
    strategy.aggregate_train(1, [answer(one, model(updates()[0])) for one in ask(strategy)])
    monkeypatch.setitem(globals(), "NODES", [11, 12, 13, 14, 15, 16])
    messages = ask(strategy, 2)
    rows = map(model, updates())
    _, metrics = strategy.aggregate_train(2, list(map(answer, messages, rows)))
    assert metrics["absent"] == left_out == len(warnings)
    assert all("histories of 2 nodes; raise num_clients" in said for said in warnings)


@pytest.mark.parametrize(
    ("defense", "options", "message"),
    [
        ("krumm", {}, "krum"),
        ([{"name": "fl_wbc", "strength": 1.0}, "mean"], {}, "acts in the clients' local training"),
        ("fltrust", {}, "server_update is missing"),
        ("median", {"server_update": lambda arrays: arrays}, "would be ignored"),
        ("median", {"rate": 0.0}, "rate must be > 0"),
    ],
)
def test_what_cannot_be_is_refused(defense, options, message):
    with pytest.raises(ConfigError, match=message):
        Defended(defense, **options)


def test_fltrust_reads_the_servers_update():
    rows = updates()
    learned = rows[0]
    strategy = Defended("fltrust", server_update=lambda arrays: model(learned))
    replies = [answer(*one) for one in zip(ask(strategy), map(model, rows), strict=True)]
    arrays, _ = strategy.aggregate_train(1, replies)
    wanted = fedjax_sec.aggregate(seen(rows), "fltrust", server_update=seen([learned])[0])
    np.testing.assert_allclose(step_of(arrays), wanted[:8], atol=2e-6)
    with pytest.raises(ConfigError, match="names and shapes"):
        bad = Defended("fltrust", server_update=lambda arrays: {"a": np.zeros(2)})
        replies = [answer(*one) for one in zip(ask(bad), map(model, rows), strict=True)]
        bad.aggregate_train(1, replies)


def test_running_statistics_of_pytorch_judge_nobody():
    """They lie between the weights by name, and keep their places."""
    before = {
        "bn.bias": np.zeros(3, np.float32),
        "bn.running_var": np.ones(2, np.float32),
        "fc.weight": np.zeros((1, 2), np.float32),
    }
    rows = np.random.default_rng(4).normal(size=(len(NODES), 7)).astype(np.float32)
    results = []
    for scale in (1.0, 1000.0):
        strategy = Defended({"name": "krum", "num_byzantine": 1}, fraction_evaluate=0.0)
        asked = strategy.configure_train(1, record(before), ConfigRecord({}), Grid())
        asked = sorted(asked, key=lambda message: message.metadata.dst_node_id)
        replies = [
            answer(
                message,
                {
                    "bn.bias": row[:3],
                    "bn.running_var": scale * row[3:5],
                    "fc.weight": row[5:].reshape(1, 2),
                },
            )
            for message, row in zip(asked, rows, strict=True)
        ]
        arrays, _ = strategy.aggregate_train(1, replies)
        results.append({name: array.numpy() for name, array in arrays.items()})
    learned = rows[:, [0, 1, 2, 5, 6]]
    chosen = np.asarray(fedjax_sec.aggregate(learned, {"name": "krum", "num_byzantine": 1}))
    place = int(np.argmin(np.abs(learned - chosen).sum(axis=1)))
    for scale, result in zip((1.0, 1000.0), results, strict=True):
        assert list(result) == list(before)
        np.testing.assert_allclose(result["bn.bias"], rows[place, :3], atol=1e-5)
        np.testing.assert_allclose(result["bn.running_var"], scale * rows[place, 3:5], rtol=1e-5)
        np.testing.assert_allclose(result["fc.weight"][0], rows[place, 5:], atol=1e-5)
