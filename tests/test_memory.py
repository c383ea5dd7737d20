"""The memory plan of a sweep, and what happens when a single run does not fit."""

import jax
import pytest
from helpers import small
from programs import program_of, replicas_of, train

import fedjax_sec
from fedjax_sec.core import ConfigError
from fedjax_sec.runs import config, memory
from fedjax_sec.runs import program as program_lib

GIB = 2**30


def seeds(count=5):
    return [config.from_mapping(small(seed=seed)) for seed in range(count)]


@pytest.mark.parametrize(
    ("size", "working", "resident", "limit", "expected"),
    [
        (64, GIB, 0, None, 64),  # nobody knows the limit
        (64, GIB, 0, 1000 * GIB, 64),
        (64, GIB, GIB, 11 * GIB, 8),  # 0.85 * 11 - 1 = 8.35
        (64, GIB, 8 * GIB, 11 * GIB, 1),
        (1, GIB, 0, 2 * GIB, 1),
    ],
)
def test_replicas_that_fit(size, working, resident, limit, expected):
    assert memory.replicas_that_fit(size, working, resident, limit) == expected


def test_a_run_that_does_not_fit_is_refused_with_the_numbers(monkeypatch, tmp_path):
    monkeypatch.setattr(program_lib, "device_memory", lambda: 50_000)
    with pytest.raises(ConfigError, match=r"A single run needs about 0\.00 GiB .* execution.chunk"):
        fedjax_sec.run(small(), out=tmp_path)
    assert not (tmp_path / "summary.json").exists()


def test_a_history_that_does_not_fit_is_refused_before_it_is_allocated(monkeypatch, tmp_path):
    """5 clients times 454 parameters of 4 bytes: 9 kB, which the few last parameters are not."""
    monkeypatch.setattr(program_lib, "device_memory", lambda: 10_000)
    with pytest.raises(ConfigError, match=r"needs 0\.00 GiB.* for defense.*num_features"):
        fedjax_sec.run(small(defense="foolsgold"), out=tmp_path)
    few = config.from_mapping(small(defense={"name": "foolsgold", "num_features": 10}))
    program = program_of(few)
    assert program.init(replicas_of([few])).defense[0].shape == (1, 5, 10)


def test_memory_is_looked_at_when_something_compiles_and_never_again(monkeypatch):
    """XLA's account of a program takes ten milliseconds and more, a round of a small model less."""
    (cell,) = seeds(1)
    program = program_of(cell)
    looked = []
    needs = program._needs
    monkeypatch.setattr(program, "_needs", lambda *args: looked.append(1) or needs(*args))
    replicas = replicas_of([cell])
    state = program.init(replicas)
    for start in range(3):
        state, _ = program.advance(state, replicas, start, 1)
    assert len(looked) == 1


def test_the_limit_of_this_machine_is_known():
    assert memory.device_memory() > GIB / 4


def test_off_the_cpu_the_plan_fills_the_memory(monkeypatch):
    cells = seeds()
    expected = train(cells)
    assert {result.summary["replicas_at_once"] for result in expected} == {
        1 if jax.default_backend() == "cpu" else 5
    }
    program = program_of(cells[0])
    replicas = replicas_of(cells)
    state = program.init(replicas)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")  # as if the memory were a GPU's
    monkeypatch.setattr(program_lib, "device_memory", lambda: None)
    program._plan(state, replicas)
    assert program.at_once == 5 and program.traces == 0
    working, resident = program._needs(program._functions.popitem()[1], state, replicas)
    for count in (1, 2, 4):
        limit = int((resident + (count + 0.5) * working) / memory.USABLE)
        monkeypatch.setattr(program_lib, "device_memory", lambda limit=limit: limit)
        program.at_once = None
        program._plan(state, replicas)
        assert program.at_once == count
