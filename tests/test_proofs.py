"""Components outside the package, one file each: what they do, in a run."""

import itertools
import json
import lzma
import os
import re
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from helpers import close, same_bits, small
from typer.testing import CliRunner

import fedjax_sec
from fedjax_sec.cli import app
from fedjax_sec.core import ConfigError, InputSpec, Monitor, PrivacyAttack, plugins, registry
from fedjax_sec.core.types import Known, Message
from fedjax_sec.data import MissingDataError, checked
from fedjax_sec.data.sources.shakespeare import CHARACTERS
from fedjax_sec.monitors.reconstruction import compare
from fedjax_sec.round import make_task
from fedjax_sec.runs import config
from fedjax_sec.runs.prepare import make_replicas, prepare
from fedjax_sec.runs.program import Program

PROOFS = Path(__file__).parent / "proofs"


@pytest.fixture(autouse=True)
def registries():
    """Each test with the components of its own files, and no others."""
    for one in registry.KINDS.values():
        one.names()
    before = {kind: dict(one._entries) for kind, one in registry.KINDS.items()}
    files = dict(plugins._files)
    yield
    plugins._files.clear()
    plugins._files.update(files)
    for kind, one in registry.KINDS.items():
        one._entries = before[kind]


@pytest.fixture
def proof(request):
    """Imports the file of tests/proofs that `uses` names, as `--import` does."""
    plugins.import_all([str(PROOFS / f"{request.param}.py")], "--import")


def uses(name):
    return pytest.mark.parametrize("proof", [name], indirect=True, ids=[name])


class Recorder(Monitor):
    """The parameters before the round, what was sent, and the aggregate."""

    def observe(self, key, state, trace, task):
        return state, {
            "before": trace.before,
            "sent": trace.sent.vector,
            "aggregate": trace.aggregates[0],
            "malicious": trace.malicious,
        }


@pytest.fixture
def recorder(registries):
    return registry.monitors.register("recorder")(type("Recorder", (Recorder,), {}))


def of(metrics, name, at=-1):
    return metrics[f"recorder/{name}"][at]


def bound(spec):
    """(task, program, replica) of an experiment."""
    prepared = prepare(config.from_mapping(spec))
    program = Program(prepared)
    replicas = jax.tree.map(lambda leaf: leaf[0], make_replicas([prepared]))
    return make_task(program.problem, program.pool, prepared.task), program, replicas


# --- An algorithm -------------------------------------------------------------------------------

SKEWED = small(
    data={"partition": {"name": "dirichlet", "alpha": 0.3}},
    client={
        "name": "sgd",
        "steps": 4,
        "batch_size": 4,
        "optimizer": {"name": "sgd", "learning_rate": 0.2},
    },
    rounds=4,
)


@uses("scaffold")
def test_an_algorithm_of_ones_own_equals_the_shipped_one(proof):
    params = {
        name: jax.tree.leaves(fedjax_sec.run(SKEWED, algorithm=name).params)
        for name in ("option_two", "scaffold", "fedavg")
    }
    close(params["option_two"], params["scaffold"], rtol=1e-4, atol=1e-5)
    apart = [np.abs(a - b).max() for a, b in zip(params["scaffold"], params["fedavg"], strict=True)]
    assert max(apart) > 1e-2, apart


@uses("scaffold")
def test_it_refuses_a_part_of_the_clients(proof):
    with pytest.raises(ConfigError, match="algorithm: 'option_two' needs every client"):
        fedjax_sec.run(SKEWED, algorithm="option_two", server={"clients_per_round": 3})


# --- An attack on data with memory --------------------------------------------------------------

TRIGGER = {"name": "learned_trigger", "target": 3}
BACKDOORED = small(
    data={"num_clients": 5, "max_train": 400},
    client={
        "name": "sgd",
        "steps": 4,
        "batch_size": 20,
        "optimizer": {"name": "sgd", "learning_rate": 0.2},
    },
    threat={"num_malicious": 1},
    attack=TRIGGER,
    rounds=6,
    evaluation={"every": 2},
)


@uses("learned_trigger")
def test_a_learned_trigger_beats_the_one_that_it_began_with(proof):
    learned = fedjax_sec.run(BACKDOORED)
    initial = fedjax_sec.run(BACKDOORED, evaluation={"every": 2, "backdoor": TRIGGER})
    same_bits(learned.params, initial.params)  # only what is measured differs
    success, before = (one.metrics["attack_success_rate"] for one in (learned, initial))
    assert success[0] == before[0] and success[-1] > before[-1] + 0.2, (success, before)


@uses("learned_trigger")
def test_its_memory_resumes_to_the_same_bits(proof, tmp_path):
    once = fedjax_sec.run(BACKDOORED, rounds=4)
    often = BACKDOORED | {"checkpoint": {"every": 1}}
    fedjax_sec.run(often, rounds=2, out=tmp_path / "run")
    resumed = fedjax_sec.run(often, rounds=4, out=tmp_path / "run", resume=True)
    same_bits(resumed.params, once.params)
    same_bits(resumed.metrics["attack_success_rate"], once.metrics["attack_success_rate"])


# --- Stages of a defence ------------------------------------------------------------------------

MANY = small(
    data={"num_clients": 20},
    client={"name": "sgd", "steps": 1, "batch_size": 2},
    threat={"num_malicious": 4},
    attack={"name": "boost", "factor": 100.0},
)


@uses("bucketing")
def test_a_stage_that_merges_rows(proof):
    """Krum is asked for as many rows as are left: 10 buckets tolerate 3, not 4."""
    words = r"krum needs 2 f \+ 2 < K; with K = 10 clients that allows num_byzantine <= 3, got 4"
    krum = {"name": "krum", "num_byzantine": 4}
    with pytest.raises(ConfigError, match=words):
        fedjax_sec.run(MANY, defense=["buckets", krum])
    with pytest.raises(ConfigError, match=words):
        fedjax_sec.aggregate(np.ones((20, 3)), ["buckets", krum])
    result = fedjax_sec.run(MANY, defense=["buckets", krum | {"num_byzantine": 3}])
    kept = result.metrics["kept"][-1]
    assert kept.sum() == 2 and result.metrics["kept_malicious"][-1] == 0


@uses("bucketing")
def test_a_bucket_is_the_mean_of_its_valid_rows(proof):
    updates = np.arange(8.0)[:, None] * np.ones((8, 2))
    updates[3] = np.nan
    with pytest.warns(UserWarning, match="1 of 8 rows"):
        got = fedjax_sec.aggregate(updates, ["buckets", {"name": "mean", "weighted": False}])
    order = np.asarray(jax.random.permutation(jax.random.fold_in(jax.random.key(0), 0), 8)) // 2
    rows = [[i for i in range(8) if order[i] == b and i != 3] for b in range(4)]
    close(got, np.full(2, np.mean([np.mean(row) for row in rows if row])), rtol=1e-5)


ROOTED = small(
    data={"num_clients": 5, "max_train": 65},
    server={"root": {"size": 20}},
    threat={"num_malicious": 1},
    rounds=2,
)


@uses("zeno")
def test_a_rule_that_reads_the_servers_loss(proof, recorder):
    """In a run and on a stack: the same aggregate for the same inputs."""
    rule = {"name": "zeno_proof", "removed": 2}
    spec = ROOTED | {"attack": "sign_flip", "defense": rule}
    spec["evaluation"] = {"every": 1, "monitors": ["recorder"]}
    metrics = fedjax_sec.run(spec).metrics
    task, program, replica = bound(spec)
    root = replica.population.root
    x, y = task.inputs.decode(program.pool.x[root]), program.pool.y[root]

    def loss(params):
        return task.loss(params, x, y, jnp.ones(y.shape, bool))

    sent, before = (jnp.asarray(of(metrics, name), jnp.float32) for name in ("sent", "before"))
    got = fedjax_sec.aggregate(sent, rule, server_loss=loss, params=before)
    close(got, of(metrics, "aggregate").astype(np.float32), rtol=1e-5, atol=1e-7)
    scores = np.array([loss(before) - loss(before + u) - 5e-4 * np.sum(u**2) for u in sent])
    chosen = np.argsort(-scores)[:3]
    close(got, np.mean(np.asarray(sent)[chosen], axis=0), rtol=1e-4, atol=1e-6)
    assert np.flatnonzero(of(metrics, "malicious"))[0] not in chosen
    same_bits(np.sort(chosen), np.flatnonzero(metrics["kept"][-1]))


# --- A monitor ----------------------------------------------------------------------------------


@uses("cosines")
def test_a_monitor_records_every_clients_cosine(proof, recorder):
    spec = small(threat={"num_malicious": 2}, attack="sign_flip")
    spec["evaluation"] = {"every": 1, "monitors": ["recorder", "cosines"]}
    metrics = fedjax_sec.run(spec).metrics
    sent, bad = of(metrics, "sent"), of(metrics, "malicious").astype(bool)
    mean = sent[~bad].mean(axis=0)
    expected = sent @ mean / np.linalg.norm(sent, axis=1) / np.linalg.norm(mean)
    close(metrics["cosines/client"][-1], expected, rtol=1e-4, atol=1e-5)
    assert (expected[~bad] > 0).all() and (expected[bad] < 0).all()


# --- A privacy attack ---------------------------------------------------------------------------

LINEAR = small(
    model="logistic_regression",
    client={
        "name": "sgd",
        "steps": 1,
        "batch_size": 1,
        "optimizer": {"name": "sgd", "learning_rate": 0.5},
    },
    data={"num_clients": 5, "max_train": 5},
    rounds=1,
)


@uses("inversion")
def test_a_linear_models_gradient_is_its_example(proof):
    """One example and one step: what the server receives holds the example."""
    task, program, replica = bound(LINEAR)
    params = program.init(jax.tree.map(lambda leaf: leaf[None], replica)).server.params[0]
    index = replica.population.index[:, 0]
    x, y = task.inputs.decode(program.pool.x[index]), program.pool.y[index]
    attack = registry.privacy_attacks.build("residuals")
    for client in range(5):
        one = slice(client, client + 1)
        gradient = jax.grad(task.loss)(params, x[one], y[one], jnp.ones(1, bool))
        message = Message(-0.5 * gradient, jnp.float32(1))
        known = Known(0.5, 1, 1, 10)
        got, label = attack.reconstruct(jax.random.key(0), message, params, task, known)
        close(got, x[one], rtol=1e-3, atol=1e-4)
        same_bits(label, y[one])


# --- LoRA ---------------------------------------------------------------------------------------


@uses("lora")
def test_a_wrapper_of_networks_trains_its_pairs_only(proof):
    spec = small(model={"name": "adapted", "base": {"name": "mlp", "hidden": [6]}}, rounds=3)
    result = fedjax_sec.run(spec)
    prepared = prepare(result.experiment)
    assert prepared.space.dim == 2 * (64 + 6) + 2 * (6 + 10)
    assert all(name.startswith("lora/") for name in prepared.space.slices)
    start = prepared.network.model.init(jax.random.key(0))
    same_bits(result.params["params"], start["params"])
    assert np.abs(result.params["lora"]["output"]["b"]).max() > 1e-3
    assert result.metrics["loss"][-1] < result.metrics["loss"][0]


# --- Text ---------------------------------------------------------------------------------------

DATA = os.environ.get("FEDJAX_SEC_TEST_DATA")
TEXT = small(
    data={"name": "roles", "num_clients": 4, "data_dir": DATA, "max_train": 400, "max_test": 200},
    model={"name": "next_character", "width": 16},
    client={
        "name": "sgd",
        "steps": 10,
        "batch_size": 20,
        "optimizer": {"name": "adam", "learning_rate": 0.02},
    },
    rounds=8,
    evaluation={"every": 4},
)


def _has_text():
    return bool(DATA) and (Path(DATA) / "raw" / "shakespeare").is_dir()


with_text = pytest.mark.skipif(
    not _has_text(),
    reason="FEDJAX_SEC_TEST_DATA names no folder with raw/shakespeare",
)


@with_text
@uses("char_lstm")
def test_a_language_model_learns_more_than_how_often_letters_are(proof):
    result = fedjax_sec.run(TEXT)
    train, test = (
        prepare(result.experiment).source.y_train,
        prepare(result.experiment).source.y_test,
    )
    counts = np.bincount(train.ravel(), minlength=96) + 1
    unigram = -np.mean(np.log(counts / counts.sum())[test])
    losses = result.metrics["loss"]
    assert losses[0] > 4 and losses[-1] < unigram - 0.1, (losses, unigram)
    assert result.metrics["next_token_accuracy"][-1] > 0.2


@with_text
@uses("char_lstm")
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"data": TEXT["data"] | {"partition": "dirichlet"}},
            "data.partition: 'dirichlet' needs one class for each example",
        ),
        (
            {"attack": "label_flip", "threat": {"num_malicious": 1}},
            "attack: 'label_flip' needs one class for each example",
        ),
        (
            {"attack": "pattern", "threat": {"num_malicious": 1}},
            "attack: 'pattern' works on pixels.* and the data set's inputs are tokens",
        ),
    ],
)
def test_what_needs_classes_is_refused_on_text(proof, changes, words):
    with pytest.raises(ConfigError, match=words):
        fedjax_sec.run(TEXT | changes)


# --- Objects of Python's own --------------------------------------------------------------------


def middle(updates):
    return jnp.median(updates, axis=0)


def test_a_plain_function_is_a_defense(tmp_path):
    spec = small(threat={"num_malicious": 1}, attack="sign_flip", checkpoint={"every": 1})
    ours = fedjax_sec.run(spec, defense=middle, out=tmp_path / "run")
    close(ours.params, fedjax_sec.run(spec, defense="median").params)
    assert ours.metrics["kept"][-1].tolist() == [1, 1, 1, 1, 1]
    assert ours.experiment.to_dict()["defense"] == {
        "name": "function",
        "function": f"{__name__}.middle",
    }
    piped = fedjax_sec.run(spec, defense=[{"name": "clip_norm", "max_norm": 0.1}, middle])
    named = fedjax_sec.run(spec, defense=[{"name": "clip_norm", "max_norm": 0.1}, "median"])
    close(piped.params, named.params)
    words = f"defense: the function '{__name__}.middle' is Python's and in no file; give it again"
    with pytest.raises(ConfigError, match=words):
        fedjax_sec.run(tmp_path / "run" / "config.yaml")
    more = fedjax_sec.run(spec | {"rounds": 4}, defense=middle, out=tmp_path / "run", resume=True)
    same_bits(more.params, fedjax_sec.run(spec | {"rounds": 4}, defense=middle).params)


def test_rows_that_are_not_finite_never_reach_a_function():
    updates = np.array([[1.0], [np.nan], [2.0], [9.0]])
    with pytest.warns(UserWarning, match="1 of 4 rows"):
        close(fedjax_sec.aggregate(updates, lambda u: u.mean(axis=0)), np.full(1, 4.0))
    with pytest.warns(UserWarning, match="1 of 4 rows"):
        got = fedjax_sec.aggregate(
            updates, lambda u, valid: jnp.where(valid[:, None], u, 0.0).sum(axis=0)
        )
    close(got, np.full(1, 12.0))


def test_another_function_of_the_same_name_is_another_rule():
    """Compiled programs are kept by the rule; all lambdas of a place have one name."""
    updates = np.array([[1.0], [2.0], [9.0]])
    rules = [lambda u, scale=scale: scale * u.sum(axis=0) for scale in (1.0, 2.0)]
    assert [float(fedjax_sec.aggregate(updates, rule)[0]) for rule in rules] == [12.0, 24.0]


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        (np.median, r"defense: numpy.median fails on updates \[K, D\] .* made of jax.numpy"),
        (lambda u: u, r"must return one vector \[D\]"),
        (lambda: 0, "fails on updates"),
    ],
)
def test_a_function_that_is_no_rule_is_refused(rule, words):
    with pytest.raises(ConfigError, match=words):
        fedjax_sec.aggregate(np.ones((5, 3)), rule)
    with pytest.raises(ConfigError, match=words):
        fedjax_sec.run(small(), defense=rule)


class Net(nn.Module):
    """A network of a user's own, registered nowhere."""

    hidden: int = 6
    drop: float = 0.0

    @nn.compact
    def __call__(self, x, train):
        h = nn.relu(nn.Dense(self.hidden)(x.reshape(x.shape[0], -1)))
        return nn.Dense(10)(nn.Dropout(self.drop, deterministic=not train)(h))


def test_a_flax_module_is_a_model(tmp_path):
    spec = small(checkpoint={"every": 1})
    result = fedjax_sec.run(spec, model=Net(), rounds=2, out=tmp_path / "run")
    assert result.metrics["loss"][-1] < result.metrics["loss"][0]
    assert sorted(result.params["params"]) == ["Dense_0", "Dense_1"]
    text = f"{__name__}.Net(hidden=6, drop=0.0)"
    assert result.experiment.to_dict()["model"] == {"name": "module", "module": text}
    again = {"out": tmp_path / "run", "resume": True}
    with pytest.raises(ConfigError, match=re.escape(f"the module {text} is Python's and in no")):
        fedjax_sec.run(tmp_path / "run" / "config.yaml", rounds=3, **again)
    with pytest.raises(ConfigError, match="model.module"):
        fedjax_sec.run(spec, model=Net(7), rounds=3, **again)
    more = fedjax_sec.run(spec, model=Net(), rounds=3, **again)
    same_bits(more.params, fedjax_sec.run(spec, model=Net(), rounds=3).params)
    dropped = fedjax_sec.run(spec, model=Net(drop=0.5), rounds=3)
    assert not np.array_equal(
        dropped.params["params"]["Dense_1"]["kernel"], more.params["params"]["Dense_1"]["kernel"]
    )


def test_another_module_is_another_model():
    """A program or a draw for one must never serve the other; lists have no hash."""
    one, other = (nn.Sequential([nn.Dense(width)]) for width in (3, 4))
    first, second, again = (
        registry.models.build({"name": "module", "module": net}) for net in (one, other, one)
    )
    assert first == again and hash(first) == hash(again) and first != second
    assert jax.tree.structure(first) != jax.tree.structure(second)


@pytest.mark.parametrize(
    ("module", "words"),
    [
        (nn.Sequential([lambda x: x.reshape(x.shape[0], -1), nn.Dense(9)]), "gives outputs .* 9"),
        (nn.BatchNorm(), "model: BatchNorm fails on the data's inputs"),
        (nn.Sequential([lambda x: x[:, :, :9] @ jnp.ones((3, 3))]), "fails on the data's inputs"),
    ],
)
def test_a_module_that_does_not_fit_is_refused(module, words):
    with pytest.raises(ConfigError, match=words):
        fedjax_sec.run(small(), model=module)


# --- What is shipped ----------------------------------------------------------------------------


def test_the_shipped_bucketing_equals_the_papers_in_numpy():
    """Algorithm 1 in float64: nine rows, one of NaN, buckets of two; and who is in the chosen."""
    updates = np.random.default_rng(0).normal(size=(9, 4)).astype(np.float32)
    updates[4] = np.nan
    weights = np.arange(1.0, 10.0)
    rule = [{"name": "bucketing", "size": 2}, "mean"]
    with pytest.warns(UserWarning, match="1 of 9 rows"):
        got = fedjax_sec.aggregate(updates, rule, weights=weights, key=5)
    order = np.asarray(jax.random.permutation(jax.random.fold_in(jax.random.key(5), 0), 9))
    buckets = [[i for i in order[at : at + 2] if i != 4] for at in range(0, 9, 2)]
    rows = [(np.mean(updates[b].astype(float), axis=0), weights[b].sum()) for b in buckets if b]
    means, shares = zip(*rows, strict=True)
    close(got, np.average(means, axis=0, weights=shares).astype(np.float32))


def test_the_shipped_bucketing_is_refused_where_nothing_is_left():
    with pytest.raises(ConfigError, match="defense.*size must be <= 5, the clients of a round"):
        fedjax_sec.run(small(), defense=[{"name": "bucketing", "size": 6}, "median"])
    with pytest.raises(ConfigError, match="K = 3 clients"):
        fedjax_sec.run(small(), defense=["bucketing", {"name": "krum", "num_byzantine": 1}])


def test_the_shipped_zeno_equals_its_definition_in_numpy():
    drawn = np.random.default_rng(4)
    updates, params = drawn.normal(size=(7, 3)), 3 * drawn.normal(size=3)
    updates[2] *= 4

    def loss(w):
        return ((w - 1.0) ** 2).sum()

    rule = {"name": "zeno", "num_removed": 2, "rho": 1.0}
    got = fedjax_sec.aggregate(updates, rule, server_loss=loss, params=params)
    scores = [loss(params) - loss(params + u) - u @ u for u in updates]
    chosen = np.argsort(scores)[2:]
    close(got, updates[chosen].mean(axis=0).astype(np.float32))
    plain = {"name": "zeno", "num_removed": 2, "rho": 0.0}
    other = fedjax_sec.aggregate(updates, plain, server_loss=loss, params=params)
    assert not np.allclose(other, got)  # the length counts
    updates[5] = np.inf
    with pytest.warns(UserWarning, match="1 of 7 rows"):
        got = fedjax_sec.aggregate(updates, rule, server_loss=loss, params=params)
    rest = np.delete(np.arange(7), 5)
    chosen = rest[np.argsort([scores[i] for i in rest])[2:]]
    close(got, updates[chosen].mean(axis=0).astype(np.float32))


def test_the_shipped_zeno_takes_f_from_the_threat_and_needs_a_loss():
    built = config.from_mapping(ROOTED | {"defense": "zeno", "attack": "sign_flip"})
    assert built.defense.stages[0].num_removed == 1
    with pytest.raises(ConfigError, match="zeno needs b < K; with K = 5 .*<= 4, got 5"):
        fedjax_sec.run(ROOTED, defense={"name": "zeno", "num_removed": 5})
    with pytest.raises(ConfigError, match="'zeno' needs examples that the server holds itself"):
        fedjax_sec.run(small(), defense={"name": "zeno", "num_removed": 1})
    with pytest.raises(ConfigError, match="server_loss is missing: 'zeno' evaluates parameters"):
        fedjax_sec.aggregate(np.ones((5, 3)), "zeno", num_removed=1, server_update=np.ones(3))


def test_the_shipped_cosine_leaves_out_who_sent_nothing(recorder):
    """Honest clients only make the mean; absent ones have no cosine and are in no mean."""
    spec = small(threat={"num_malicious": 2}, attack="sign_flip", rounds=4)
    spec["server"] = {"dropout": 0.4}
    spec["evaluation"] = {"every": 1, "monitors": ["recorder", "cosine"]}
    metrics = fedjax_sec.run(spec).metrics
    someone = False
    for i in range(1, 5):
        sent, bad = of(metrics, "sent", i).astype(float), of(metrics, "malicious", i) > 0
        there = np.abs(sent).max(axis=1) > 0
        someone |= not there.all()
        mean = sent[there & ~bad].mean(axis=0)
        expected = np.zeros(5)
        lengths = np.linalg.norm(sent[there], axis=1) * np.linalg.norm(mean)
        expected[there] = sent[there] @ mean / lengths
        close(metrics["cosine/client"][i], expected, rtol=1e-4, atol=1e-5)
        close(metrics["cosine/honest"][i], expected[there & ~bad].mean(), rtol=1e-4, atol=1e-5)
    assert someone


def test_the_shipped_monitor_of_reconstruction_meets_each_clients_example():
    """One example and one step: exact for every victim, whoever it is."""
    for victim in (0, 3):
        spec = LINEAR | {"evaluation": {"monitors": {"name": "reconstruction", "victim": victim}}}
        metrics = fedjax_sec.run(spec).metrics
        assert metrics["reconstruction/relative_error"][-1] < 1e-3
        assert metrics["reconstruction/label_rate"][-1] == 1


def test_a_batch_spoils_the_reconstruction():
    """A monitor that always says yes would be worthless."""
    client = LINEAR["client"] | {"batch_size": 10}
    spec = LINEAR | {"data": {"num_clients": 5, "max_train": 50}, "client": client}
    spec |= {"evaluation": {"monitors": "reconstruction"}}
    metrics = fedjax_sec.run(spec).metrics
    assert metrics["reconstruction/relative_error"][-1] > 0.05


@uses("inversion")
def test_an_attack_of_ones_own_runs_in_the_shipped_monitor(proof):
    monitor = {"name": "reconstruction", "attack": "residuals", "victim": 2}
    metrics = fedjax_sec.run(LINEAR | {"evaluation": {"monitors": monitor}}).metrics
    assert metrics["reconstruction/relative_error"][-1] < 1e-3


def test_the_monitor_hands_over_the_protocols_numbers():
    seen = []

    class Spy(PrivacyAttack):
        def reconstruct(self, key, message, params, task, known):
            seen.append(known)
            shape = (known.batch, *task.inputs.shape)
            return jnp.zeros(shape), jnp.zeros(known.batch, int)

    registry.privacy_attacks.register("spy")(Spy)
    spec = LINEAR | {"evaluation": {"monitors": {"name": "reconstruction", "attack": "spy"}}}
    metrics = fedjax_sec.run(spec).metrics
    assert metrics["reconstruction/relative_error"][-1] == 1  # a guess of zeros
    known = seen[-1]
    assert (known.steps, known.batch, known.classes) == (1, 1, 10) and known.rate is not None
    adam = spec["client"] | {"optimizer": {"name": "adam", "learning_rate": 0.1}}
    fedjax_sec.run(spec | {"client": adam})
    assert seen[-1].rate is None


def test_guesses_are_matched_to_the_examples():
    """Against all permutations, in NumPy: three guesses, four examples of which one is padding."""
    drawn = np.random.default_rng(2)
    truth = drawn.normal(size=(4, 5)).astype(np.float32)
    guess = truth[[2, 0, 1]] + 0.1 * drawn.normal(size=(3, 5)).astype(np.float32)
    labels, there = np.arange(4), np.array([True, True, True, False])
    inputs = InputSpec("features", (5,))
    metrics = compare(guess, np.array([2, 0, 5]), truth, labels, there, inputs)
    error, right = metrics["relative_error"], metrics["label_rate"]
    lengths = np.linalg.norm(truth, axis=1)
    costs = [
        np.mean([np.linalg.norm(guess[b] - truth[j]) / lengths[j] for b, j in enumerate(match)])
        for match in itertools.permutations(range(3))
    ]
    close(error, np.float32(min(costs)), rtol=1e-4)
    close(right, np.float32(2 / 3))
    few = np.array([True, False, False, False])
    error = compare(guess, np.array([2, 0, 5]), truth, labels, few, inputs)["relative_error"]
    close(error, np.float32((np.linalg.norm(guess[1] - truth[0]) / lengths[0] + 2) / 3), rtol=1e-4)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": "mlp"}, "'linear_inversion' needs a model of one linear layer"),
        ({"victim": 9}, "victim must be < 5, the clients of a round"),
    ],
)
def test_what_cannot_be_reconstructed_is_refused(changes, words):
    monitor = {"name": "reconstruction", "victim": changes.get("victim", 0)}
    model = changes.get("model", "logistic_regression")
    with pytest.raises(ConfigError, match=words):
        fedjax_sec.run(LINEAR | {"model": model, "evaluation": {"monitors": monitor}})


PLAY = {
    "HAMLET": ["To be, or not to be", "that is"],
    "GHOST": ["Mark me.\n~"],
}


def a_play(folder, packed=False):
    (folder / "shakespeare").mkdir(parents=True)
    for part, texts in (("train", PLAY), ("test", {"GHOST": ["I am"]})):
        content = json.dumps({"user_data": {role: {"x": x} for role, x in texts.items()}})
        path = folder / "shakespeare" / f"roles_{part}.json{'.xz' * packed}"
        path.write_bytes(lzma.compress(content.encode()) if packed else content.encode())
    return registry.datasets.build({"name": "shakespeare", "length": 8})


@pytest.mark.parametrize("packed", [False, True])
def test_the_shipped_shakespeare_cuts_texts_into_sequences(tmp_path, packed):
    source = checked(a_play(tmp_path, packed).load(str(tmp_path)), "shakespeare")
    assert source.num_classes == 90 and source.task == "language_model"
    assert source.users_train.tolist() == [0, 0, 1, 1, 1, 1] and source.users_test.tolist() == [0]
    letters = dict(enumerate(CHARACTERS, 1))

    def read(tokens):
        names = {0: "", 87: "?", 88: "<", 89: ">", -1: ""} | letters
        return "".join(names[int(token)] for token in tokens)

    rows = list(zip(map(read, source.x_train), map(read, source.y_train), strict=True))
    assert rows[:2] == [("<Mark me", "Mark me."), (".\n?>", "\n?>")]  # an unknown one as ?
    assert [x for x, _ in rows[2:]] == ["<To be, ", "or not t", "o be>", "<that is"]
    assert rows[-1][1] == "that is>" and (source.y_train[1] == -1).sum() == 5


def test_the_shipped_shakespeare_says_how_to_get_it(tmp_path):
    built = registry.datasets.build("shakespeare")
    with pytest.raises(MissingDataError, match="shakespeare.tar.bz2 there .*downloading|switched"):
        built.load(str(tmp_path), download=False)
    a_play(tmp_path)
    (tmp_path / "shakespeare" / "roles_train.json").write_text("{")
    with pytest.raises(MissingDataError, match="cannot be read"):
        built.load(str(tmp_path), download=False)


@with_text
def test_the_shipped_shakespeare_has_the_published_size():
    source = registry.datasets.build("shakespeare").load(str(Path(DATA) / "raw"), False)
    assert len(np.unique(source.users_train)) == 715
    assert (source.x_train == 87).mean() < 1e-4  # nearly all characters have a number
    some = registry.datasets.build({"name": "shakespeare", "max_users": 2})
    assert checked(some.load(str(Path(DATA) / "raw"), False), "shakespeare").is_subset


def test_the_shipped_network_learns_text(tmp_path):
    """One text by heart, by two roles; federated, through every layer."""
    texts = {"users": 0, "user_data": {role: {"x": ["abcdefgh" * 12] * 4} for role in "AB"}}
    (tmp_path / "shakespeare").mkdir()
    for part in ("train", "test"):
        (tmp_path / "shakespeare" / f"roles_{part}.json").write_text(json.dumps(texts))
    client = {"steps": 10, "batch_size": 8, "optimizer": {"name": "adam", "learning_rate": 0.02}}
    data = {"name": "shakespeare", "length": 16, "num_clients": 2, "data_dir": str(tmp_path)}
    spec = {
        "data": data | {"partition": "natural"},
        "model": {"name": "char_lstm", "hidden": [12, 12]},
        "client": client,
        "evaluation": {"every": 5},
        "rounds": 10,
    }
    metrics = fedjax_sec.run(spec).metrics
    assert metrics["loss"][0] > 4 and metrics["loss"][-1] < 1.0, metrics["loss"]


# --- How they are made --------------------------------------------------------------------------

#: file -> an experiment that uses what it registers.
EXPERIMENTS = {
    "bucketing": small(defense=["buckets", {"name": "mean", "weighted": False}]),
    "char_lstm": TEXT,
    "cosines": small(evaluation={"monitors": ["cosines"]}),
    "inversion": LINEAR
    | {"evaluation": {"monitors": {"name": "reconstruction", "attack": "residuals"}}},
    "learned_trigger": BACKDOORED,
    "lora": small(model={"name": "adapted", "base": {"name": "mlp", "hidden": [6]}}),
    "scaffold": small(algorithm="option_two"),
    "zeno": ROOTED | {"defense": {"name": "zeno_proof", "removed": 2}},
}


@pytest.mark.parametrize("path", sorted(PROOFS.glob("*.py")), ids=lambda path: path.stem)
def test_a_proof_runs_by_import_on_the_command_line(path, tmp_path):
    if path.stem == "char_lstm" and not _has_text():
        pytest.skip("FEDJAX_SEC_TEST_DATA names no folder with raw/shakespeare")
    config_file = tmp_path / "experiment.yaml"
    config_file.write_text(yaml.safe_dump(EXPERIMENTS[path.stem]))
    command = ["run", str(config_file), "rounds=1", "--out", str(tmp_path / "out")]
    unknown = CliRunner().invoke(app, command)
    assert unknown.exit_code == 2 and "nknown" in unknown.output, unknown.output
    done = CliRunner().invoke(app, [*command, "--import", str(path)])
    assert done.exit_code == 0, done.output
    written = yaml.safe_load((tmp_path / "out" / "config.yaml").read_text())
    assert written["imports"] == [str(path)]


@pytest.mark.parametrize("path", sorted(PROOFS.glob("*.py")), ids=lambda path: path.stem)
def test_a_proof_is_one_file_on_public_names(path):
    """It imports the package's public places, no component of ours and no other proof."""
    imported = re.findall(r"^(?:from|import) (fedjax_sec\S*)", path.read_text(), re.MULTILINE)
    allowed = {f"fedjax_sec.{part}" for part in ("core", "core.types", "algorithms", "data")}
    assert imported and set(imported) <= allowed, imported
