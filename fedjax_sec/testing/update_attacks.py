"""The contract of attacks on updates, alone and inside other attacks."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_sec import core
from fedjax_sec.core import (
    AttackerView,
    ConfigError,
    Message,
    Setting,
    UpdateAttack,
    check_components,
)
from fedjax_sec.round.pipeline import Attack
from fedjax_sec.testing.compare import (
    both_ways,
    close,
    differs,
    expect,
    finite,
    no_concrete_values,
    same_bits,
    same_form,
)
from fedjax_sec.testing.defenses import CLIENTS, DIM, PlainMean, defend
from fedjax_sec.testing.fields import check_numeric_fields_are_traced
from fedjax_sec.testing.worlds import kinds_of, world

MALICIOUS = np.arange(CLIENTS) % 3 == 1  # five of sixteen, scattered


def kind_of(part) -> str:
    """The kind of input on which an attack is checked where that does not matter: pixels if any."""
    kinds = kinds_of(part)
    expect(kinds, "there is no kind of input on which it and what is nested in it work")
    return "pixels" if "pixels" in kinds else kinds[0]


def attack_updates(seed: int = 0, kind: str = "pixels"):
    """Small normal updates [K, D] of a tiny world."""
    size = (CLIENTS, world(kind).task.dim)
    return jnp.asarray(0.1 * np.random.default_rng(seed).normal(size=size), jnp.float32)


def attacker_view(visible=MALICIOUS, params=None, malicious=MALICIOUS, kind="pixels", memory=None):
    """The view of a tiny world's adversary."""
    place = world(kind)
    return AttackerView(
        jnp.asarray(malicious),
        jnp.asarray(visible),
        place.params() if params is None else params,
        jnp.arange(CLIENTS),
        jnp.array(0),
        place.task,
        place.sample,
        lambda updates, guess=None: defend(PlainMean(), updates, server=guess)[0],
        **({} if memory is None else {"memory": memory}),
    )


def assail(part, updates, seed=0, visible=MALICIOUS, malicious=MALICIOUS, kind="pixels"):
    """(updates, state, metrics) of the component as an attack of its own, once it has warmed up."""
    attack, place = Attack((part,)), world(kind)
    state, key = attack.init(*updates.shape, place.setting, place.task), jax.random.key(seed)
    view = attacker_view(visible, malicious=malicious, kind=kind)
    everyone = jnp.ones(CLIENTS, bool)
    for index in range(warm_up_of(part)):
        message = Message(attack_updates(100 + index, kind), jnp.ones(CLIENTS))
        state = attack.apply(jax.random.fold_in(key, index), message, state, view)[1]
        state = attack.remember(state, message, everyone, view)
        view = view._replace(round=view.round + 1)
    message = Message(updates, jnp.ones(CLIENTS))
    sent, state, metrics = attack.apply(key, message, state, view)
    return sent.vector, attack.remember(state, message, everyone, view), metrics


def warm_up_of(part) -> int:
    """The first rounds in which the attack, or one nested in it, sends what it is given."""
    updates = [one for _, one, _ in core.walk(part) if one.stage == "update"]
    return max(one.warm_up for one in updates)


def few_steps(part):
    """The attack with a short search: a long one amplifies the rounding of vmap.

    So are the attacks on updates that are nested in it.
    """
    names = {f.name for f in dataclasses.fields(part)} & {"steps", "rounds"}
    inner = {field: few_steps(getattr(part, field)) for _, field in fields_for_attacks(part)}
    return dataclasses.replace(part, **dict.fromkeys(names, 1), **inner)


def check_shapes(part) -> None:
    """Finite rows, an effect, honest rows as they are to the bit, and a state that keeps its form.

    On every kind of input, with and without jit.
    """
    for kind in kinds_of(part) if "task" in part.needs else [kind_of(part)]:
        updates, place = attack_updates(kind=kind), world(kind)
        run = functools.partial(assail, few_steps(part), kind=kind)
        sent, state, _ = both_ways(run, updates, rtol=1e-3, atol=1e-4)
        if few_steps(part) != part:
            with no_concrete_values("an array"):
                sent, state, _ = jax.jit(functools.partial(assail, part, kind=kind))(updates)
        expect(sent.shape == updates.shape and sent.dtype == updates.dtype, "the rows change form")
        finite(sent, "what the attack sends")
        attack = Attack((part,))
        same_form(attack.init(*updates.shape, place.setting, place.task), state, "the state")
        same_bits(sent[~MALICIOUS], updates[~MALICIOUS])
        expect(differs(sent[MALICIOUS], updates[MALICIOUS]), "the attack does nothing")
        if part.rewrites == "vector":
            memory = attack.memory(state)
            view = attacker_view(kind=kind, memory=memory)
            crafted = part.apply(jax.random.key(0), updates, part.init(*updates.shape), view)[0]
            expect(crafted.shape == updates.shape, f"it returns {crafted.shape}, not [K, D]")
            expect(crafted.dtype == updates.dtype, f"it returns {crafted.dtype}")


def check_sees_visible_rows_only(part) -> None:
    """Honest updates that the adversary does not see do not matter."""
    kind = kind_of(part)
    run = jax.jit(lambda u: assail(part, u, kind=kind)[0])
    updates = attack_updates(kind=kind)
    unseen = 1000.0 + attack_updates(1, kind)
    hidden = jnp.where(jnp.asarray(MALICIOUS)[:, None], updates, unseen)
    same_bits(run(hidden)[MALICIOUS], run(updates)[MALICIOUS])


def check_ignores_unseen_rows(part) -> None:
    """No row outside `view.visible` counts, whatever it holds: neither honest nor the adversary's.

    A malicious client without a visible row still sends something.
    """
    kind, part = kind_of(part), few_steps(part)
    updates, place, attack = attack_updates(kind=kind), world(kind), Attack((part,))
    first = np.flatnonzero(MALICIOUS)[0]
    others = MALICIOUS & (np.arange(CLIENTS) != first)

    @jax.jit
    def run(updates, visible):
        state = attack.init(*updates.shape, place.setting, place.task)
        view = attacker_view(visible, kind=kind, memory=attack.memory(state))
        key, initial = jax.random.key(0), part.init(*updates.shape)
        if part.rewrites == "message":
            return part.tamper(key, Message(updates, jnp.ones(CLIENTS)), initial, view)[0].vector
        return part.apply(key, updates, initial, view)[0]

    everyone = np.ones(CLIENTS, bool)
    for row, visible in ((first, everyone), (first, MALICIOUS), (0, everyone)):
        visible = visible & (np.arange(CLIENTS) != row)
        sent, other = (run(updates.at[row].set(value), visible) for value in (0.0, 1000.0))
        same_bits(other[others], sent[others])
        finite(sent[MALICIOUS], "what is sent where a row is not seen")


def check_survives_bad_rows(part) -> None:
    """NaN, infinity or a huge number at one client have the effect of not seeing it, nothing more.

    Every malicious client sends finite rows, whoever has such an update, and all of its own too.
    """
    kind, part = kind_of(part), few_steps(part)
    updates = attack_updates(kind=kind)
    run = jax.jit(lambda u, visible: assail(part, u, visible=visible, kind=kind)[0])
    everyone, first = np.ones(CLIENTS, bool), np.flatnonzero(MALICIOUS)[0]
    for row, bad in ((0, np.nan), (3, np.inf), (CLIENTS - 1, -1e30), (first, np.nan)):
        sent = run(updates.at[row, row % DIM].set(bad), everyone)[MALICIOUS]
        finite(sent, f"{bad} of client {row} reaches what the attack sends, which")
        unseen = everyone & (np.arange(CLIENTS) != row)
        if row != first:  # its own update is what many attacks start from
            same_bits(sent, run(updates, unseen)[MALICIOUS])
        honest = updates[MALICIOUS & unseen]
        expect(differs(sent[-len(honest) :], honest), f"{bad} switches the attack off")
    lost = jnp.where(jnp.asarray(MALICIOUS)[:, None], jnp.nan, updates)
    finite(run(lost, MALICIOUS)[MALICIOUS], "what is sent without any update of one's own")


def check_over_seeds(part) -> None:
    """vmap over seeds and updates equals a loop over them."""
    kind = kind_of(part)
    stacks = jnp.stack([attack_updates(seed, kind) for seed in range(2)])
    one = lambda u, s: assail(part, u, s, kind=kind)[0]  # noqa: E731
    run, mapped = jax.jit(one), jax.jit(jax.vmap(one))(stacks, jnp.arange(2))
    close(mapped, jnp.stack([run(u, s) for s, u in enumerate(stacks)]), rtol=1e-4, atol=1e-5)


def check_fields(part) -> None:
    """Numeric fields are traced."""
    kind = kind_of(part)
    updates = attack_updates(kind=kind)
    check_numeric_fields_are_traced(few_steps(part), lambda one: assail(one, updates, kind=kind)[0])


def check_acts_or_is_refused(part) -> None:
    """With one or two malicious clients, whatever they know: an effect on all, or an error before.

    What is refused for doing nothing does nothing: it sends the clients' own updates, or zeros.
    """
    kind, part = kind_of(part), few_steps(part)
    updates = attack_updates(kind=kind)

    @jax.jit
    def run(visible, bad):
        return assail(part, updates, visible=visible, malicious=bad, kind=kind)[0]

    for count, knowledge in itertools.product((1, 2), ("corrupted", "omniscient")):
        setting = Setting(CLIENTS, count, knowledge=knowledge)
        bad = MALICIOUS & (np.cumsum(MALICIOUS) <= count)
        sent = np.asarray(run(bad if knowledge == "corrupted" else np.ones(CLIENTS, bool), bad))
        moved = np.abs(sent - updates)[bad].max(axis=1)
        try:
            check_components((part,), "attack", setting)
        except ConfigError:
            idle = part.idle(setting)
            nothing = min(moved.max(), np.abs(sent[bad]).max()) < 1e-4
            expect(idle is None or nothing, f"refused, and yet it does something: {idle}")
        else:
            expect(moved.min() > 1e-4, f"{count} clients, {knowledge}: it does nothing")


def check_remembers_own_rows_only(part) -> None:
    """An honest client's earlier messages matter to no other client.

    The adversary does not see it, and a client remembers what it did itself. A row with NaN or
    infinity is not remembered.
    """
    updates = [one for _, one, _ in core.walk(part) if one.stage == "update"]
    if all(type(one).remember is UpdateAttack.remember for one in updates):
        return
    kind, part = kind_of(part), few_steps(part)
    attack, place, nobody = Attack((part,)), world(kind), jnp.zeros(CLIENTS, bool)
    earlier, updates = attack_updates(2, kind), attack_updates(kind=kind)
    everyone = jnp.ones(CLIENTS, bool)

    @jax.jit
    def run(earlier):
        first, second = jax.random.split(jax.random.key(0))
        view = attacker_view(nobody, malicious=nobody, kind=kind)
        state = attack.init(*updates.shape, place.setting, place.task)
        message = Message(earlier, jnp.ones(CLIENTS))
        state = attack.apply(first, message, state, view)[1]
        state = attack.remember(state, message, everyone, view)
        view = attacker_view(kind=kind)._replace(round=jnp.array(1))
        return attack.apply(second, Message(updates, jnp.ones(CLIENTS)), state, view)[0].vector

    sent, row = run(earlier), np.flatnonzero(MALICIOUS)[0]
    same_bits(run(earlier.at[0].set(1000.0))[MALICIOUS], sent[MALICIOUS])
    for bad in (np.nan, -np.inf, 1e30):
        again = run(earlier.at[row, 0].set(bad))
        finite(again[MALICIOUS], f"{bad} of an earlier round reaches what the attack sends, which")


def check_separable(part) -> None:
    """Where it says so, a client that sees its own row alone sends what it sends beside others."""
    if not part.separable:
        return
    kind, part = kind_of(part), few_steps(part)
    updates = attack_updates(kind=kind)

    @jax.jit
    def run(updates, bad):
        return assail(part, updates, visible=bad, malicious=bad, kind=kind)[0]

    together = run(updates, MALICIOUS)
    for row in np.flatnonzero(MALICIOUS)[:2]:
        alone = np.arange(CLIENTS) == row
        same_bits(run(jnp.where(alone[:, None], updates, 0.0), alone)[row], together[row])


CHECKS = (
    check_shapes,
    check_separable,
    check_sees_visible_rows_only,
    check_ignores_unseen_rows,
    check_survives_bad_rows,
    check_remembers_own_rows_only,
    check_acts_or_is_refused,
    check_over_seeds,
    check_fields,
)


# --- Inside other attacks -----------------------------------------------------------------------


def wrappers(registry):
    """(attack, field) for every field in which an attack on updates holds another one."""
    for name in registry.names():
        yield from fields_for_attacks(registry.build(name))


def fields_for_attacks(outer):
    """(attack, field) for every field of an attack that holds another attack on updates."""
    for field in dataclasses.fields(outer):
        inner = getattr(outer, field.name)
        if field.metadata.get("kind") == "attack" and inner.stage == "update":
            yield outer, field.name


def remembers_messages(part) -> bool:
    """Whether the state of the attack, or of one nested in it, changes with a round's messages."""
    kind, attack = kind_of(part), Attack((part,))
    place, updates = world(kind), attack_updates(kind=kind)
    state = attack.init(*updates.shape, place.setting, place.task)
    message, everyone = Message(updates, jnp.ones(CLIENTS)), jnp.ones(CLIENTS, bool)
    after = attack.remember(state, message, everyone, attacker_view(kind=kind))
    pairs = zip(jax.tree.leaves(state), jax.tree.leaves(after), strict=True)
    return any(differs(*pair) for pair in pairs)


def wrappings(registry, part):
    """The attack inside every attack on updates that holds other attacks on updates."""
    for outer, pairs in itertools.groupby(wrappers(registry), key=lambda pair: pair[0]):
        yield dataclasses.replace(outer, **{field: few_steps(part) for _, field in pairs})


def check_wrapped(outer, field: str, part) -> None:
    """A wrapper needs what the attack in it needs, and its clients do to data what that one does.

    Its checks are run, and what it sends differs from the honest updates at its clients.
    """
    wrapped = dataclasses.replace(outer, **{field: part})
    alone, inside = Attack((part,)), Attack((wrapped,))
    for need in sorted(core.components.NEEDS):
        missing = set(core.needing((part,), need)) - set(core.needing((wrapped,), need))
        expect(not missing, f"{need} of the attack inside is lost")
    expect(set(alone.backdoors) <= set(inside.backdoors), "the backdoor inside is lost")
    expect(set(alone.data_stages) <= set(inside.data_stages), "nobody's data is poisoned")
    expect(inside.adds_copies or not alone.adds_copies, "no copies are added")
    if alone.data_stages:
        mask = jnp.asarray(MALICIOUS)
        who = np.asarray(inside.poisoned_by(mask))[inside.data_stages.index(alone.data_stages[0])]
        shares = wrapped.shares(jnp.cumsum(mask) - 1)
        same_bits(who, MALICIOUS & np.asarray(shares[field]))
        expect(who.any(), "no client poisons")
    expect(
        remembers_messages(wrapped) or not remembers_messages(part),
        "what the attack inside is to remember is lost",
    )
    checked = []
    spy = type(
        part.__class__.__name__,
        (type(part),),
        {"check": lambda self, path, setting: checked.append(path)},
    )
    spied = spy(**{f.name: getattr(part, f.name) for f in dataclasses.fields(part)})
    check_components((dataclasses.replace(outer, **{field: spied}),), "attack", Setting(CLIENTS, 5))
    expect(checked == [f"attack.{field}"], "the check of the attack inside is not run")
    if field == next(f.name for f in dataclasses.fields(outer) if "kind" in f.metadata):
        check_shapes(wrapped)
