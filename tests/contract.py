"""What every component must do, as plain functions that name no component.

`test_contract.py` runs them over everything registered, `test_contract_catches.py` over components
that are broken on purpose. A violated contract is an `AssertionError`.
"""

import contextlib
import dataclasses
import functools
import inspect
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import yaml
from helpers import CLASSES, SHAPE, close, count_traces, same_bits, sample, tiny_pool, tiny_task

from fedjax_sec import core
from fedjax_sec.core import ConfigError, Setting, check_components, fill_defaults
from fedjax_sec.core.types import AttackerView, LocalData, ServerData, ServerView
from fedjax_sec.data import MissingDataError, checked
from fedjax_sec.data.packing import check_partition
from fedjax_sec.ops import evasion
from fedjax_sec.round.pipeline import Attack, Defense

# With f = 3 every score of Bulyan sums two distances or more: with fewer, two clients tie, and the
# lower row wins whatever the order.
CLIENTS, BYZANTINE, DIM = 16, 3, 6
MALICIOUS = np.arange(CLIENTS) % 3 == 1  # five of sixteen, scattered


# --- Components and their fields ----------------------------------------------------------------


def passes_check(component, setting) -> bool:
    """Whether the checks of the component and of what is nested in it accept this many clients."""
    try:
        check_components((component,), "part", setting)
    except ConfigError:
        return False
    return True


def variants(registry, name, setting, every_pair=True):
    """The component as it comes, and with every choice of its fields that its check accepts."""
    base = fill_defaults(registry.build(name), {"num_malicious": BYZANTINE})
    options = {}
    for field in dataclasses.fields(base):
        choices = field.metadata.get("choices")
        if field.metadata.get("static") and isinstance(getattr(base, field.name), bool):
            choices = (True, False)
        if choices:
            options[field.name] = choices
    if every_pair:
        combinations = [
            dict(zip(options, picked, strict=True))
            for picked in itertools.product(*options.values())
        ]
    else:
        combinations = [{}] + [{n: c} for n, choices in options.items() for c in choices]
    found = []
    for changes in combinations:
        one = dataclasses.replace(base, **changes)
        if one not in found and passes_check(one, setting):
            found.append(one)
    return found


def fixed_counts(component, value=4):
    """The component with every optional count given, so that none depends on the rows' number."""
    changes = {
        field.name: value
        for field in dataclasses.fields(component)
        if field.metadata.get("static")
        and getattr(component, field.name) is None
        and "int" in str(field.type)
    }
    return dataclasses.replace(component, **changes)


def numeric_fields(component):
    """Names of the traced fields, with two values inside the allowed range of each."""
    for field in dataclasses.fields(component):
        meta = field.metadata
        if meta.get("static") or "kind" in meta or "section" in meta:
            continue
        low = next((meta[k] for k in ("low", "above") if meta.get(k) is not None), 0.0)
        high = next((meta[k] for k in ("high", "below") if meta.get(k) is not None), low + 1.0)
        low = max(low, 0.0)  # not at ends that are only a limit of what is sensible
        high = min(high, low + 1.0)
        whole = field.type in (int, "int")
        values = (0, 1) if whole else (low + 0.3 * (high - low), low + 0.7 * (high - low))
        yield field.name, values


@contextlib.contextmanager
def no_concrete_values(what):
    """Reading a tracer's value (`float(...)`, `if ...`) is a violation like any other."""
    try:
        yield
    except (jax.errors.JAXTypeError, jax.errors.UnexpectedTracerError) as error:
        raise AssertionError(f"{what} is read as a Python number: {error}") from error


def check_numeric_fields_are_traced(component, call, setting=None):
    """A new value does not retrace, and vmap over all values of all fields equals a loop over them.

    One program serves all fields, unless a value in place of `None` is a leaf more.
    """
    groups = {}
    for name, values in numeric_fields(component):
        several = [dataclasses.replace(component, **{name: value}) for value in values]
        if setting is not None and not passes_check(several[0], setting):
            continue
        shapes = {jax.tree.structure(one) for one in several}
        assert len(shapes) == 1, f"field {name} is no leaf of the pytree"
        groups.setdefault(shapes.pop(), []).extend(several)
    for several in groups.values():
        with no_concrete_values("a numeric field"):
            counted, traces = count_traces(call)
            jitted = jax.jit(counted)
            outputs = [jitted(one) for one in several]
            assert len(traces) == 1, f"other values traced {len(traces)} times"
            stack = jax.tree.map(lambda *leaf: jnp.stack([jnp.asarray(a) for a in leaf]), *several)
            mapped = jax.jit(jax.vmap(call))(stack)
        close(mapped, jax.tree.map(lambda *leaf: jnp.stack(leaf), *outputs), rtol=1e-4, atol=1e-5)


def check_described(cls):
    """A one-line summary, a source, a doctest, a frozen class, and a meaning for every field."""
    text = inspect.getdoc(cls)
    first, *rest = text.splitlines()
    assert first.strip(), "the first line is empty"
    assert not rest or not rest[0].strip(), "the summary is longer than a line"
    assert first.rstrip().endswith("."), "the summary is no sentence"
    assert any(line.startswith("Source:") for line in rest), "no 'Source:' section"
    assert "Example:" in (line.strip() for line in rest), "no 'Example:' section"
    assert ">>>" in text.split("Example:", 1)[1], "the example is no doctest"
    assert dataclasses.is_dataclass(cls) and cls.__dataclass_params__.frozen, "not frozen"
    for field in dataclasses.fields(cls):
        assert field.metadata.get("doc"), f"field {field.name} says nothing about its meaning"


def check_ends(cls):
    """Every field that holds numbers has a lower and an upper end, or says why one is missing."""
    for field in dataclasses.fields(cls):
        meta = field.metadata
        if "kind" in meta or "section" in meta or meta.get("choices"):
            continue
        if not re.search(r"\b(int|float)\b", str(field.type)):
            continue
        both = all(core.ends(meta))
        assert both or meta.get("unbounded"), (
            f"field {field.name} has the ends {core.ends(meta)}, and gives no reason (unbounded)"
        )


def check_gate(registry, component):
    """A built component passes the gate again; with a value that is none it does not.

    Scalars of NumPy and JAX are taken as the numbers that they are, and written as such.
    """
    assert registry.build(component) == component
    for field in dataclasses.fields(component):
        meta = field.metadata
        if "kind" in meta or "section" in meta or meta.get("choices"):
            continue
        kinds = set(re.findall(r"\b(int|float|bool|str|None)\b", str(field.type)))
        for value, allowed in (
            (np.float32("nan"), ()),
            (jnp.inf, ()),
            (np.True_, ("bool",)),
            (None, ("None",)),
            ({"a": 1}, ()),
            ("${seed}", ()),
        ):
            if kinds.isdisjoint(allowed):
                changed = dataclasses.replace(component, **{field.name: value})
                with contextlib.suppress(ConfigError):
                    registry.build(changed)
                    raise AssertionError(f"field {field.name} takes {value!r}")
    for name, values in numeric_fields(component):
        for scalar in (np.asarray(values[1])[()], jnp.asarray(values[1])):
            built = registry.build(dataclasses.replace(component, **{name: scalar}))
            assert type(getattr(built, name)) in (int, float), f"{name} stays {type(scalar)}"
            assert yaml.safe_load(yaml.safe_dump(core.dump(built))) == core.dump(built)


def check_round_trip(registry, component):
    """What `dump` writes, `build` reads back."""
    spec = core.dump(component)
    assert spec["name"] == component.registered_name
    again = registry.build(spec)
    assert type(again) is type(component) and again == component
    assert core.dump(again) == spec


# --- Defences -----------------------------------------------------------------------------------


@core.pytree
class PlainMean:
    """An aggregator for stages that need one: the unweighted mean of the valid rows."""

    stage = "aggregate"
    registered_name = "plain_mean"

    def init(self, num_clients, dim):
        return ()

    def apply(self, key, updates, state, view):
        kept = view.valid.astype(updates.dtype)
        total = jnp.sum(jnp.where(view.valid[:, None], updates, 0.0), axis=0)
        return total / jnp.maximum(kept.sum(), 1.0), state, {"kept": kept}


def as_pipeline(part) -> Defense:
    """The component in its place beside a plain mean."""
    if part.stage == "before":
        return Defense((part, PlainMean()))
    return Defense((part,)) if part.stage == "aggregate" else Defense((PlainMean(), part))


def stack_of_updates(seed=0, clients=CLIENTS):
    """Normal updates, and proof that they arrived: of zeros most checks hold for any rule."""
    drawn = np.random.default_rng(seed).normal(size=(clients, DIM)).astype(np.float32)
    updates = jnp.asarray(drawn)
    if not isinstance(updates, jax.core.Tracer):
        np.testing.assert_array_equal(updates, drawn, err_msg="JAX's copy of the updates differs")
    return updates


def defend(part, updates, seed=0, ids=None, with_kept=True, own=None):
    """(aggregate, state, metrics) of the component in its pipeline; `ids` decide the weights.

    `own` is what the server learned itself, for rules that ask.
    """
    ids = np.arange(updates.shape[0]) if ids is None else ids
    own = jnp.linspace(1.0, -0.5, updates.shape[1]) if own is None else own
    return _defend(part, updates, seed, jnp.asarray(ids), with_kept, own)


@functools.partial(jax.jit, static_argnames="with_kept")
def _defend(part, updates, seed, ids, with_kept, own):
    defense = as_pipeline(part)
    view = ServerView(
        params=jnp.zeros(updates.shape[1]),
        weights=(ids % 4 + 1).astype(updates.dtype),
        client_ids=ids,
        valid=jnp.ones(updates.shape[0], bool),
        round=jnp.array(0),
        with_kept=with_kept,
        root=ServerData(lambda: own, lambda params: jnp.sum(params**2)),
    )
    state = defense.init(CLIENTS, updates.shape[1])
    return defense.apply(jax.random.key(seed), updates, state, view)


def draws(part) -> bool:
    """Whether the result depends on the key."""
    one, other = (defend(part, stack_of_updates(), seed)[0] for seed in (0, 1))
    return not np.array_equal(one, other)


def check_defense_shapes(part):
    updates = stack_of_updates()
    with no_concrete_values("an array"):
        aggregate, state, metrics = jax.jit(lambda u: defend(part, u))(updates)
    assert aggregate.shape == (DIM,) and aggregate.dtype == updates.dtype
    assert np.isfinite(aggregate).all(), "the aggregate of finite updates is not finite"
    before = as_pipeline(part).init(CLIENTS, DIM)
    assert jax.tree.structure(state) == jax.tree.structure(before)
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(state), strict=True):
        assert jnp.shape(old) == jnp.shape(new) and jnp.result_type(old) == jnp.result_type(new)
    if part.stage == "aggregate":
        kept = np.asarray(metrics["kept"])
        assert kept.shape == (CLIENTS,)
        assert ((kept >= 0) & (kept <= 1)).all() and kept.sum() > 0
        quick, _, metrics = defend(part, updates, with_kept=False)
        assert metrics.get("kept") is None or metrics["kept"].shape == (CLIENTS,)
        close(quick, aggregate)


def check_fixed_point(part):
    """Small identical updates, the server's too, are their own aggregate.

    Noise is exempt where it is added after.

    A rule that does not keep the updates' scale keeps at least their signs.
    """
    if part.stage == "after" and draws(part):
        return
    row = 0.01 * stack_of_updates()[0]
    aggregate = defend(part, jnp.tile(row[None], (CLIENTS, 1)), own=row)[0]
    if getattr(part, "keeps_scale", True):
        close(aggregate, row, rtol=1e-4, atol=1e-7)
    else:
        same_bits(jnp.sign(aggregate), jnp.sign(row))
        assert not np.allclose(aggregate, row, rtol=0.1), "it does keep the scale"


def check_permutation_invariance(part):
    if draws(part):
        return
    updates, order = stack_of_updates(), np.random.default_rng(1).permutation(CLIENTS)
    aggregate, _, metrics = defend(part, updates)
    moved, _, moved_metrics = defend(part, updates[order], ids=order)
    close(moved, aggregate)
    if part.stage == "aggregate":
        close(moved_metrics["kept"], metrics["kept"][order])


def check_bad_rows_are_left_out(part):
    """Any one row of NaN or infinity: as if the client had not taken part."""
    part = fixed_counts(part)
    updates = stack_of_updates()
    for row, bad in ((0, np.nan), (5, np.inf), (CLIENTS - 1, -np.inf)):
        aggregate = defend(part, updates.at[row, row % DIM].set(bad))[0]
        assert np.isfinite(aggregate).all(), f"a row of {bad} reaches the aggregate"
        rest = np.delete(np.arange(CLIENTS), row)
        close(aggregate, defend(part, updates[rest], ids=rest)[0])


def check_defense_over_seeds(part):
    """vmap over seeds and updates equals a loop over them."""
    stacks = jnp.stack([stack_of_updates(seed) for seed in range(3)])
    with no_concrete_values("an array"):
        mapped = jax.jit(jax.vmap(lambda u, s: defend(part, u, s)[0]))(stacks, jnp.arange(3))
    looped = jnp.stack([defend(part, u, s)[0] for s, u in enumerate(stacks)])
    close(mapped, looped)


def check_defense_fields(part):
    check_numeric_fields_are_traced(
        part, lambda one: defend(one, 5 * stack_of_updates())[0], Setting(CLIENTS, BYZANTINE)
    )


@core.pytree
class Pairs(core.Stage):
    """A stage that makes one row of every two clients."""

    stage = "before"
    registered_name = "pairs"

    def after(self, setting):
        return setting._replace(num_clients=setting.num_clients // 2, merged=True)

    def init(self, num_clients, dim):
        return ()

    def apply(self, key, updates, state, view):
        rows = updates.shape[0] // 2
        members = jnp.repeat(jnp.eye(rows, dtype=updates.dtype), 2, axis=1)
        view = view._replace(
            valid=view.valid.reshape(rows, 2).all(1),
            weights=members @ view.weights,
            members=members,
        )
        return members @ updates / 2, view, state, {}


def check_merged_rows(part):
    """Behind a stage that merges rows a rule works, or its check refuses it."""
    stages = (Pairs(), *as_pipeline(part).stages)
    try:
        check_components(stages, "defense", Setting(CLIENTS, BYZANTINE))
    except ConfigError:
        return
    updates = stack_of_updates()
    view = ServerView(
        jnp.zeros(DIM),
        jnp.ones(CLIENTS),
        jnp.arange(CLIENTS),
        jnp.ones(CLIENTS, bool),
        jnp.array(0),
        root=ServerData(lambda: updates[0], lambda params: jnp.sum(params**2)),
    )
    defense = Defense(stages)
    try:
        aggregate, _, metrics = defense.apply(
            jax.random.key(0), updates, defense.init(CLIENTS, DIM), view
        )
    except (TypeError, ValueError) as error:
        raise AssertionError(f"it takes rows for clients: {error}") from error
    assert aggregate.shape == (DIM,) and np.isfinite(aggregate).all()
    assert metrics["kept"].shape == (CLIENTS,)


DEFENSE_CHECKS = (
    check_defense_shapes,
    check_fixed_point,
    check_permutation_invariance,
    check_bad_rows_are_left_out,
    check_defense_over_seeds,
    check_defense_fields,
)


# --- Attacks on updates -------------------------------------------------------------------------


def attack_updates(seed=0):
    size = (CLIENTS, tiny_task().dim)
    return jnp.asarray(0.1 * np.random.default_rng(seed).normal(size=size), jnp.float32)


def attacker_view(visible=MALICIOUS, params=None, malicious=MALICIOUS):
    task = tiny_task()
    params = 0.2 * jax.random.normal(jax.random.key(7), (task.dim,)) if params is None else params
    return AttackerView(
        jnp.asarray(malicious),
        jnp.asarray(visible),
        params,
        jnp.arange(CLIENTS),
        jnp.array(0),
        task,
        sample,
        lambda updates, guess=None: defend(PlainMean(), updates, own=guess)[0],
    )


def assail(part, updates, seed=0, visible=MALICIOUS, malicious=MALICIOUS):
    """(updates, state, metrics) of the component as an attack of its own."""
    attack = Attack((part,))
    state = attack.init(*updates.shape)
    view = attacker_view(visible, malicious=malicious)
    return attack.apply(jax.random.key(seed), updates, state, view)


def check_attack_shapes(part):
    updates = attack_updates()
    with no_concrete_values("an array"):
        sent, state, _ = jax.jit(lambda u: assail(part, u))(updates)
    assert sent.shape == updates.shape and sent.dtype == updates.dtype
    assert np.isfinite(sent).all(), "the attack sends what is not finite"
    before = Attack((part,)).init(*updates.shape)
    assert jax.tree.structure(state) == jax.tree.structure(before)
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(state), strict=True):
        assert jnp.shape(old) == jnp.shape(new) and jnp.result_type(old) == jnp.result_type(new)
    same_bits(sent[~MALICIOUS], updates[~MALICIOUS])
    assert not np.array_equal(sent[MALICIOUS], updates[MALICIOUS]), "the attack does nothing"
    own, _, _ = part.apply(jax.random.key(0), updates, part.init(*updates.shape), attacker_view())
    assert own.shape == updates.shape and own.dtype == updates.dtype


def check_attack_sees_visible_rows_only(part):
    run = jax.jit(lambda u: assail(part, u)[0])
    updates = attack_updates()
    hidden = jnp.where(jnp.asarray(MALICIOUS)[:, None], updates, 1000.0 + attack_updates(1))
    same_bits(run(hidden)[MALICIOUS], run(updates)[MALICIOUS])


def check_attack_ignores_unseen_rows(part):
    """No row outside `view.visible` counts, whatever it holds: neither honest nor the adversary's.

    A malicious client without a visible row still sends something.
    """
    part, updates = few_steps(part), attack_updates()
    first = np.flatnonzero(MALICIOUS)[0]
    others = MALICIOUS & (np.arange(CLIENTS) != first)

    @jax.jit
    def run(updates, visible):
        state = part.init(*updates.shape)
        return part.apply(jax.random.key(0), updates, state, attacker_view(visible))[0]

    everyone = np.ones(CLIENTS, bool)
    for row, visible in ((first, everyone), (first, MALICIOUS), (0, everyone)):
        visible = visible & (np.arange(CLIENTS) != row)
        sent, other = (run(updates.at[row].set(value), visible) for value in (0.0, 1000.0))
        same_bits(other[others], sent[others])
        assert np.isfinite(sent[MALICIOUS]).all(), "an unseen row leaves nothing to send"


def check_attack_survives_bad_rows(part):
    """NaN, infinity or a huge number at one client have the effect of not seeing it, nothing more.

    Every malicious client sends finite rows, whoever has such an update, and all of its own too.
    """
    part, updates = few_steps(part), attack_updates()
    run = jax.jit(lambda u, visible: assail(part, u, visible=visible)[0])
    everyone, first = np.ones(CLIENTS, bool), np.flatnonzero(MALICIOUS)[0]
    for row, bad in ((0, np.nan), (3, np.inf), (CLIENTS - 1, -1e30), (first, np.nan)):
        assert MALICIOUS[row] == (row == first)
        sent = run(updates.at[row, row % DIM].set(bad), everyone)[MALICIOUS]
        assert np.isfinite(sent).all(), f"{bad} of client {row} reaches what the attack sends"
        unseen = everyone & (np.arange(CLIENTS) != row)
        if row != first:  # its own update is what many attacks start from
            same_bits(sent, run(updates, unseen)[MALICIOUS])
        honest = updates[MALICIOUS & unseen]
        assert not np.array_equal(sent[-len(honest) :], honest), f"{bad} switches the attack off"
    lost = jnp.where(jnp.asarray(MALICIOUS)[:, None], jnp.nan, updates)
    assert np.isfinite(run(lost, MALICIOUS)[MALICIOUS]).all(), "no own update, nothing to send"


def check_attack_over_seeds(part):
    stacks = jnp.stack([attack_updates(seed) for seed in range(2)])
    run = jax.jit(lambda u, s: assail(part, u, s)[0])
    mapped = jax.jit(jax.vmap(lambda u, s: assail(part, u, s)[0]))(stacks, jnp.arange(2))
    close(mapped, jnp.stack([run(u, s) for s, u in enumerate(stacks)]), rtol=1e-4, atol=1e-5)


def check_attack_fields(part):
    check_numeric_fields_are_traced(few_steps(part), lambda one: assail(one, attack_updates())[0])


def few_steps(part):
    """The attack with a short search: a long one amplifies the rounding of vmap."""
    found = {f.name for f in dataclasses.fields(part)} & {"steps", "rounds"}
    return dataclasses.replace(part, **dict.fromkeys(found, 1))


def check_attack_acts_or_is_refused(part):
    """With one or two malicious clients, whatever they know: an effect on all, or an error before.

    What is refused for doing nothing does nothing: it sends the clients' own updates, or zeros.
    """
    part, updates = few_steps(part), attack_updates()
    run = jax.jit(lambda visible, bad: assail(part, updates, visible=visible, malicious=bad)[0])
    for count, knowledge in itertools.product((1, 2), ("corrupted", "omniscient")):
        setting = Setting(CLIENTS, count, knowledge=knowledge)
        bad = MALICIOUS & (np.cumsum(MALICIOUS) <= count)
        sent = np.asarray(run(bad if knowledge == "corrupted" else np.ones(CLIENTS, bool), bad))
        moved = np.abs(sent - updates)[bad].max(axis=1)
        try:
            check_components((part,), "attack", setting)
        except ConfigError:
            idle = getattr(part, "idle", lambda setting: None)(setting)
            nothing = min(moved.max(), np.abs(sent[bad]).max()) < 1e-4
            assert idle is None or nothing, f"refused, and yet it does something: {idle}"
        else:
            assert moved.min() > 1e-4, f"{count} clients, {knowledge}: it does nothing"


def wrappings(registry, part):
    """The attack inside every attack on updates that holds other attacks on updates."""
    for outer, pairs in itertools.groupby(wrappers(registry), key=lambda pair: pair[0]):
        yield dataclasses.replace(outer, **{field: few_steps(part) for _, field in pairs})


ATTACK_CHECKS = (
    check_attack_shapes,
    check_attack_sees_visible_rows_only,
    check_attack_ignores_unseen_rows,
    check_attack_survives_bad_rows,
    check_attack_acts_or_is_refused,
    check_attack_over_seeds,
    check_attack_fields,
)


# --- Attacks inside other attacks ---------------------------------------------------------------


def wrappers(registry):
    """(attack, field) for every field in which an attack on updates holds another one."""
    for name in registry.names():
        outer = registry.build(name)
        for field in dataclasses.fields(outer):
            inner = getattr(outer, field.name)
            if field.metadata.get("kind") == "attack" and inner.stage == "update":
                yield outer, field.name


def check_wrapped(outer, field, part):
    """A wrapper needs what the attack in it needs, and its clients do to data what that one does.

    Its checks are run, and what it sends differs from the honest updates at its clients.
    """
    wrapped = dataclasses.replace(outer, **{field: part})
    alone, inside = Attack((part,)), Attack((wrapped,))
    for need in ("root", "task", "rule"):
        missing = set(core.needing((part,), need)) - set(core.needing((wrapped,), need))
        assert not missing, f"{need} of the attack inside is lost"
    assert set(alone.backdoors) <= set(inside.backdoors), "the backdoor inside is lost"
    assert set(alone.data_stages) <= set(inside.data_stages), "nobody's data is poisoned"
    assert inside.adds_copies or not alone.adds_copies, "no copies are added"
    if alone.data_stages:
        mask = jnp.asarray(MALICIOUS)
        who = np.asarray(inside.poisoned_by(mask))[inside.data_stages.index(alone.data_stages[0])]
        shares = wrapped.shares(jnp.cumsum(mask) - 1)
        same_bits(who, MALICIOUS & np.asarray(shares[field]))
        assert who.any(), "no client poisons"
    checked = []
    spy = type(
        part.__class__.__name__,
        (type(part),),
        {"check": lambda self, path, setting: checked.append(path)},
    )
    spied = spy(**{f.name: getattr(part, f.name) for f in dataclasses.fields(part)})
    check_components((dataclasses.replace(outer, **{field: spied}),), "attack", Setting(CLIENTS, 5))
    assert checked == [f"attack.{field}"], "the check of the attack inside is not run"
    if field == next(f.name for f in dataclasses.fields(outer) if "kind" in f.metadata):
        check_attack_shapes(wrapped)


# --- Attacks on data ----------------------------------------------------------------------------


def check_poison(part):
    """Shapes, dtypes and the range of pixels survive; the same example is poisoned alike."""
    x, y = sample(jax.random.key(3), 9)

    def poison(x, y, position):
        return part.poison(jax.random.key(0), x, y, position, jnp.array(1), tiny_task())

    with no_concrete_values("an array"):
        px, py = jax.jit(poison)(x, y, jnp.arange(9))
    assert px.shape == x.shape and px.dtype == x.dtype
    assert py.shape == y.shape and py.dtype == y.dtype
    assert ((px >= 0) & (px <= 1)).all() and ((py >= 0) & (py < CLASSES)).all()
    order = np.random.default_rng(0).permutation(9)
    close(poison(x[order], y[order], jnp.asarray(order)), (px[order], py[order]))


def check_choice(part):
    """A mask of the client's own examples; padding behind them changes nothing."""
    labels = sample(jax.random.key(3), 9)[1]
    choose = jax.jit(lambda y, held: part.choose(jax.random.key(0), y, held))
    with no_concrete_values("an array"):
        chosen = choose(labels, jnp.arange(9) < 7)
    assert chosen.shape == (9,) and chosen.dtype == bool and chosen.any(), "nothing is poisoned"
    assert not chosen[7:].any(), "padding is poisoned"
    if part.base is not None:
        assert (labels[chosen] == part.base).all(), "another class than `base` is poisoned"
    same_bits(choose(labels.at[7:].set(0), jnp.arange(9) < 7), chosen)
    same_bits(choose(labels[:7], jnp.ones(7, bool)), chosen[:7])


def check_backdoor(part):
    """`examples` and `probes` hold images, the attacker's labels and which of them count."""
    x, y = part.examples(jax.random.key(0), attacker_view())
    assert x.shape == (y.shape[0], *SHAPE) and y.ndim == 1 and y.shape[0] >= 1
    inputs, labels = sample(jax.random.key(4), 7)
    x, target, include = part.probes(inputs, labels, tiny_task())
    assert x.shape == (target.shape[0], *SHAPE) and x.dtype == inputs.dtype
    assert include.shape == target.shape and include.dtype == bool
    assert jnp.issubdtype(target.dtype, jnp.integer) and x.shape[0] in (1, 7)
    assert ((x >= 0) & (x <= 1)).all() and ((target >= 0) & (target < CLASSES)).all()


def check_poison_fields(part):
    x, y = sample(jax.random.key(3), 9)
    check_numeric_fields_are_traced(
        part,
        lambda one: (
            one.poison(jax.random.key(0), x, y, jnp.arange(9), jnp.array(1), tiny_task()),
            one.choose(jax.random.key(0), y, jnp.ones(9, bool)),
        ),
    )


DATA_ATTACK_CHECKS = (check_poison, check_choice, check_backdoor, check_poison_fields)


# --- Clients ------------------------------------------------------------------------------------


def client_of(registry, name, **changes):
    """The client with a batch of 4 and what `changes` says."""
    return registry.build({"name": name, "batch_size": 4} | changes)


def client_variants(registry, name):
    changes = ({"steps": 1}, {"steps": 3}, {"epochs": 2}, {"steps": 2, "sampling": "uniform"})
    return [client_of(registry, name, **one) for one in changes]


def local_data(count, row=None, capacity=9, round=0):
    """A client that holds the first `count` of the positions `row` of the pool."""
    pool = tiny_pool()
    row = jnp.arange(capacity) if row is None else jnp.asarray(row)

    def fetch(position):
        example = row[position]
        return pool.x[example].astype(jnp.float32) / 255.0, pool.y[example]

    return LocalData(jnp.asarray(count), capacity, jnp.asarray(round), fetch)


def train_locally(client, count, seed=0, row=None, state=None):
    params = 0.2 * jax.random.normal(jax.random.key(7), (tiny_task().dim,))
    state = client.init(params.shape[0]) if state is None else state
    return client.apply(jax.random.key(seed), params, state, local_data(count, row), tiny_task())


def check_client_shapes(client):
    with no_concrete_values("an array"):
        delta, state, metrics = jax.jit(lambda n: train_locally(client, n))(7)
    assert delta.shape == (tiny_task().dim,) and delta.dtype == jnp.float32
    assert np.isfinite(delta).all() and np.abs(delta).max() > 0
    before = client.init(tiny_task().dim)
    assert jax.tree.structure(state) == jax.tree.structure(before)
    assert metrics["train_loss"].shape == () and np.isfinite(metrics["train_loss"])


def check_client_ignores_padding(client):
    """What stands behind a client's own examples never matters; without any there is no update."""
    run = jax.jit(lambda n, row: train_locally(client, n, row=row)[0])
    row = np.arange(9)
    other = np.where(row < 5, row, 30)
    same_bits(run(5, row), run(5, other))
    assert not np.array_equal(run(9, row), run(9, other)), "the client ignores its own examples"
    same_bits(run(0, row), np.zeros(tiny_task().dim, np.float32))


def check_client_over_clients(client):
    """vmap over clients equals a loop over them."""
    counts, seeds = jnp.array([3, 9, 6]), jnp.arange(3)
    run = jax.jit(lambda n, s: train_locally(client, n, s)[0])
    mapped = jax.jit(jax.vmap(lambda n, s: train_locally(client, n, s)[0]))(counts, seeds)
    looped = jnp.stack([run(n, s) for n, s in zip(counts, seeds, strict=True)])
    close(mapped, looped, rtol=1e-4)


def check_client_fields(client):
    check_numeric_fields_are_traced(client, lambda one: train_locally(one, 7)[0])


CLIENT_CHECKS = (
    check_client_shapes,
    check_client_ignores_padding,
    check_client_over_clients,
    check_client_fields,
)


# --- Models, data sets, partitions --------------------------------------------------------------


def check_model(component, shape=(32, 32, 3), classes=7):
    model = component.make(shape, classes)
    init = jax.jit(model.init)
    variables, again, other = (init(jax.random.key(seed)) for seed in (0, 0, 1))
    same_bits(variables, again)
    assert any(
        not np.array_equal(a, b)
        for a, b in zip(jax.tree.leaves(variables), jax.tree.leaves(other), strict=True)
    ), "the key does not matter"
    x = jnp.asarray(np.random.default_rng(0).random((2, *shape)), jnp.float32)
    apply = jax.jit(lambda v, x: model.apply(v, x, train=False, key=None))
    logits = apply(variables, x)
    assert logits.shape == (2, classes) and np.isfinite(logits).all()
    same_bits(apply(variables, x), logits)
    close(apply(variables, x[1:]), logits[1:], rtol=1e-4, atol=1e-5)
    stacked = jax.tree.map(lambda a, b: jnp.stack([a, b]), variables, other)
    close(
        jax.jit(jax.vmap(apply, (0, None)))(stacked, x),
        jnp.stack([logits, apply(other, x)]),
        rtol=1e-4,
        atol=1e-5,
    )


def check_dataset(component, folder):
    """Embedded data is sound; other data says what is missing and where it was looked for."""
    try:
        source = component.load(str(folder), download=False)
    except MissingDataError as error:
        assert repr(component.registered_name) in str(error) and str(folder) in str(error)
        return
    try:
        same_bits(checked(source, component.registered_name), source)  # nothing to convert
    except ConfigError as error:
        raise AssertionError(str(error)) from error
    for x, y in ((source.x_train, source.y_train), (source.x_test, source.y_test)):
        assert x.dtype == np.uint8 and y.dtype == np.int32 and len(x) == len(y) > 0
        assert x.max() <= source.scale and x.ndim == 4
        assert set(np.unique(y)) == set(range(source.num_classes))
    assert source.sizes == tuple(source.official_sizes) and not source.is_subset
    assert len(source.mean) == len(source.std) == source.x_train.shape[-1]
    train = {x.tobytes() for x in source.x_train}
    assert not any(x.tobytes() in train for x in source.x_test), "a test example was trained on"


def check_partitioner(component):
    labels = np.random.default_rng(0).integers(0, 10, 203).astype(np.int32)
    users = np.random.default_rng(1).integers(0, 31, 203).astype(np.int32)
    first, again, other = (
        component.split(np.random.default_rng(seed), labels, 10, users) for seed in (0, 0, 1)
    )
    check_partition(first, len(labels))
    assert first.counts.shape == (10,) and first.counts.min() >= 1
    same_bits(first, again)
    assert not np.array_equal(first.index, other.index), "the seed does not matter"


# --- Attacks on inputs --------------------------------------------------------------------------


def check_evasion(attack):
    """Stays in the ball and in the pixels' range, never helps the model, and repeats itself.

    Its numeric fields are traced: one compilation serves all values, and none changes the shapes.
    """
    task, pool = tiny_task(), tiny_pool()
    params = jax.random.normal(jax.random.key(0), (task.dim,))
    x, y = pool.x[:12].astype(jnp.float32) / 255, pool.y[:12]
    logits = functools.partial(task.logits, params)
    other = functools.partial(task.logits, params[::-1])

    def run(attack, key):
        return attack.apply(key, logits, x, y, other)

    counted, traces = count_traces(run)
    jitted = jax.jit(counted)
    key = jax.random.key(1)
    moved = jitted(attack, key)
    assert moved.shape == x.shape and moved.dtype == x.dtype
    eps = getattr(attack, "attack", attack).eps
    assert np.abs(moved - x).max() <= eps + 1e-6
    assert moved.min() >= 0 and moved.max() <= 1
    assert np.abs(moved - x).max() > 0, "nothing was moved"
    same_bits(moved, jitted(attack, key))
    inner = hasattr(attack, "attack")
    changes = dataclasses.replace(getattr(attack, "attack", attack), eps=eps / 2)
    halved = dataclasses.replace(attack, attack=changes) if inner else changes
    close(np.abs(jitted(halved, key) - x).max() <= eps / 2 + 1e-6, np.True_)
    assert len(traces) == 1, "a numeric field is not traced"
    if not inner:  # a surrogate's examples may help the victim
        clean, found = (evasion.margin(logits(inputs), y) for inputs in (x, moved))
        assert np.all(found <= clean + 1e-6), "the attack helped the model"
