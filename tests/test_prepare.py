"""Everything of a run is loaded, dealt out and checked once; unread traces cost nothing."""

import jax.numpy as jnp
import pytest
from helpers import same_bits, small
from programs import program_of, replicas_of

import fedjax_sec
from fedjax_sec import core, sweeps
from fedjax_sec.core import Monitor
from fedjax_sec.runs import checkpoints, config, experiment, prepare
from fedjax_sec.sweeps import groups

COUNTED = ("load_source", "make_population", "check_on_data", "check_bases", "trigger_pixels")


@pytest.fixture
def calls(monkeypatch):
    """How often each part of the preparation is called."""
    counts = dict.fromkeys(("prepare", *COUNTED), 0)

    def counting(name, function):
        def counted(*args, **kwargs):
            counts[name] += 1
            return function(*args, **kwargs)

        return counted

    for name in COUNTED:
        monkeypatch.setattr(prepare, name, counting(name, getattr(prepare, name)))
    whole = counting("prepare", prepare.prepare)
    for module in (experiment, groups):
        monkeypatch.setattr(module, "prepare", whole)
    return counts


ATTACKED = {"threat": {"num_malicious": 1}, "attack": "pattern", "rounds": 1}


def test_a_run_prepares_once(calls, tmp_path):
    fedjax_sec.run(small(**ATTACKED), out=tmp_path / "run")
    assert set(calls.values()) == {1}, calls
    fedjax_sec.run(small(**ATTACKED))
    assert set(calls.values()) == {2}, calls


def test_a_sweep_prepares_each_run_once(calls, tmp_path):
    cells = sweeps.make_cells(small(**ATTACKED), {"defense": ["mean", "median"]}, seeds=(0, 1))
    sweeps.run_cells(cells, tmp_path)
    assert set(calls.values()) == {4}, calls


def test_a_state_of_another_version_says_so(tmp_path, monkeypatch):
    class Stop(Exception):
        pass

    def stop(done, rows):
        if done == 2:
            raise Stop

    spec = small(rounds=3) | {"checkpoint": {"every": 1}}
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "_FORMAT", "fedjax_sec checkpoint 2")
        with pytest.raises(Stop):
            fedjax_sec.run(spec, out=tmp_path, on_evaluation=stop)
    with pytest.raises(core.ConfigError, match="another version of fedjax_sec wrote"):
        fedjax_sec.run(spec, out=tmp_path, resume=True)


@core.pytree
class Looks(Monitor):
    """Reads what its field says of a round."""

    reads: str = core.static("nothing", "Part of the trace.")
    when: str = core.static("every", "Rounds.", choices=("every", "last"))
    registered_name = "looks"

    def observe(self, key, state, trace, task):
        if self.reads == "nothing":
            return state, {"round": trace.round}
        return state, {"norm": jnp.linalg.norm(trace.sent.vector - trace.honest.vector)}


def bytes_of(monitors, clients="map"):
    changes = {"evaluation.diagnostics": False, "execution.clients": clients}
    spec = small(model={"name": "mlp", "hidden": [500]}, attack="sign_flip", rounds=2)
    one = config.from_mapping(spec | {"threat": {"num_malicious": 1}}, changes)
    program = program_of(one)
    replicas = replicas_of([one])
    components = replicas.components._replace(monitors=monitors)
    replicas = replicas._replace(components=components, probes=(None,) * len(monitors))
    state = program.state_shapes(replicas)
    program._advancer(state, replicas, 2)
    return program.compiled["advance 2"]["temporary_bytes"]


def test_what_no_monitor_reads_costs_no_memory():
    without, idle = bytes_of(()), bytes_of((Looks(),))
    assert idle <= without + 64  # its metric, the number of the round
    stack = 4 * 5 * (64 * 500 + 500 + 500 * 10 + 10)
    assert bytes_of((Looks("stack"),)) <= without + 1.2 * stack


def test_a_monitor_of_the_last_round_is_traced_once(monkeypatch):
    calls, observe = [], Looks.observe
    monkeypatch.setattr(Looks, "observe", lambda *args: calls.append(1) or observe(*args))
    bytes_of((Looks("stack", "last"),))
    assert len(calls) == 1


def test_seeds_share_a_network(monkeypatch):
    spec = small(model={"name": "mlp", "hidden": [11]})
    one, other = (config.from_mapping(spec | {"seed": seed}) for seed in (0, 1))
    made, make = [], type(one.model).make
    monkeypatch.setattr(type(one.model), "make", lambda *args: made.append(1) or make(*args))
    assert prepare.prepare(one).network is prepare.prepare(other).network
    assert len(made) == 1


def test_a_monitor_changes_nothing_of_a_run():
    plain = fedjax_sec.run(small(**ATTACKED), **{"evaluation.diagnostics": False})
    seen = fedjax_sec.run(small(**ATTACKED))
    same_bits(plain.params, seen.params)
    assert "kept" in seen.metrics and "kept" not in plain.metrics


def test_two_monitors_of_one_name_are_an_error():
    spec = small(evaluation={"monitors": ["diagnostics"]}, rounds=1)
    with pytest.raises(core.ConfigError, match=r"two monitors measure '"):
        fedjax_sec.run(spec)
