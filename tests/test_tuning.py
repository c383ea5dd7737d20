"""How local training is computed: candidates, measuring, remembering, resuming."""

import dataclasses
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pytest
from helpers import shallow, small
from programs import program_of

import fedjax_sec
from fedjax_sec.core import ConfigError, choices
from fedjax_sec.core.space import make_space
from fedjax_sec.ops import backend
from fedjax_sec.ops.backend import compiler_options, on_cpu
from fedjax_sec.runs import execution, tuning
from fedjax_sec.runs.config import from_mapping
from fedjax_sec.runs.prepare import initial_params, prepare
from fedjax_sec.runs.tuning import Choice, Tuning, candidates, tune

CNN = {"name": "small_cnn", "channels": [4], "hidden": 8}
A, B, C = Choice("vmap"), Choice("map"), Choice("chunked", 8)


@pytest.fixture
def measuring(monkeypatch, tmp_path):
    """Tuning switched on, with an empty cache folder and nothing remembered."""
    monkeypatch.setenv("FEDJAX_SEC_TUNING", "on")
    monkeypatch.setenv("FEDJAX_SEC_CACHE", str(tmp_path))
    monkeypatch.setattr(tuning, "_measurements", {})
    return tmp_path


def lasting(milliseconds, calls=None):
    """A measure under which each choice takes its time; None for one that does not fit."""

    def measure(choice):
        if milliseconds[choice] is None:
            return None

        def call():
            if calls is not None:
                calls.append(choice)
            time.sleep(milliseconds[choice] / 1e3)

        return call

    return measure


def test_candidates_are_what_the_fields_leave_open():
    both = candidates("auto", None, "auto", 51)
    assert both[0] == Choice("map", None, "patches")  # the rule's, on a CPU
    assert len(both) == len(set(both)) == 2 * (len(tuning.POOLING) - 1) + 1
    assert not any(choice.convolution == "xla" for choice in both)
    assert Choice("chunked", 8, "patches") in both
    assert candidates("auto", None, None, 51) == [A, B, C]
    assert candidates("auto", None, None, 8) == [A, B]  # no more clients than side by side
    fixed = candidates("chunked", 3, "auto", 51)
    assert {choice[:2] for choice in fixed} == {("chunked", 3)}
    assert next(choice.convolution for choice in fixed) == "patches"
    assert candidates("auto", None, "rows", 51)[0] == Choice("map", None, "rows")
    some = candidates("map", None, "auto", 51, ["rows", "patches"])
    assert {choice.convolution for choice in some} == {"rows", "patches"}
    assert candidates("vmap", None, "xla", 51) == [Choice("vmap", None, "xla")]
    assert candidates("sharded", None, "auto", 51) == [Choice("sharded", None, "patches")]


@pytest.mark.parametrize(
    ("milliseconds", "expected"),
    [
        ({A: 20, B: 5, C: 40}, B),
        ({A: 20, B: 19.5, C: 40}, A),  # not clearly faster than the rule's choice
        ({A: None, B: 20, C: 5}, C),  # the rule's choice does not fit
        ({A: 20, B: None, C: None}, A),
        ({A: None, B: None, C: None}, A),
    ],
)
def test_the_fastest_is_chosen(measuring, milliseconds, expected):
    result = tune([A, B, C], {"work": 1}, lasting(milliseconds))
    assert result.choice == expected
    fitting = {str(choice) for choice, value in milliseconds.items() if value is not None}
    assert result.milliseconds.keys() == fitting


def test_another_devices_candidates_compile_side_by_side(measuring, monkeypatch):
    """All three are being compiled before the first is finished, and the choice is the same."""
    monkeypatch.setattr(tuning, "on_cpu", lambda: False)
    monkeypatch.setattr(tuning, "usable_cores", lambda: 3)
    together, calls = threading.Barrier(3, timeout=30), lasting({A: 20, B: 5, C: None})

    def measure(choice):
        together.wait()
        return calls(choice)

    result = tune([A, B, C], {"work": "side by side"}, measure)
    assert result.choice == B and result.milliseconds.keys() == {str(A), str(B)}


def test_a_hopeless_candidate_is_timed_once(measuring):
    calls = []
    result = tune([A, B], {"work": 2}, lasting({A: 5, B: 50}, calls))
    assert calls.count(B) == 1 and calls.count(A) > 3
    assert result.milliseconds[str(B)] >= 50


def test_what_was_measured_is_remembered_by_this_process_and_the_next(measuring, monkeypatch):
    first = tune([A, B], {"work": 3}, lasting({A: 20, B: 5}))
    calls = []
    again = lasting({A: 5, B: 20}, calls)
    assert tune([A, B], {"work": 3}, again) == first and not calls
    monkeypatch.setattr(tuning, "_measurements", {})  # as in another process
    assert tune([A, B], {"work": 3}, again) == first and not calls
    (path,) = measuring.glob("tuning/*.json")
    assert json.loads(path.read_text())["milliseconds"] == first.milliseconds
    assert tune([A, B], {"work": 4}, again).choice == A and calls  # another shape
    with monkeypatch.context() as newer:
        newer.setattr(tuning, "GENERATION", tuning.GENERATION + 1)
        assert tune([A, B], {"work": 3}, again).choice == A  # other code
    path.write_text("{")  # damaged: measured anew
    monkeypatch.setattr(tuning, "_measurements", {})
    assert tune([A, B], {"work": 3}, again).choice == A


def test_nothing_is_measured_when_switched_off_or_nothing_is_open(measuring, monkeypatch):
    assert tune([B], {}, None) == Tuning(B, {})
    monkeypatch.setenv("FEDJAX_SEC_TUNING", "off")
    assert tune([A, B], {}, None) == Tuning(A, {})
    assert not list(measuring.iterdir())


@pytest.mark.parametrize(
    ("milliseconds", "waiting", "expected"),
    [
        ({A: 5, B: 10, C: 6}, {A: 3.0, B: 1.0, C: 2.0}, B),  # 15, 10, 12
        ({A: 5, B: 10, C: 6}, {A: 3.0, B: 1.0, C: 1.1}, C),
        ({A: 5, B: 15, C: 20}, {A: 3.2, B: 1.0, C: 1.0}, A),  # not clearly faster
        ({A: None, B: 30, C: 10}, {A: 1.0, B: 1.0, C: 4.0}, B),
    ],
)
def test_unequal_clients_wait_where_they_are_side_by_side(
    measuring, monkeypatch, milliseconds, waiting, expected
):
    measured = {str(choice): float(value) for choice, value in milliseconds.items() if value}
    monkeypatch.setattr(tuning, "_measured", lambda candidates, measure: measured)
    result = tune([A, B, C], {"work": 5}, None, waiting=waiting.__getitem__)
    assert result.choice == expected
    assert result.waiting == {str(choice): factor for choice, factor in waiting.items()}
    # What is kept are times: equal clients of the same shape take them as they are.
    equal = tune([A, B, C], {"work": 5}, None)
    assert equal.waiting is None and equal.milliseconds == result.milliseconds
    assert equal.choice == min(
        (one for one in (A, B, C) if milliseconds[one]), key=milliseconds.__getitem__
    )
    assert Tuning.from_dict(json.loads(json.dumps(result.to_dict()))) == result


def test_waiting_is_counted_in_the_clients_order(monkeypatch):
    """12, 3, 3, 6 and 6 examples: all wait for the first, or each for its neighbour."""
    spec = small(client={"name": "sgd", "epochs": 1, "batch_size": 3})
    prepared = prepare(from_mapping(spec))
    assert len(prepared.population.counts) == 5
    population = prepared.population._replace(counts=np.array([12, 3, 3, 6, 6]))
    prepared = prepared._replace(population=population)
    pairs = Choice("chunked", 2)
    assert execution.waiting(prepared, A) == pytest.approx(5 * 12 / 30)
    assert execution.waiting(prepared, B) == 1
    assert execution.waiting(prepared, pairs) == pytest.approx((2 * 12 + 2 * 6 + 6) / 30)
    steps = prepare(from_mapping(small(client={"name": "sgd", "steps": 2, "batch_size": 3})))
    assert execution.waiting(steps._replace(population=population), A) == 1
    called = []
    monkeypatch.setattr(execution, "tune", lambda *args: called.append(args) or Tuning(A, {}))
    monkeypatch.setenv("FEDJAX_SEC_TUNING", "on")
    execution.choose_layout(prepared)
    assert called[0][-1](A) == pytest.approx(2)  # it reaches the choice


@pytest.mark.slow
@pytest.mark.parametrize("client", [{"steps": 3}, {"epochs": 1, "keep_optimizer_state": True}])
def test_an_experiment_is_measured_and_computes_the_same(measuring, client):
    spec = small(model=CNN, client={"name": "sgd", "batch_size": 3, **client}, rounds=2)
    result = fedjax_sec.run(spec)
    tuned = result.summary["tuning"]
    names = {str(choice) for choice in candidates("auto", None, "auto", 5)}
    assert tuned["milliseconds"].keys() == names
    assert all(0 < value < 1e4 for value in tuned["milliseconds"].values())
    for clients, lowering in (("vmap", "rows"), ("map", "polyphase")):
        fixed = {"execution.clients": clients, "model.convolution": lowering}
        other = fedjax_sec.run(spec, **fixed)
        assert other.summary["tuning"]["clients"] == clients
        assert other.summary["tuning"]["milliseconds"] == {}
        for a, b in zip(jax.tree.leaves(result.params), jax.tree.leaves(other.params), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    (path,) = measuring.glob("tuning/*.json")
    assert json.loads(path.read_text())["shape"]["clients"] == 5
    assert len(fedjax_sec.run(spec | {"seed": 5, "defense": "median"}).summary["tuning"]) == 6
    assert len(list(measuring.glob("tuning/*.json"))) == 1  # neither seed nor defence matters


def test_a_resumed_run_computes_as_it_began(measuring, monkeypatch, tmp_path):
    spec = small(model=CNN, rounds=4)
    out = tmp_path / "run"
    monkeypatch.setattr(execution, "tune", lambda *_: Tuning(Choice("map", None, "rows"), {}))

    def stop(done, rows):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fedjax_sec.run(spec, out=out, on_evaluation=stop)
    monkeypatch.setattr(execution, "tune", None)  # calling it would fail
    resumed = fedjax_sec.run(spec, out=out, resume=True)
    assert resumed.summary["tuning"]["convolution"] == "rows"
    assert resumed.summary["layout"]["at_once"] == 1


def test_every_choice_reaches_the_network():
    experiment = from_mapping(small(model=CNN))
    for lowering in set(choices(experiment.model, "convolution")) - {"auto"}:
        tuning_of = Tuning(Choice("vmap", None, lowering), {})
        program = program_of(experiment, tuning=tuning_of)
        chosen = dataclasses.replace(experiment.model, convolution=lowering)
        x = jax.random.uniform(jax.random.key(0), (2, 8, 8, 1))
        model = chosen.make((8, 8, 1), 10)
        variables = model.init(jax.random.key(1))
        text = str(jax.make_jaxpr(model.apply)(variables, x))
        assert str(jax.make_jaxpr(program.problem.model.apply)(variables, x)) == text


def test_large_batches_are_compared_on_fewer_clients(measuring, monkeypatch):
    """Or minutes would pass before the first round."""
    shapes = []

    def note(result, shape, measure, before, waiting):
        shapes.append(shape)
        return Tuning(result[0], {})

    monkeypatch.setattr(execution, "tune", note)
    for batch_size in (2, 32):
        client = {"name": "sgd", "steps": 3, "batch_size": batch_size}
        data = {"name": "digits", "num_clients": 12, "max_train": 1200}
        monkeypatch.setattr(execution, "TUNING_IMAGES", 4 * 2 * 32)
        execution.choose_layout(prepare(from_mapping(small(model=CNN, client=client, data=data))))
    assert [shape["clients"] for shape in shapes] == [8, 4]


def test_a_short_run_measures_nothing_and_a_long_one_does(measuring, monkeypatch):
    """Of a CPU; the estimate grows with everything that a run computes."""
    monkeypatch.delenv("FEDJAX_SEC_TUNING")
    monkeypatch.setattr(execution, "usable_cores", lambda: 2)
    asked = []
    monkeypatch.setattr(
        execution, "tune", lambda options, *_: asked.append(options) or Tuning(options[1], {"a": 1})
    )
    client = {"name": "sgd", "steps": 2, "batch_size": 8}
    spec = small(model=CNN, client=client)
    short = prepare(from_mapping(spec))
    assert execution.choose_layout(short) == Tuning(Choice("map", None, "patches"), {}, 2)
    long = prepare(from_mapping(spec | {"rounds": 10**9}))
    assert execution.choose_layout(long).optimization is None and len(asked) == 1
    assert execution.choose_layout(short, replicas=10**9).milliseconds and len(asked) == 2
    monkeypatch.setenv("FEDJAX_SEC_TUNING", "on")
    assert execution.choose_layout(short).milliseconds and len(asked) == 3
    monkeypatch.setenv("FEDJAX_SEC_TUNING", "off")
    assert execution.choose_layout(long) == Tuning(Choice("map", None, "patches"), {})

    def seconds(**changes):
        return execution.training_seconds(prepare(from_mapping(spec | changes)))

    one = seconds()
    assert seconds(rounds=spec["rounds"] * 3) == pytest.approx(3 * one)
    assert seconds(client=client | {"steps": 6}) == pytest.approx(3 * one)
    pgd = client | {"name": "adversarial", "fraction": 0.5, "pgd_steps": 8}
    assert seconds(client=pgd) == pytest.approx(5 * one)
    wider = CNN | {"channels": [8], "hidden": 16}
    assert 2 * one < seconds(model=wider) < 8 * one
    monkeypatch.setattr(execution, "usable_cores", lambda: 4)
    assert seconds() == pytest.approx(one / 2)


def test_the_estimate_of_a_perceptron():
    """Three passes of two operations a weight, biases and activations left aside."""
    spec = small(model={"name": "mlp", "hidden": [32]}, rounds=7)
    prepared = prepare(from_mapping(spec))
    one = prepared.experiment
    images = 7 * one.clients_per_round * one.client.gradients(prepared.setting.capacity)
    weights = 64 * 32 + 32 * 10
    rate = execution.CORE_RATE * execution.usable_cores()
    estimate = execution.training_seconds(prepared) * rate
    assert 6 * weights * images <= estimate <= 1.2 * 6 * weights * images


def test_a_level_of_optimization_is_written_down_and_taken_up(measuring, monkeypatch, tmp_path):
    monkeypatch.delenv("FEDJAX_SEC_TUNING")
    spec, out = small(rounds=4), tmp_path / "run"

    def stop(done, rows):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fedjax_sec.run(spec, out=out, on_evaluation=stop)
    assert json.loads((out / "execution.json").read_text())["optimization"] == 2
    monkeypatch.setattr(execution, "THOROUGH", 0.0)  # a run that began now would get XLA's own
    resumed = fedjax_sec.run(spec, out=out, resume=True)
    assert resumed.summary["tuning"]["optimization"] == 2
    assert fedjax_sec.run(spec).summary["tuning"]["optimization"] is None


@pytest.fixture
def optimizing(monkeypatch):
    """XLA as users have it: the suite disables most optimisations."""
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    before = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


def test_the_level_reaches_the_compiler(optimizing, monkeypatch):
    options = []

    class Compiled:
        def memory_analysis(self):
            return None

    class Lowered:
        def compile(self, given):
            options.append(given)
            return Compiled()

    for level in (1, None):
        program = program_of(from_mapping(small()), tuning=Tuning(A, {}, level))
        program._lowered["key"] = Lowered(), 0.0, threading.Lock()
        program.finish()
    lighter = {"xla_cpu_use_fusion_emitters": False, "xla_backend_optimization_level": 1}
    assert options == [lighter if on_cpu() else None, None]


def test_two_threads_compile_a_program_once():
    """Groups of a sweep may share a program, and each compiles it in a thread of its own."""
    started, compiled = threading.Event(), []

    class Compiled:
        def memory_analysis(self):
            return None

    class Lowered:
        def compile(self, given):
            started.set()
            time.sleep(0.2)
            compiled.append(given)
            return Compiled()

    program = program_of(from_mapping(small()))
    program._lowered["key"] = Lowered(), 0.0, threading.Lock()
    with ThreadPoolExecutor(3) as threads:
        callers = [threads.submit(program.finish)]
        assert started.wait(60)
        callers += [threads.submit(program._finish, "key"), threads.submit(program.finish)]
        assert [caller.exception() for caller in callers] == [None, None, None]
    assert len(compiled) == 1 and not program._lowered


@pytest.mark.skipif(not on_cpu(), reason="these options are a CPU's")
def test_what_users_ask_of_xla_stays(optimizing, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=3")
    assert compiler_options(2) == {"xla_cpu_use_fusion_emitters": False}
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_use_fusion_emitters=true")
    assert compiler_options(2) == {"xla_backend_optimization_level": 2}
    monkeypatch.delenv("XLA_FLAGS")
    jax.config.update("jax_disable_most_optimizations", True)
    assert compiler_options(2) == {"xla_cpu_use_fusion_emitters": False}


@pytest.mark.skipif(not on_cpu(), reason="these options are a CPU's")
def test_an_option_that_xla_dropped_is_left_out(monkeypatch):
    assert not backend._accepted("xla_cpu_has_never_been", False)
    dropped = "xla_cpu_use_fusion_emitters"
    monkeypatch.setattr(backend, "_accepted", lambda name, value: name != dropped)
    assert dropped not in compiler_options(2)


@pytest.mark.parametrize("name", ["mlp", "small_cnn", "lenet", "resnet", "char_lstm"])
def test_initial_parameters_do_not_depend_on_the_level(optimizing, name):
    shape, classes = ((12,), 20) if name == "char_lstm" else ((16, 16, 3), 10)
    model = shallow(name).make(shape, classes)
    key = jax.random.key(3)
    draw = jax.jit(lambda key: make_space(model).split(model.init(key))[0])
    bits = [
        np.asarray(draw.lower(key).compile({"xla_backend_optimization_level": level})(key))
        for level in (2, 3)
    ]
    np.testing.assert_array_equal(*bits)


def test_initial_parameters_are_drawn_one_seed_after_another(monkeypatch):
    """Batched, XLA does not come back from several QR decompositions on two cores."""
    model, traced = shallow("mlp", hidden=[7]), []
    make = type(model).make

    def counting(self, *shapes):
        made = make(self, *shapes)
        return made._replace(init=lambda key: traced.append(key.shape) or made.init(key))

    monkeypatch.setattr(type(model), "make", counting)
    draw, keys = initial_params(model, (12,), 20), jax.random.split(jax.random.key(3), 3)
    traced.clear()  # the parameters' shapes were asked for
    params, one = draw(keys), draw(keys[1:2])
    assert len(traced) == 1  # one program, whatever the number of seeds
    np.testing.assert_array_equal(params[1], one[0])
    assert not np.array_equal(params[0], params[1])


@pytest.mark.parametrize(
    ("said", "expected"), [("", None), ("on", True), ("TRUE", True), ("0", False), ("false", False)]
)
def test_tuning_is_switched(monkeypatch, said, expected):
    monkeypatch.setenv("FEDJAX_SEC_TUNING", said)
    assert tuning.switched() is expected


def test_another_value_of_the_switch_is_refused(monkeypatch):
    monkeypatch.setenv("FEDJAX_SEC_TUNING", "offf")
    with pytest.raises(ConfigError, match="FEDJAX_SEC_TUNING.*got 'offf'.*Did you mean 'off'"):
        fedjax_sec.run(small())
