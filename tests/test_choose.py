"""The pages on choosing name every component, and say of it what the code and the results say."""

import csv
import json
import re
from pathlib import Path

import pytest
from pages import DOCS, between, code, section, tables

from fedjax_sec.core import ConfigError, Setting, registry

ROOT = Path(__file__).parents[1]
DEFENSE, ATTACK = "choose/defense.md", "choose/attack.md"
#: The letter of a bound -> the field that it bounds.
LETTERS = {"f": "num_byzantine", "b": "num_removed", "s": "size", "theta": "threshold"}


def by_first(page: str, *titles: str):
    """The tables of a page whose header begins with one of the titles."""
    return [table for table in tables(page) if table.header[0] in titles]


def first(page: str, *titles: str) -> list[str]:
    return [code(row[0])[0] for table in by_first(page, *titles) for row in table.rows]


def test_every_defence_has_a_row_of_its_stage():
    rules, around, training = by_first(DEFENSE, "rule", "stage")
    stages = {name: "aggregate" for name in rules.column("rule")}
    stages |= around.column("where") | {name: "client" for name in training.column("stage")}
    assert stages == {name: registry.defenses.get(name).stage for name in registry.defenses.names()}
    assert len(first(DEFENSE, "rule", "stage")) == len(stages)  # nobody twice


def holds(formula: str, letter: str, value: int, clients: int) -> bool:
    """Whether `4 f + 3 <= K` holds."""
    python = re.sub(r"(\d) (?=[a-z])", r"\1 * ", formula)
    return eval(python, {"__builtins__": {}}, {letter: value, "K": clients})


def accepted(name: str, fields: dict, clients: int) -> bool:
    spec = {"name": name} | fields
    try:
        registry.defenses.build(spec).check("defense", Setting(clients))
    except ConfigError:
        return False
    return True


BOUNDS = {
    name: cell
    for table in by_first(DEFENSE, "rule", "stage")
    if "bound" in table.header
    for name, cell in table.column("bound").items()
}


@pytest.mark.parametrize("name", BOUNDS)
def test_the_bound_is_the_one_that_is_checked(name):
    formula, fields = BOUNDS[name], registry.defenses.get(name).__dataclass_fields__
    if formula == "none":
        assert not {"num_byzantine", "num_removed"} & set(fields)
    elif least := re.match(r"at least (\d) clients", formula):
        assert accepted(name, {}, int(least[1])) and not accepted(name, {}, int(least[1]) - 1)
    else:
        letter = re.search(r"[a-z]+", code(formula)[0])[0]
        for clients in range(7, 15):
            for value in range(1, clients + 2):
                bounded = holds(code(formula)[0], letter, value, clients)
                assert accepted(name, {LETTERS[letter]: value}, clients) == bounded, (
                    value,
                    clients,
                )


def test_the_times_are_those_of_the_benchmark():
    rows = json.loads((ROOT / "benchmarks/results/aggregators_cpu.json").read_text())["rows"]
    measured = {row["rule"]: f"{row['ours ms']:.3g}" for row in rows if row["D"] == 1_000_000}
    (rules,) = by_first(DEFENSE, "rule")
    times = rules.column("time")
    assert times == {name: measured.get(name, "-") for name in times}


#: The stage of local training -> its row in the results.
TRADEOFF = {
    "gradient_noise": "noise 1e-2",
    "gradient_pruning": "pruning 0.9",
    "gradient_sign": "sign",
    "gradient_clipping": "clipping 0.05",
    "soteria": "Soteria 0.6",
    "outpost": "Outpost",
}


def test_the_numbers_of_local_training_are_the_results():
    with open(DOCS / "results/reconstruction/tradeoff/tradeoff.csv") as file:
        rows = [row for row in csv.DictReader(file) if row["attack"] == "no attack"]
    measured = {row["defence"]: row for row in rows}
    table = by_first(DEFENSE, "stage")[-1]
    for column, key in (("identified (%)", "identified: ours"), ("accuracy (%)", "accuracy: ours")):
        for name, cell in table.column(column).items():
            ours = measured[TRADEOFF[name]][key] if name in TRADEOFF else None
            assert cell == "-" if ours is None else abs(float(cell) - float(ours)) <= 0.051


@pytest.mark.parametrize("heading", ["Accuracy", "Backdoor success"])
def test_the_arena_is_the_one_of_the_results(heading):
    shown = between(DEFENSE, f"arena {heading.lower()}")
    assert shown.startswith("| attack") and shown in section("results/choose/arena.md", heading)


def test_every_attack_has_a_row_of_its_stage():
    update, data, evasion, privacy = by_first(ATTACK, "attack")
    for table, stage in ((update, "update"), (data, "data")):
        names = {code(row[0])[0] for row in table.rows}
        known = registry.attacks.names()
        assert names == {name for name in known if registry.attacks.get(name).stage == stage}
    assert {code(row[0])[0] for row in evasion.rows} == set(registry.evasions.names())
    assert {code(row[0])[0] for row in privacy.rows} == set(registry.privacy_attacks.names())


def test_which_attacks_can_act_apart():
    update = by_first(ATTACK, "attack")[0]
    for name, cell in update.column("apart").items():
        spec = {"name": name} | ({"solo": "zero"} if name == "hybrid" else {})
        assert cell == ("yes" if registry.attacks.build(spec).separable else "no"), name


@pytest.mark.parametrize(
    "page, title", [(DEFENSE, "What ours is not"), (ATTACK, "Attacks that ours lacks")]
)
def test_what_is_said_to_be_missing_is(page, title):
    sentence = section(page, title).partition(": ")[2].partition(".")[0]
    missing = {re.sub(r"\W", "", name).lower() for name in re.split(r"[,()]", sentence)} - {""}
    known = {name.replace("_", "") for kind in registry.KINDS.values() for name in kind.names()}
    assert len(missing) > 5 and not missing & known
