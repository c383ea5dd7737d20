"""What observers see of a run's rounds, and `fedjax-sec reconstruct`."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import close, same_bits

import fedjax_sec
from fedjax_sec.core import ConfigError, Guess, Message, PrivacyAttack, registry, static
from fedjax_sec.core.types import RoundTrace
from fedjax_sec.ops import observers
from fedjax_sec.papers import reconstruction as experiments
from fedjax_sec.report import paper as engine
from fedjax_sec.report import reconstruction as report
from fedjax_sec.runs import config
from fedjax_sec.runs.reconstruct import watch

#: Five clients with one batch of two examples in each round.
TINY = {
    "data": {"num_clients": 5, "max_train": 40},
    "model": "logistic_regression",
    "client": {
        "name": "sgd",
        "steps": 1,
        "batch_size": 2,
        "optimizer": {"name": "sgd", "learning_rate": 0.2},
    },
    "evaluation": {"every": 1},
    "rounds": 3,
}


def register_spy():
    """Registers `spy`, which keeps what it is given in `seen`, and guesses zeros."""

    @registry.privacy_attacks.register("spy")
    class Spy(PrivacyAttack):
        inputs = frozenset({"pixels", "features", "tokens"})
        seen = ()

        def reconstruct(self, key, message, params, task, known):
            Spy.seen = (message, params, task, known)
            shape = (known.count, *task.inputs.shape)
            return Guess(jnp.zeros(shape), jnp.zeros(known.count, jnp.int32))


def register_thief():
    """Registers `thief`, which looks for an example where none is."""

    @registry.privacy_attacks.register("thief")
    class Thief(PrivacyAttack):
        inputs = frozenset({"pixels", "features", "tokens"})

        def reconstruct(self, key, message, params, task, known):
            return task.example(0)[0][None], jnp.zeros(1, jnp.int32)


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    """What a test registers is gone behind it."""
    kind = registry.privacy_attacks
    kind.names()  # all that the package has is loaded
    monkeypatch.setattr(kind, "_entries", dict(kind._entries))


@pytest.fixture
def spy():
    register_spy()
    return registry.privacy_attacks.build("spy")


# --- Observers ------------------------------------------------------------------------------------


def trace(vectors, weights, aggregate, present=None):
    vectors, weights = jnp.asarray(vectors), jnp.asarray(weights)
    clients = weights.shape[0]
    fields = dict.fromkeys(RoundTrace._fields)
    there = jnp.ones(clients, bool) if present is None else jnp.asarray(present)
    fields |= {
        "sent": Message(vectors, weights),
        "present": there,
        "aggregates": (jnp.asarray(aggregate),),
    }
    return RoundTrace(**fields)


ROWS, WEIGHTS = [[1.0, 0.0], [3.0, 2.0], [5.0, 1.0]], [1.0, 1.0, 2.0]
MEAN = [3.5, 1.0]  # (1 + 3 + 2 * 5) / 4, (0 + 2 + 2) / 4


@pytest.mark.parametrize("who", ["server", "uplink"])
def test_a_server_and_the_uplink_see_one_clients_message(who):
    view = observers.view(trace(ROWS, WEIGHTS, MEAN), who, False, 2)
    assert view.message.vector.tolist() == [5, 1] and view.message.weight == 2
    assert view.members.tolist() == [False, False, True]


def test_secure_aggregation_leaves_the_weighted_mean_of_those_who_sent():
    view = observers.view(trace(ROWS, WEIGHTS, [0.0, 0.0]), "server", True, 0)
    assert view.message.vector.tolist() == MEAN and view.members.all()
    absent = trace(ROWS, WEIGHTS, [0.0, 0.0], [True, True, False])
    view = observers.view(absent, "server", True, 0)
    assert view.message.vector.tolist() == [2, 1]
    assert view.members.tolist() == [True, True, False]


def test_a_client_takes_its_own_part_out_of_the_models_step():
    view = observers.view(trace(ROWS, WEIGHTS, MEAN), "client", False, 0, viewer=2)
    assert view.message.vector.tolist() == [2, 1]  # the mean of the other two
    assert view.members.tolist() == [True, True, False]


def test_the_downlink_shows_the_models_step_alone():
    view = observers.view(trace(ROWS, WEIGHTS, [7.0, 8.0]), "downlink", False, 0)
    assert view.message.vector.tolist() == [7, 8] and view.members.all()


def test_a_masked_uplink_shows_nothing():
    with pytest.raises(ConfigError, match="'uplink' sees masked messages"):
        observers.of_one("uplink", True)


def test_an_attack_sees_no_example(spy):
    """What it gets are the message, the model, a task without examples, and the numbers."""
    register_thief()
    with pytest.raises(ConfigError, match="and no examples"):
        monitored({"attack": "thief"})
    with pytest.raises(ConfigError, match="and no examples"):
        report.reconstruct(TINY, "thief")
    report.reconstruct(TINY, spy)
    message, params, _, known = type(spy).seen
    assert message._fields == ("vector", "weight", "extra") and message.extra == ()
    assert params.shape == message.vector.shape and known.labels is None


def test_a_guess_does_not_depend_on_the_truth():
    """Two runs that send the same message: the guess is the same, the scores are not."""
    task, sights = watch(config.from_mapping(TINY), registry.privacy_attacks.build("analytic"))
    from fedjax_sec.runs.reconstruct import attack_sights

    attack = registry.privacy_attacks.build("analytic")
    other = sights[0]._replace(x=1 - sights[0].x, y=(sights[0].y + 1) % 10)
    one, two = (attack_sights(attack, task, [sight])[0][1] for sight in (sights[0], other))
    same_bits(one.guess.x, two.guess.x)
    assert not np.allclose(one.scores.mse, two.scores.mse)


# --- The monitor ----------------------------------------------------------------------------------


def monitored(monitor, **changes):
    spec = TINY | {"evaluation": {"every": 1, "monitors": {"name": "reconstruction"} | monitor}}
    metrics = fedjax_sec.run(spec | changes).metrics
    return {k.partition("/")[2]: v[1:] for k, v in metrics.items() if "reconstruction/" in k}


@pytest.mark.parametrize(
    ("monitor", "clients"),
    [
        ({}, 1),
        ({"observer": "uplink"}, 1),
        ({"secure_aggregation": True}, 5),
        ({"observer": "client", "viewer": 1}, 4),
        ({"observer": "downlink"}, 5),
        ({"observer": "downlink", "merged": 1}, 1),
    ],
)
def test_an_attack_is_told_how_many_clients_it_looks_at(monitor, clients, spy):
    monitored(monitor | {"attack": "spy"}, rounds=1)
    known = type(spy).seen[3]
    assert (known.clients, known.count, known.batch) == (clients, 2 * clients, 2)


def test_a_mean_of_clients_hides_their_examples():
    """One example each: the server reads it, and of the mean of five hardly anything."""
    one = {"client": TINY["client"] | {"batch_size": 1}}
    alone = monitored({"attack": "analytic"}, **one)
    together = monitored({"attack": "analytic", "secure_aggregation": True}, **one)
    assert (alone["psnr"] > 40).all() and (alone["ssim"] > 0.99).all()
    assert (alone["label_recovery"] == 1).all()
    assert (together["psnr"] < alone["psnr"] - 10).all()


def test_behind_krum_the_models_step_is_one_clients_message():
    """An eavesdropper on the downlink reads the client that Krum chose."""
    changes = {
        "client": TINY["client"] | {"batch_size": 1},
        "defense": {"name": "krum", "num_byzantine": 1},
    }
    seen = monitored({"attack": "analytic", "observer": "downlink", "merged": 1}, **changes)
    assert (seen["psnr"] > 40).all()


@pytest.mark.parametrize(
    ("monitor", "words"),
    [
        ({"observer": "uplink", "secure_aggregation": True}, "masked messages"),
        ({"attack": "imprint"}, "a malicious server's"),
        ({"observer": "client", "viewer": 7}, "viewer must be < 5"),
        ({"merged": 3}, "merged is not read where the observer 'server'"),
        ({"observer": "downlink", "victim": 2}, "victim is not read where"),
        ({"viewer": 2}, "viewer is not read where no client looks"),
        (
            {"observer": "downlink", "attack": {"name": "idlg", "labels": "known"}},
            "labels: 'known' needs an observer",
        ),
        ({"observer": "servre"}, "'server'"),
    ],
)
def test_what_an_observer_cannot_do_is_refused(monitor, words):
    with pytest.raises(ConfigError, match=words):
        monitored(monitor)


# --- A run's rounds -------------------------------------------------------------------------------


def test_the_round_is_the_runs_own(tmp_path, spy):
    """The model before round 3 is the run's after 2, from the start and from a checkpoint."""
    before = fedjax_sec.run(TINY, rounds=2)
    task, sights = watch(config.from_mapping(TINY), spy, rounds=[3], clients=[0, 4])
    same_bits(task.space.split(before.params)[0], sights[0].params)
    out = tmp_path / "run"
    fedjax_sec.run(TINY, out=out)
    _, again = watch(config.from_mapping(TINY), spy, folder=out, rounds=[3], clients=[0, 4])
    for one, other in zip(sights, again, strict=True):
        same_bits(one.vector, other.vector)
        same_bits(one.x, other.x)
        assert one.clients == other.clients and one.known == other.known


@pytest.mark.parametrize(
    ("client", "steps"), [({"steps": 1}, 1), ({"steps": 3}, 3), ({"steps": None, "epochs": 2}, 8)]
)
def test_the_truth_is_what_the_client_trained_on(client, steps, spy):
    """Steps on the told examples, in their order, give the message."""
    spec = TINY | {"client": TINY["client"] | client}
    task, (sight,) = watch(config.from_mapping(spec), spy, clients=[3])
    assert sight.known.steps == steps
    assert len(set(sight.ids.tolist())) == len(sight.y) == min(2 * steps, 8)
    params, x, y = jnp.asarray(sight.params), jnp.asarray(sight.x), jnp.asarray(sight.y)

    def loss(params, rows):
        return task.loss(params, x[rows], y[rows], jnp.ones(2, bool))

    if steps <= 4:  # an epoch
        for step in range(steps):
            params = params - 0.2 * jax.grad(loss)(params, slice(2 * step, 2 * step + 2))
        close(params - sight.params, sight.vector, rtol=1e-3, atol=1e-5)


def test_a_mean_of_clients_holds_all_their_examples(spy):
    _, (sight,) = watch(config.from_mapping(TINY), spy, secure_aggregation=True)
    _, alone = watch(config.from_mapping(TINY), spy, clients=range(5))
    same_bits(np.concatenate([one.x for one in alone]), sight.x)
    close(np.mean([one.vector for one in alone], axis=0), sight.vector, rtol=1e-4)
    assert sight.clients == (0, 1, 2, 3, 4) and sight.known.clients == 5


def test_a_malicious_server_changes_the_model_of_its_round_alone():
    attack = registry.privacy_attacks.build({"name": "imprint", "bins": 32})
    spec = TINY | {"model": {"name": "mlp", "hidden": [6]}}
    honest, (plain,) = watch(
        config.from_mapping(spec), registry.privacy_attacks.build("analytic"), rounds=[2]
    )
    task, (sight,) = watch(config.from_mapping(spec), attack, rounds=[2])
    same_bits(plain.x, sight.x)  # the same batch
    for name, place in honest.space.slices.items():
        same_bits(plain.params[place], sight.params[task.space.slices[name]])
    edges = -sight.params[task.space.slices["params/inserted/bias"]]
    assert len(edges) == 32 and (np.diff(edges) > 0).all()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rounds": [5]}, "round must be between 1 and 4"),
        ({"rounds": [0]}, "round must be between 1 and 4"),
        ({"clients": [5]}, "client must be between 0 and 4"),
        ({"observer": "uplink", "secure_aggregation": True}, "masked messages"),
        ({"observer": "downlink", "clients": [3]}, "sees all clients together, got 3"),
        ({"merged": 2}, "merged is not read where the observer 'server'"),
    ],
)
def test_rounds_and_clients_that_are_not_there_are_named(options, words, spy):
    with pytest.raises(ConfigError, match=words):
        watch(config.from_mapping(TINY), spy, **options)


def test_a_client_that_sends_nothing_is_named(spy):
    spec = config.from_mapping(TINY | {"server": {"clients_per_round": 2}})
    with pytest.raises(ConfigError, match="sends nothing in round 1; its clients are") as error:
        for client in range(5):
            watch(spec, spy, clients=[client])
    assert str(error.value).count(",") == 1


# --- The command ----------------------------------------------------------------------------------


def command(*words):
    from typer.testing import CliRunner

    from fedjax_sec.cli import app

    return CliRunner().invoke(app, ["reconstruct", *map(str, words)])


def write_config(folder, **changes):
    path = folder / "tiny.yaml"
    path.write_text(config.dump_yaml(TINY | changes))
    return path


def test_the_command_writes_scores_arrays_and_pictures(tmp_path):
    out = tmp_path / "out"
    made = command(
        write_config(tmp_path),
        "attack=inverting_gradients",
        "attack.iterations=16",
        "attack.snapshots=4",
        "--round",
        "1-2",
        "--client",
        0,
        "--client",
        3,
        "--out",
        out,
    )
    assert made.exit_code == 0, made.output
    entries = json.loads((out / "reconstruction.json").read_text())
    assert [(e["round"], e["client"]) for e in entries] == [(1, 0), (1, 3), (2, 0), (2, 3)]
    for entry in entries:
        assert len(entry["labels_true"]) == len(entry["labels_recovered"]) == 2
        assert entry["success"] is (entry["psnr"] >= 20)
        close(entry["psnr"], np.mean(entry["psnr_of_examples"]), rtol=1e-5)
    arrays = np.load(out / "reconstruction.npz")
    x, true = arrays["round1_client0_x"], arrays["round1_client0_true_x"]
    match = arrays["round1_client0_match"]
    mse = np.mean((x[match] - true) ** 2, axis=(1, 2, 3))
    close(np.asarray(entries[0]["psnr_of_examples"]), -10 * np.log10(mse), rtol=1e-4)
    assert arrays["round2_client3_trail"].shape == (4, 2, 8, 8, 1)
    for name in ("reconstruction", "reconstruction_steps"):
        assert (out / f"{name}.png").stat().st_size > 1000


def test_the_command_takes_a_finished_run(tmp_path):
    run, out = tmp_path / "run", tmp_path / "out"
    fedjax_sec.run(TINY, out=run)
    made = command(run, "attack=analytic", "--out", out)
    assert made.exit_code == 0, made.output
    (entry,) = json.loads((out / "reconstruction.json").read_text())
    assert entry["round"] == 4  # the one behind its last
    refused = command(run, "attack=analytic", "experiment.rounds=9", "--out", out)
    assert refused.exit_code == 2 and "is as it is" in refused.output


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["rounds=3"], "write attack.rounds=... or experiment.rounds=..."),
        ([], "name the privacy attack"),
        (["attack=dgl"], "'dlg'"),
        (["attack=dlg", "attack.restart=3"], "'restarts'"),
        (["attack=dlg", "--observer", "sever"], "'server'"),
        (["attack=dlg", "--client", "a-3"], "a range 0-9, got 'a-3'"),
        (["attack=dlg", "--round", "3-1"], "a range 0-9, got '3-1'"),
    ],
)
def test_the_command_names_what_it_does_not_know(tmp_path, words, said):
    made = command(write_config(tmp_path), *words, "--out", tmp_path / "out")
    assert made.exit_code == 2
    assert said in " ".join(made.output.split())


def test_clients_of_one_example_each_are_drawn_side_by_side():
    one = {"client": TINY["client"] | {"batch_size": 1}}
    made = report.reconstruct(TINY | one, "analytic", clients=range(5))
    original, guess = report._side_by_side(made)
    close(original.images, np.concatenate([sight.x for sight in made.sights]))
    assert guess.images.shape == (5, 8, 8, 1) and guess.notes[3].startswith("round 1, client 3\n")
    assert not report._side_by_side(report.reconstruct(TINY, "analytic", clients=range(2)))


def test_changes_of_the_experiment_reach_it(tmp_path):
    out = tmp_path / "out"
    made = command(
        write_config(tmp_path), "attack=analytic", "experiment.client.batch_size=1", "--out", out
    )
    assert made.exit_code == 0, made.output
    (entry,) = json.loads((out / "reconstruction.json").read_text())
    assert entry["examples"] == 1 and entry["success"] and entry["identified"] == 1


def test_behind_krum_the_command_meets_the_client_that_was_chosen(tmp_path):
    out = tmp_path / "out"
    made = command(
        write_config(tmp_path, defense={"name": "krum", "num_byzantine": 1}),
        "attack=analytic",
        "experiment.client.batch_size=1",
        "--observer",
        "downlink",
        "--merged",
        1,
        "--out",
        out,
    )
    assert made.exit_code == 0, made.output
    (entry,) = json.loads((out / "reconstruction.json").read_text())
    assert entry["examples"] == 1 and entry["client"] == [0, 1, 2, 3, 4]
    assert entry["psnr"] > 40 and entry["identified"] == 1 and entry["label_rate"] == 1


def test_clients_that_look_do_not_hide_each_others_files(tmp_path):
    made = report.reconstruct(TINY, "analytic", observer="client", clients=[1, 3, 1])
    assert [entry["viewer"] for entry in made.entries] == [1, 3]
    assert [report.label(one) for one in made.sights] == [
        "round 1, 4 clients by 1",
        "round 1, 4 clients by 3",
    ]
    report.write(made, tmp_path)
    arrays = np.load(tmp_path / "reconstruction.npz")
    assert len([name for name in arrays if name.endswith("_true_x")]) == 2


def test_known_labels_are_those_of_the_victims_step(spy):
    """Of 8 examples a client trains on 2; the attack gets their labels, by the same draw."""

    @registry.privacy_attacks.register("informed")
    class Informed(PrivacyAttack):
        labels: str = static("known", "Where labels are from.", choices=("known",))
        inputs = frozenset({"pixels"})

        def reconstruct(self, key, message, params, task, known):
            jax.debug.callback(lambda labels: heard.append(labels.tolist()), known.labels)
            return Guess(None, known.labels.astype(jnp.int32))

    heard: list = []
    informed = registry.privacy_attacks.build("informed")
    _, (sight,) = watch(config.from_mapping(TINY), spy, clients=[2])
    monitored({"attack": "informed", "victim": 2}, rounds=1)
    jax.effects_barrier()
    assert heard[-1] == sight.y.tolist()
    told = report.reconstruct(TINY, informed, clients=[2])
    assert told.entries[0]["labels_recovered"] == sight.y.tolist()


# --- The experiments ------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", engine.SCALES)
def test_every_cell_of_the_experiments_is_valid(scale):
    plan = experiments.PAPER.plan(scale)
    sheets = engine.make_cells(experiments.PAPER, plan, list(experiments.PAPER.items))
    rows = {sheet.item: sheet.rows for sheet in sheets}
    assert len(rows["tradeoff"]) == 2 * len(experiments.DEFENSES)
    assert len(rows["labels"]) == 8 * 3 + 4 and len(rows["labels_cifar100"]) == 8 * 3 + 7
    for planned in rows["tradeoff"]:
        (cell,) = planned.cells
        attacked = planned.row.column == experiments.ATTACKED
        assert bool(cell.experiment.attack.stages) == attacked
        assert cell.experiment.client.batch_size == 8
        assert cell.experiment.client.optimizer.rate is not None  # gradients can be computed
    for planned in rows["labels"]:
        data, client = planned.cells[0].experiment.data, planned.cells[0].experiment.client
        assert data.max_train == data.num_clients * client.batch_size  # all of a client's data
