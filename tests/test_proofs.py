"""Components outside the package, one file each: what they do, in a run."""

import importlib.util
import os
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import close, same_bits, small

import fedjax_sec
from fedjax_sec.core import ConfigError, Monitor, registry
from fedjax_sec.core.types import Known, Message
from fedjax_sec.runs import config
from fedjax_sec.runs.prepare import make_replicas, prepare
from fedjax_sec.runs.program import Program

PROOFS = Path(__file__).parent / "proofs"


def load(path):
    """Executes the file, whose classes register themselves."""
    name = f"imported_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where `typing.get_type_hints` looks
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def registries():
    """Each test with the components of its own files, and no others."""
    for one in registry.KINDS.values():
        one.names()
    before = {kind: dict(one._entries) for kind, one in registry.KINDS.items()}
    yield
    for kind, one in registry.KINDS.items():
        one._entries = before[kind]


@pytest.fixture
def proof(request):
    """The file of tests/proofs that the test names by `pytest.mark.parametrize(..., indirect)`."""
    return load(PROOFS / f"{request.param}.py")


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
    """(task, population, pool) of an experiment."""
    prepared = prepare(config.from_mapping(spec))
    program = Program(prepared)
    replicas = jax.tree.map(lambda leaf: leaf[0], make_replicas([prepared]))
    from fedjax_sec.round import make_task

    return make_task(program.problem, program.pool, prepared.task), prepared, program, replicas


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
    task, prepared, program, replica = bound(spec)
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
    task, prepared, program, replica = bound(LINEAR)
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
    task, prepared, program, _ = bound(spec)
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
with_text = pytest.mark.skipif(
    not DATA or not (Path(DATA) / "raw" / "shakespeare").is_dir(),
    reason="FEDJAX_SEC_TEST_DATA names no folder with raw/shakespeare",
)


@with_text
@uses("char_lstm")
def test_a_language_model_learns_more_than_how_often_letters_are(proof):
    result = fedjax_sec.run(TEXT)
    train, test = prepare(result.experiment).source.y_train, prepare(result.experiment).source.y_test
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


# --- How they are made --------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted(PROOFS.glob("*.py")), ids=lambda path: path.stem)
def test_a_proof_is_one_file_on_public_names(path):
    """It imports the package's public places, no component of ours and no other proof."""
    imported = re.findall(r"^(?:from|import) (fedjax_sec\S*)", path.read_text(), re.MULTILINE)
    allowed = {f"fedjax_sec.{part}" for part in ("core", "core.types", "algorithms", "data")}
    assert imported and set(imported) <= allowed, imported
