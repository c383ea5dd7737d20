"""Attacks on privacy: what observers saw in a run's round, and many reconstructions at once."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_sec import core
from fedjax_sec.core import (
    ConfigError,
    Guess,
    Known,
    Message,
    Monitor,
    make_space,
    pytree,
    registry,
)
from fedjax_sec.core.host import undisturbed
from fedjax_sec.core.random import Stream, stream
from fedjax_sec.core.types import BoundTask, InputSpec, Model
from fedjax_sec.monitors.reconstruction import known_of
from fedjax_sec.ops import observers
from fedjax_sec.ops import reconstruction as scores_of
from fedjax_sec.ops.client_axis import layout
from fedjax_sec.round import Pool, Problem, make_task
from fedjax_sec.runs import results
from fedjax_sec.runs.checkpoints import Checkpoints
from fedjax_sec.runs.config import Experiment
from fedjax_sec.runs.experiment import resolve_layout
from fedjax_sec.runs.prepare import Prepared, bound_task, make_replicas, prepare
from fedjax_sec.runs.program import Program


class Reconstruction(NamedTuple):
    """Reconstructions of m messages, n examples each, stacked: the guesses, and their scores.

    `scores` (a `fedjax_sec.ops.reconstruction.Scores`) is None where the truth is not known.
    """

    guess: Guess
    scores: Any = None


class Sight(NamedTuple):
    """What an observer saw of one client in a round, or of several that it cannot tell apart.

    `vector [D]` and `weight` are the message, `params [D]` the model before the round, `known` the
    numbers of the protocol. `x [n, ...]`, `y [n]` are the examples behind it, which no attack sees,
    and `ids [n]` their places in the training set; `clients` are those whose examples they are, and
    `viewer` the client that looked, None where it was nobody of them.
    """

    round: int
    clients: tuple[int, ...]
    vector: np.ndarray
    weight: np.ndarray
    params: np.ndarray
    known: Known
    x: np.ndarray
    y: np.ndarray
    ids: np.ndarray
    viewer: int | None = None


# --- Many at once ---------------------------------------------------------------------------------


def task_of(model: Model, inputs: InputSpec, num_classes: int) -> BoundTask:
    """The task of classification on a model alone, without an experiment around it."""
    how = layout("vmap", None, 1, False)
    problem = Problem(model, make_space(model), inputs, num_classes, 1, 1, False, how)
    frozen = () if model.init_frozen is None else model.init_frozen()
    nothing = np.zeros((1, *inputs.shape), np.float32), np.zeros(1, np.int32)
    return make_task(problem, Pool(*nothing, frozen), registry.tasks.build("classification"))


def reconstruct_all(
    attack: Any,
    keys: jax.Array,
    updates: jax.Array,
    params: jax.Array,
    task: BoundTask,
    known: Known,
    labels: jax.Array | None = None,
    truth: tuple | None = None,
) -> Reconstruction:
    """Attacks m messages in one program.

    `keys [m]`, `updates [m, D]`, `params [m, D]`, `labels [m, n]` where the observer knows them,
    and `truth`, inputs [m, n, ...] and labels [m, n], to score against, which no attack sees.
    """
    blind = observers.blinded(task)

    def one(key, update, params, labels):
        message = Message(update, jnp.float32(known.count))
        guess = Guess(
            *attack.reconstruct(key, message, params, blind, known._replace(labels=labels))
        )
        expected = (known.count, *task.inputs.shape)
        if guess.x is not None and guess.x.shape != expected:
            raise ConfigError(
                f"attack: {attack.registered_name!r} returned inputs of shape {guess.x.shape}, and "
                f"{expected} were asked for."
            )
        return guess

    guess = jax.jit(jax.vmap(one))(keys, updates, params, labels)
    if truth is None:
        return Reconstruction(guess)

    def scored(guess, x, y):
        return scores_of.score(guess, x, y, task.inputs, task.num_classes)

    return Reconstruction(guess, jax.jit(jax.vmap(scored))(guess, *truth))


# --- What a run's round shows ---------------------------------------------------------------------


@pytree
class _Recorder(Monitor):
    """Hands out a round as it was: messages, models, and the examples of every local step."""

    when = "every"
    prefix = "recorder"
    inputs = frozenset({"pixels", "features", "tokens"})
    observer: str = core.static("server", "Who looks.", choices=tuple(observers.OBSERVERS))
    secure_aggregation: bool = core.static(False, "The server sees the mean alone.")
    clients: tuple[int, ...] = core.static((), "Whom it looks at.", low=0, high=core.COUNT)
    steps: int = core.static(1, "Local steps, at most.", low=1, high=core.COUNT)

    def observe(self, key, state, trace, task):
        wanted = jnp.asarray(self.clients)

        def of(client):
            place = jnp.argmax(trace.ids == client)
            view = observers.view(trace, self.observer, self.secure_aggregation, place, place)
            return {
                "vector": view.message.vector,
                "weight": view.message.weight,
                "members": view.members,
                "sent": trace.present[place] & (trace.ids[place] == client),
            }

        def examples(place):
            data = trace.data(place)
            if (first := trace.drawn(place, 0)) is None:
                positions, mask = jnp.arange(data.capacity), jnp.arange(data.capacity) < data.count
            else:
                if self.steps == 1:
                    steps = jax.tree.map(lambda leaf: leaf[None], first)
                else:
                    steps = jax.vmap(lambda s: trace.drawn(place, s))(jnp.arange(self.steps))
                positions, mask = (leaf.reshape(-1) for leaf in steps)
            x, y = data.fetch(positions)
            return {"positions": positions, "mask": mask, "x": x, "y": y, "count": data.count}

        return state, {
            "before": trace.before,
            "ids": trace.ids,
            **jax.lax.map(of, wanted),
            **jax.lax.map(examples, jnp.arange(trace.ids.shape[0])),
        }


def watch(
    experiment: Experiment,
    attack: Any,
    *,
    folder: str | Path | None = None,
    rounds: Sequence[int] = (1,),
    clients: Sequence[int] = (0,),
    observer: str = "server",
    secure_aggregation: bool = False,
    merged: int | None = None,
) -> tuple[BoundTask, list[Sight]]:
    """What the observer sees in some rounds of an experiment, numbered from 1, and the truth.

    The rounds are computed as the run computes them, from the newest checkpoint in `folder` before
    each of them, else from the start. `clients` are whom a `server` or an eavesdropper on the
    `uplink` looks at, or who looks, as a `client`; a `downlink` and a server with secure
    aggregation see all of them together. A malicious server's attack changes the model that is
    sent in each of these rounds, and nothing else.

    Raises: `ConfigError` for rounds and clients that are not there, for a client that sends nothing
    in a round, and for clients of which the protocol's numbers are not known.
    """
    _check(experiment, rounds, clients)
    whole = prepare(experiment)
    prepared = whole._replace(experiment=_bare(experiment), probes=())
    alone = observers.of_one(observer, secure_aggregation)
    if not alone and observer != "client" and tuple(clients) != (0,):
        raise ConfigError(
            f"client: the observer {observer!r} sees all clients together, got "
            f"{', '.join(map(str, clients))}; leave it out."
        )
    if alone and merged is not None:
        raise ConfigError(
            f"merged is not read where the observer {observer!r} sees each client's message, got "
            f"{merged}; leave it out."
        )
    looked_at = tuple(dict.fromkeys(clients))
    recorder = _Recorder(observer, secure_aggregation, looked_at, _most_steps(prepared))
    walk = _Walk(whole, folder)
    sights = []
    for number in sorted(set(rounds)):
        state, program = walk.to(number - 1)
        if attack.tampers:
            task, seen = _tampered(prepared, program, state, attack, recorder, number)
        else:
            task = bound_task(
                prepared.experiment,
                prepared.source,
                prepared.network,
                prepared.task,
                prepared.setting,
            )
            seen = _record(prepared, state, program.tuning, recorder, number)
        for i, client in enumerate(looked_at):
            sights.append(_sight(prepared, task, seen, i, client, number, alone, observer, merged))
    return task, sights


def _bare(experiment: Experiment) -> Experiment:
    """The experiment without what only looks at it."""
    evaluation = dataclasses.replace(
        experiment.evaluation, monitors=(), diagnostics=False, influence=None, evasions=()
    )
    return dataclasses.replace(experiment, evaluation=evaluation)


def _check(experiment: Experiment, rounds, clients) -> None:
    for number in rounds:
        if not 1 <= number <= experiment.rounds + 1:
            raise ConfigError(
                f"round must be between 1 and {experiment.rounds + 1}, the one behind the last, "
                f"got {number}."
            )
    for client in clients:
        if not 0 <= client < experiment.data.num_clients:
            raise ConfigError(
                f"client must be between 0 and {experiment.data.num_clients - 1}, got {client}."
            )


def _most_steps(prepared: Prepared) -> int:
    """The local steps of the client that takes most of them; 1 where clients do not tell."""
    client = prepared.experiment.complete_algorithm.client
    return max(_steps_of(client, int(count)) for count in prepared.population.counts)


def _steps_of(client, count: int) -> int:
    steps, epochs, batch = (core.value_of(client, n) for n in ("steps", "epochs", "batch_size"))
    if steps is not None:
        return steps
    if epochs is None or batch is None:
        return 1
    whole = count // batch if core.value_of(client, "drop_last") else -(-count // batch)
    return epochs * max(whole, 1)


class _Walk:
    """Goes through a run's rounds, forwards, from its checkpoint where that helps."""

    def __init__(self, prepared: Prepared, folder: str | Path | None):
        self.done = 0
        states = None if folder is None else Path(folder) / results.CHECKPOINTS
        known = states is not None and (states.parent / results.EXECUTION).exists()
        tuning = resolve_layout(prepared, states if known else None)
        self.program = Program(prepared, 1, tuning)
        self.replicas = make_replicas([prepared])
        start = None if prepared.start is None else [prepared.start]
        self.state = self.program.init(self.replicas, start)
        self.checkpoints = None
        if states is not None and states.is_dir():
            configuration = results.RunFolder(folder).experiment().to_dict()
            self.checkpoints = Checkpoints(states, [configuration])

    def to(self, done: int):
        """(the state after `done` rounds, the program)."""
        self._jump(done)
        if done > self.done:
            args = self.state, self.replicas, self.done, done - self.done
            self.state, _ = self.program.advance(*args)
            self.done = done
        return jax.tree.map(jnp.copy, self.state), self.program  # the next step is given it

    def _jump(self, done: int) -> None:
        saved = [] if self.checkpoints is None else self.checkpoints.rounds()
        saved = [one for one in saved if self.done < one <= done]
        if saved:
            whole = {"params": self.program.params(self.state, self.replicas), "state": self.state}
            restored = self.checkpoints.at(max(saved), whole)
            self.state, self.done = restored.state["state"], max(saved)


def _watched(prepared: Prepared, recorder: _Recorder) -> Prepared:
    """The same experiment with the recorder as its only monitor."""
    evaluation = dataclasses.replace(prepared.experiment.evaluation, monitors=(recorder,))
    experiment = dataclasses.replace(prepared.experiment, evaluation=evaluation)
    return prepared._replace(experiment=experiment, probes=(None,))


def _record(prepared: Prepared, state, tuning, recorder: _Recorder, number: int) -> dict:
    """All that the recorder sees in a round, on the host."""
    watched = _watched(prepared, recorder)
    program, replicas = Program(watched, 1, tuning), make_replicas([watched])
    return _seen(program, state._replace(monitors=((),)), replicas, number)


def _seen(program: Program, state, replicas, number: int) -> dict:
    """All that the recorder of a program sees in a round."""
    _, metrics = program.advance(state, replicas, number - 1, 1)
    mine = {name: value for name, value in metrics.items() if name.startswith("recorder/")}
    return {name.removeprefix("recorder/"): v[0] for name, v in jax.device_get(mine).items()}


def _tampered(prepared: Prepared, program, state, attack, recorder, number: int):
    """(the task, what the recorder sees) of a round in which the server sends another model."""
    replicas = make_replicas([prepared])
    honest = program.params(state, replicas)[0]
    experiment = dataclasses.replace(
        prepared.experiment, model=attack.insert(prepared.experiment.model), start_from=None
    )
    other = prepare(experiment)
    task = bound_task(other.experiment, other.source, other.network, other.task, other.setting)
    key = jax.random.fold_in(stream(replicas.key[0], Stream.MONITOR), number)
    drawn = other.space.split(other.network.model.init(key))[0]
    for name, place in prepared.space.slices.items():
        drawn = drawn.at[other.space.slices[name]].set(honest[place])
    params = attack.plant(key, drawn, task)
    watched = _watched(other, recorder)
    theirs = Program(watched, 1, program.tuning)
    replicas = make_replicas([watched])
    begin = theirs.init(replicas, [np.asarray(params)])
    return task, _seen(theirs, begin, replicas, number)


def _sight(prepared, task, seen, i, client, number, alone, observer, merged) -> Sight:
    """One observer's sight, of the recorder's arrays."""
    if (alone or observer == "client") and not seen["sent"][i]:
        raise ConfigError(
            f"client: {client} sends nothing in round {number}; its clients are "
            f"{', '.join(map(str, seen['ids'].tolist()))}."
        )
    members = np.flatnonzero(seen["members"][i])
    chosen, examples = [], []
    for place in members:  # each example once, in the order of the steps
        mask = seen["mask"][place].astype(bool)
        positions = seen["positions"][place][mask]
        first = np.sort(np.unique(positions, return_index=True)[1])
        at = np.flatnonzero(mask)[first]
        examples.append((seen["x"][place][at], seen["y"][place][at]))
        owner = int(seen["ids"][place])
        chosen.append(
            prepared.population.index[
                owner, np.minimum(positions[first], prepared.population.index.shape[1] - 1)
            ]
        )
    x = np.concatenate([one for one, _ in examples])
    y = np.concatenate([one for _, one in examples])
    sizes = {len(one) for one in chosen}
    trainer = core.resolve(prepared.experiment.complete_algorithm.client, number - 1)
    known = known_of(trainer, task)
    counts = seen["count"][members]
    clients = len(members) if merged is None else merged
    steps = {_steps_of(trainer, int(count)) for count in counts}
    if len(steps) > 1 or (len(sizes) > 1 and clients > 1 and max(steps) > 1):
        raise ConfigError(
            f"clients: those that the observer cannot tell apart take {sorted(steps)} local steps "
            f"on {sorted(sizes)} examples, and an attack needs them alike."
        )
    count = len(y) if clients == len(members) else clients * max(sizes)
    known = known._replace(
        rate=None if known.rate is None else float(known.rate),
        l2=float(known.l2),
        steps=steps.pop(),
        batch=min(known.batch, max(sizes)),
        examples=count,
        clients=clients,
    )
    return Sight(
        number,
        tuple(int(seen["ids"][place]) for place in members),
        seen["vector"][i],
        seen["weight"][i],
        seen["before"],
        known,
        x,
        y,
        np.concatenate(chosen),
        client if observer == "client" else None,
    )


@undisturbed
def attack_sights(
    attack: Any, task: BoundTask, sights: Sequence[Sight], seed: int = 0
) -> list[tuple[Sight, Reconstruction]]:
    """Reconstructions of all sights, those with the same numbers of the protocol in one program.

    Each is returned with its sight. Where an attack guesses fewer examples than the observer saw
    something of, the sight holds those that the guesses are nearest to, each to another one.
    """
    groups: dict[Any, list[int]] = {}
    for i, sight in enumerate(sights):
        groups.setdefault((sight.known, len(sight.y)), []).append(i)
    made: dict[int, tuple[Sight, Reconstruction]] = {}
    for (known, size), members in groups.items():
        ours = [sights[i] for i in members]
        given = core.value_of(attack, "labels") == "known"
        if given and size != known.count:
            raise ConfigError(
                "attack.labels: 'known' needs an observer that knows whose labels they are."
            )
        y = np.stack([one.y for one in ours])
        guess = reconstruct_all(
            attack,
            jax.vmap(lambda i: jax.random.fold_in(jax.random.key(seed), i))(jnp.asarray(members)),
            jnp.stack([one.vector for one in ours]),
            jnp.stack([one.params for one in ours]),
            task,
            known,
            jnp.asarray(y) if given else None,
        ).guess
        guesses = [jax.tree.map(lambda leaf, row=row: leaf[row], guess) for row in range(len(ours))]
        if size != known.count:
            ours = [_nearest(one, its, task) for one, its in zip(ours, guesses, strict=True)]
        truth = tuple(np.stack(arrays) for arrays in zip(*((o.x, o.y) for o in ours), strict=True))

        def scored(guess, x, y):
            return scores_of.score(guess, x, y, task.inputs, task.num_classes)

        values = jax.device_get(jax.jit(jax.vmap(scored))(guess, *truth))
        for row, i in enumerate(members):
            score = jax.tree.map(lambda leaf, row=row: leaf[row], values)
            made[i] = ours[row], Reconstruction(jax.device_get(guesses[row]), score)
    return [made[i] for i in range(len(sights))]


def _nearest(sight: Sight, guess: Guess, task: BoundTask) -> Sight:
    """The sight with those of its examples that the guesses are nearest to."""
    if guess.x is None:
        raise ConfigError(
            "merged: an attack that guesses labels alone says of no example that it met it; leave "
            "merged out."
        )
    tokens = task.inputs.kind == "tokens"
    errors = scores_of.squared_errors(guess.x, jnp.asarray(sight.x), differ=tokens)
    at = np.asarray(scores_of.matched(errors)[1])
    return sight._replace(x=sight.x[at], y=sight.y[at], ids=sight.ids[at])
