"""FedML's `attack_args` and `defense_args` as our attacks, threats and defences.

Facts are those of FedML's code, `python/fedml/core/security/`: `constants.py`, `fedml_attacker.py`,
`fedml_defender.py` and the class of each attack and defence; and of its callers,
`server_aggregator.py` and `client_trainer.py` (cross-silo) and
`simulation/mpi/fedavg/FedAVGAggregator.py`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from fedjax_sec.core import ConfigError, shown, suggestion
from fedjax_sec.fedml.arguments import Arguments

CONVENTIONS = ("fedsecurity", "paper")
#: Its training platforms (`constants.py`); with any other name FedML stops (`runner.py`).
PLATFORMS = ("simulation", "cross_silo", "cross_device", "cross_cloud", "fedml_serving")


class Place(NamedTuple):
    """Where FedML would run: `kind`, K clients in a round of N, and whose way is followed.

    `kind`: `server`, the cross-silo server with all hooks; `mpi`, the simulation by MPI, which has
    older ones; `nowhere`, where nothing is called. `exact`: FedML's way, `convention: fedsecurity`.
    """

    kind: str
    clients: int
    registered: int
    exact: bool
    why: str = ""


def place_of(args: Arguments, clients: int, registered: int, exact: bool) -> Place:
    """Which of FedML's hooks its training platform calls."""
    platform = args.text("training_type", "simulation")
    if platform not in PLATFORMS:
        raise ConfigError(
            f"{args.at('training_type')} must be one of {', '.join(PLATFORMS)}, got "
            f"{shown(platform)}; FedML stops.{suggestion(platform, PLATFORMS)}"
        )
    backend = args.text("backend", "sp") if platform == "simulation" else ""
    optimizer = args.text("federated_optimizer", "FedAvg")
    engine = args.text("ml_engine", "torch")
    if engine in ("tf", "jax", "mxnet"):
        why = f"with ml_engine {engine} FedML switches attacks and defences off"
        return Place("nowhere", clients, registered, exact, why)
    if "ml_engine" in args:
        args.note("place", args.at("ml_engine"), "")
    if platform != "simulation" and platform != "cross_device":
        return Place("server", clients, registered, exact)
    if platform == "simulation" and (backend, optimizer) == ("MPI", "FedAvg"):
        return Place("mpi", clients, registered, exact)
    how = "on devices" if platform == "cross_device" else f"by {backend} with {optimizer}"
    why = f"training {how} ({platform}) calls no attack and no defence"
    return Place("nowhere", clients, registered, exact, why)


# --- Attacks --------------------------------------------------------------------------------------


class Attacked(NamedTuple):
    """An attack of ours, and how many malicious clients every round has."""

    spec: Any
    number: int
    start: int = 0


def attack(args: Arguments, place: Place) -> tuple[Any, dict]:
    """(our attack or None, our section `threat`)."""
    on, kind = args.get("enable_attack", False), args.text("attack_type", "None")
    if not on:
        if kind != "None":
            text = f"{kind!r} does nothing, since enable_attack is false"
            args.note("idle", args.at("attack_type"), text)
        return None, {}
    key = args.at("attack_type", "attack_args")
    if kind not in ATTACKS:
        if kind != "None":
            near = suggestion(kind, ATTACKS)
            text = f"{shown(kind)} is none of FedML's attacks, and none is carried out.{near}"
            args.note("missing", key, text)
        text = "FedML carries out no attack of this name, and says nothing"
        if not isinstance(args.get("attack_type"), str):
            text = "FedML stops with an error: with enable_attack it asks for a name"
        args.note("idle", key, text)
        return None, {}
    convert, here = ATTACKS[kind]
    made = convert(args, place)
    _say_where_it_acts(args, key, kind, here, place)
    if args.number("attack_prob", 1, only=float) == 0:
        args.note("idle", args.at("attack_prob"), "FedML never attacks")
    elif args.number("attack_prob", 1, only=float) != 1:
        args.note(
            "missing",
            args.at("attack_prob"),
            "FedML attacks in each round with that probability, here in every one "
            "(`threat.every` attacks in every so many-th)",
        )
    if made is None:
        return None, {}
    if not made.number:
        args.note("idle", key, f"{kind!r} with no malicious client does nothing")
        return None, {}
    return made.spec, _threat(made, place)


def _threat(made: Attacked, place: Place) -> dict:
    """FedML draws its attackers anew in every round, by their positions among those present."""
    number = min(made.number, place.clients)
    threat: dict = {"num_malicious": number, "redraw": True}
    if place.clients < place.registered:
        threat["per_round"] = number
    if made.start:
        threat["start"] = made.start
    return threat


def _say_where_it_acts(args: Arguments, key: str, kind: str, here: str, place: Place) -> None:
    """Notes where FedML would not carry the attack out; `here`: what its server does with it."""
    if here:
        args.note("idle", key, here)
    elif place.kind == "nowhere":
        args.note("idle", key, f"FedML does not carry it out: {place.why}")
    elif place.kind == "mpi" and kind == "label_flipping":
        text = "FedML poisons no data: its MPI simulation does not call `update_dataset` of the "
        args.note("idle", key, text + "trainer, where that is done")
    elif place.kind == "mpi" and (kind == "model_replacement" or args.get("attack_mode") == "flip"):
        text = "FedML stops with an error: its MPI simulation hands the attack no global model"
        args.note("idle", key, text)


def _byzantine(args: Arguments, place: Place) -> Attacked:
    modes = ("zero", "random", "flip")
    mode = args.text("attack_mode")
    if mode not in modes:
        raise ConfigError(
            f"{args.at('attack_mode', 'attack_args')} must be one of {modes}, got {shown(mode)}; "
            f"FedML stops.{suggestion(mode, modes)}"
        )
    return Attacked({"name": "byzantine", "mode": mode}, args.count("byzantine_client_num"))


def _label_flipping(args: Arguments, place: Place) -> Attacked | None:
    pairs = _pairs(args)
    key = args.at("ratio_of_poisoned_client", "attack_args")
    share = args.get("ratio_of_poisoned_client")
    if not isinstance(share, float) or not 0 <= share <= 1:
        raise ConfigError(
            f"{key} must be a number with a point in [0, 1], got {shown(share)}; FedML stops."
        )
    number = min(max(1, round(share * place.clients)), place.clients) if share else 0
    if number:
        args.note(
            "differs",
            key,
            f"FedML draws for every client and round by itself whether it poisons, with "
            f"probability {share:g} and the number of calls as the seed; here exactly {number} of "
            f"{place.clients} do in every round, drawn anew",
        )
    args.note(
        "differs",
        args.at("attack_type"),
        "FedML relabels a malicious client's own test data as well, which its central test set "
        "does not show; set data.local_test and attack.local_test to have it",
    )
    start, end = (
        args.number(f"poison_{name}_round_id", default, only=int)
        for name, default in (("start", 0), ("end", None))
    )
    rounds = args.count("comm_round", low=1)
    if end is not None and end < start:
        args.note("idle", args.at("poison_end_round_id"), "FedML never poisons: it ends before")
    if end is not None and end < rounds - 1:
        args.note(
            "missing", args.at("poison_end_round_id"), "here the attack goes on to the last round"
        )
    if not pairs:
        args.note("idle", args.at("original_class_list"), "no label changes")
        return None
    return Attacked({"name": "label_flip", "pairs": pairs}, number, start)


def _pairs(args: Arguments) -> list[list[int]]:
    """The classes and what becomes of them: FedML replaces one class after the other."""
    sources, targets = args.get("original_class_list"), args.get("target_class_list")
    for name, given in (("original_class_list", sources), ("target_class_list", targets)):
        if not isinstance(given, list) or not all(type(one) is int for one in given):
            raise ConfigError(
                f"{args.at(name, 'attack_args')} must be a list of classes, got {shown(given)}."
            )
    if len(sources) != len(targets) or len(set(sources)) != len(sources):
        raise ConfigError(
            f"{args.at('original_class_list')} must hold different classes, as many as "
            f"target_class_list, got {sources} and {targets}; FedML stops."
        )
    given = [[a, b] for a, b in zip(sources, targets, strict=True)]
    becomes = {}
    for label in sorted({*sources, *targets}):
        now = label
        for source, target in given:
            now = target if now == source else now
        becomes[label] = now
    pairs = [[source, becomes[source]] for source in sources if becomes[source] != source]
    if pairs != given:
        args.note(
            "differs",
            args.at("target_class_list"),
            f"FedML replaces one class after the other, so {given} comes to {pairs}",
        )
    return pairs


def _model_replacement(args: Arguments, place: Place) -> Attacked:
    key = args.at("attack_type")
    place_of_attacker = args.get("malicious_client_id")
    if "malicious_client_id" in args and not isinstance(place_of_attacker, int):
        text = (
            f"FedML reads an integer only, so {shown(place_of_attacker)} is not read; it draws one"
        )
        args.note("idle", args.at("malicious_client_id"), text)
    elif place_of_attacker is not None:
        args.note(
            "missing",
            args.at("malicious_client_id"),
            "FedML attacks with the client at that position of every round, here one is drawn",
        )
    if "attack_training_rounds" in args:
        rounds = args.get("attack_training_rounds")
        kind, text = "missing", "here every round is attacked"
        if not isinstance(args.get("poisoned_training_round"), list):
            kind = "idle"
            text = (
                "FedML reads it where poisoned_training_round is a list only, and stops with an "
                "error where that is missing; every round is attacked"
            )
        elif isinstance(rounds, list) and 1 not in rounds:
            text += "; FedML never attacks, since its counter of rounds waits for round 1"
        args.note(kind, args.at("attack_training_rounds"), text)
    bound = args.number("scale_factor_S", only=float)
    if place.exact and bound is None:
        args.note(
            "differs",
            key,
            "FedML trains no backdoor: one client of every round sends its honest update times the "
            "number of clients, which is `boost`; the paper's attack is `model_replacement`",
        )
        return Attacked("boost", 1)
    if bound is None:
        return Attacked("model_replacement", 1)
    args.note(
        "differs",
        key,
        "FedML trains no backdoor and scales the honest update to the length S; "
        "`model_replacement` trains one",
    )
    spec = {"name": "model_replacement", "mode": "train_and_scale", "max_norm": bound}
    return Attacked(spec, 1)


def _lazy_worker(args: Arguments, place: Place) -> Attacked:
    mask = args.text("attack_mode")
    masks = {"no_mask": "none", "uniform": "uniform", "random": "random", "gaussian": "gaussian"}
    if mask not in masks:
        raise ConfigError(
            f"{args.at('attack_mode', 'attack_args')} must be one of {tuple(masks)}, got "
            f"{shown(mask)}.{suggestion(mask, masks)}"
        )
    base = "global" if args.text("attack_base") == "global" else "client"
    if args.text("attack_base", base) != base:
        text = "FedML takes the clients' models for whatever is not 'global', so for "
        text += f"{shown(args.get('attack_base'))} too"
        args.note("idle", args.at("attack_base"), text)
    spec = {"name": "lazy_worker", "base": base, "mask": masks[mask]}
    if mask == "gaussian":
        mean, std = (args.get(f"gaussian_{name}") for name in ("mu", "sigma"))
        given = isinstance(mean, float) and isinstance(std, float)
        if not given:
            for name in ("gaussian_mu", "gaussian_sigma"):
                if name in args:
                    text = (
                        "FedML reads the two where both are numbers with a point; 0.0 and 1.0 here"
                    )
                    args.note("idle", args.at(name), f"{text}, as there")
        spec |= {"mean": mean, "scale": std} if given else {"mean": 0.0, "scale": 1.0}
    if place.exact:
        spec["convention"] = "fedsecurity"
    return Attacked(spec, args.count("lazy_worker_num"))


def _alie_backdoor(args: Arguments, place: Place) -> Attacked:
    spec: dict = {"name": "alie_backdoor"}
    if (z := args.number("num_std")) is not None:
        spec["z"] = z
    return Attacked(spec, args.count("backdoor_client_num"))


def _edge_case(args: Arguments, place: Place) -> Attacked:
    if args.get("backdoor_sample_percentage") is not None:
        args.note(
            "missing",
            args.at("backdoor_sample_percentage"),
            "`edge_case` trains on a set of edge-case and clean examples, `attack.num_clean`",
        )
    return Attacked("edge_case", args.count("poisoned_client_num"))


#: attack_type -> our attack on privacy.
_PRIVACY = {
    "dlg": "dlg",
    "invert_gradient": "inverting_gradients",
    "revealing_labels": "label_bag",
}


def _reconstruction(args: Arguments, place: Place) -> None:
    ours = _PRIVACY[args.text("attack_type")]
    args.note(
        "missing",
        args.at("attack_type"),
        f"reconstruction looks at a run and changes nothing: it is no attack here, but "
        f"`fedjax-sec reconstruct FILE attack={ours}`, or the monitor `reconstruction`; "
        f"the run is without an attack",
    )
    for name in ("attack_round_num", "protected_layers", "attack_iteration_idxs"):
        if args.get(name) is not None:
            text = "of the reconstruction, whose rounds and tensors are chosen there"
            args.note("missing", args.at(name), text)
    if args.get("attack_round_num") is None and args.text("attack_type") == "dlg":
        text = "FedML stops with an error: attack_round_num is missing"
        args.note("idle", args.at("attack_type"), text)


_NO_KEY = "FedML has a class for it, but no attack_type leads to it: it carries out no attack"
_DLG = (
    "FedML reconstructs nothing: it compares weights with gradients, and its dummy images require "
    "no gradient, so the optimizer never moves them"
)
#: attack_type -> (conversion, what FedML's server does with it where that is nothing). The first
#: four are FedML's keys, the others names of classes that no key leads to.
ATTACKS: dict[str, tuple[Callable, str]] = {
    "byzantine": (_byzantine, ""),
    "label_flipping": (_label_flipping, ""),
    "model_replacement": (_model_replacement, ""),
    "dlg": (_reconstruction, _DLG),
    "lazy_worker": (
        _lazy_worker,
        f"{_NO_KEY}; the class itself never acts either, since its round counter stays at 1",
    ),
    "backdoor": (_alie_backdoor, _NO_KEY),
    "edge_case_backdoor": (_edge_case, _NO_KEY),
    "invert_gradient": (_reconstruction, _NO_KEY),
    "revealing_labels": (_reconstruction, _NO_KEY),
}


# --- Defences -------------------------------------------------------------------------------------


def defense(args: Arguments, place: Place) -> Any:
    """Our defence."""
    on, kind = args.get("enable_defense", False), args.text("defense_type", "None")
    if not on:
        if kind != "None":
            text = f"{kind!r} does nothing, since enable_defense is false"
            args.note("idle", args.at("defense_type"), text)
        return "mean"
    key = args.at("defense_type", "defense_args")
    if kind not in DEFENSES:
        raise ConfigError(
            f"{key}: {shown(kind)} is none of FedML's defences, and FedML stops."
            f"{suggestion(kind, DEFENSES)} Known: {', '.join(DEFENSES)}."
        )
    convert, here, older = DEFENSES[kind]
    spec = convert(args, place)
    if here.startswith("FedML stops"):
        args.note("idle", key, here)
    elif place.kind == "nowhere":
        args.note("idle", key, f"FedML does not carry it out: {place.why}")
    elif place.kind == "server" and here:
        args.note("idle", key, here)
    elif place.kind == "mpi" and not older:
        text = "FedML stops with an error: its MPI simulation calls `run`, which the class has not"
        args.note("idle", key, text)
    return spec


def _bound(args: Arguments, place: Place) -> int:
    """f, `byzantine_client_num`, which attack and defence share."""
    if "byzantine_client_num" not in args:
        args.note(
            "idle",
            args.at("defense_type"),
            "FedML stops with an error: byzantine_client_num is missing; here it is 1",
        )
    return args.count("byzantine_client_num", 1)


def _missing(args: Arguments, key: str, default: Any) -> Any:
    """A value without which FedML stops."""
    value = args.number(key)
    if value is None:
        text = f"FedML stops with an error: {key} is missing; here it is {default}"
        args.note("idle", args.at("defense_type"), text)
        return default
    return value


def _clip(args: Arguments, place: Place) -> Any:
    return [{"name": "clip_norm", "max_norm": _missing(args, "norm_bound", 1.0)}, "mean"]


def _rlr(args: Arguments, place: Place) -> Any:
    args.note(
        "differs",
        args.at("defense_type"),
        "FedML takes the signs of the clients' models, `rlr` those of their updates, as the paper",
    )
    return ["mean", {"name": "rlr", "threshold": float(_missing(args, "robust_threshold", 4))}]


def _krum(args: Arguments, place: Place) -> Any:
    bad, chosen = _bound(args, place), args.number("krum_param_m", 1, only=int)
    if 2 * bad + 2 > place.clients - chosen:
        args.note(
            "idle",
            args.at("krum_param_m") if "krum_param_m" in args else args.at("defense_type"),
            f"FedML stops with an error: it asks for 2 f + 2 <= K - m, with f = {bad}, "
            f"m = {chosen}, K = {place.clients}; here 2 f + 2 < K is asked for",
        )
    if chosen == 1:
        return {"name": "krum", "num_byzantine": bad}
    rule = {"name": "multi_krum", "num_byzantine": bad, "num_selected": chosen}
    if place.exact:
        return rule | {"weighted": True}  # by FedML's server, behind its defence
    args.note(
        "differs",
        args.at("defense_type"),
        "FedML averages the chosen models by their numbers of examples; the rule here is the "
        "paper's, with equal weights",
    )
    return rule


def _slsgd(args: Arguments, place: Place) -> Any:
    option, trimmed = args.get("option_type"), args.count("trim_param_b")
    if option not in (1, 2):
        raise ConfigError(
            f"{args.at('option_type', 'defense_args')} must be 1 or 2, got {shown(option)}; FedML "
            f"stops."
        )
    if option == 1 and trimmed:
        args.note("idle", args.at("trim_param_b"), "option_type 1 trims nothing")
    spec = {
        "name": "slsgd",
        "alpha": _missing(args, "alpha", 1.0),
        "num_byzantine": trimmed if option == 2 else 0,
    }
    return _as_fedml(args, place, spec, "trims whole clients by their numbers of examples")


def _trimmed_mean(args: Arguments, place: Place) -> Any:
    trimmed = int(_missing(args, "beta", 0.1) * place.clients)
    if not place.exact:
        return {"name": "trimmed_mean", "num_byzantine": trimmed}
    spec = {"name": "slsgd", "alpha": 1.0, "num_byzantine": trimmed}
    return _as_fedml(
        args,
        place,
        spec,
        "trims whole clients by their numbers of examples, not coordinates: `slsgd` of weight 1",
    )


def _median_of_means(args: Arguments, place: Place) -> Any:
    bad, batches = _bound(args, place), int(_missing(args, "batch_num", 1))
    if 2 * bad >= batches:
        args.note(
            "differs",
            args.at("batch_num", "defense_args"),
            f"the paper asks for 2 f < k, which k = {batches} batches and f = {bad} do not meet; "
            f"FedML asks for nothing",
        )
    spec = {"name": "median_of_means", "num_byzantine": bad, "num_batches": batches}
    return _as_fedml(args, place, spec, _SETS)


def _cclip(args: Arguments, place: Place) -> Any:
    radius, size = args.number("tau", 10), int(_missing(args, "bucket_size", 2))
    if radius <= 0:
        args.note("idle", args.at("tau"), f"FedML takes 10 in place of {radius}")
        radius = 10
    if not place.exact:
        rule = {"name": "centered_clipping", "radius": radius}
        return [{"name": "bucketing", "size": size}, rule]
    spec = {"name": "centered_clipping", "radius": radius, "bucket_size": size}
    return _as_fedml(
        args, place, spec, "takes a bucket drawn at random as the centre, and does not shuffle"
    )


def _median(args: Arguments, place: Place) -> Any:
    return {"name": "median", "middle": "lower"} if place.exact else "median"


def _rfa(args: Arguments, place: Place) -> Any:
    return _as_fedml(args, place, {"name": "geometric_median"}, _SETS)


def _foolsgold(args: Arguments, place: Place) -> Any:
    return _as_fedml(
        args, place, {"name": "foolsgold"}, "compares the last layers of models, not updates"
    )


def _crfl(args: Arguments, place: Place) -> Any:
    growth = {"mnist": (0.1, 2.0), "emnist": (0.25, 4.0), "lending_club_loan": (0.025, 2.0)}
    data, cap = args.text("dataset"), args.number("clip_threshold")
    if data in growth:
        slope, offset = growth[data]
    elif cap is not None:
        slope, offset = 0.0, float(cap)
    else:
        raise ConfigError(
            f"{args.at('defense_type')}: crfl needs clip_threshold, since FedML knows a norm that "
            f"grows for {', '.join(growth)} only, and the data set is {shown(data)}; FedML stops."
        )
    stage = {"name": "crfl", "slope": slope, "offset": offset, "cap": cap}
    return ["mean", stage | {"std": args.number("sigma", 0.01, only=float)}]


def _weak_dp(args: Arguments, place: Place) -> Any:
    spec = {"name": "weak_dp", "std": _missing(args, "stddev", 0.025)}
    return _as_fedml(args, place, spec, "adds noise to every client's model and clips nothing")


def _anomaly(args: Arguments, place: Place) -> Any:
    spec = {"name": "cross_round", "min_cosine": _missing(args, "cosine_similarity_bound", 0.5)}
    text = "remembers by the position in the round, and takes no zero model for a suspect"
    return _as_fedml(args, place, spec, text)


def _three_sigma(variant: str) -> Callable:
    def convert(args: Arguments, place: Place) -> Any:
        spec: dict = {"name": "three_sigma", "variant": variant}
        if variant == "krum":
            return spec
        rounds = args.number("pretraining_round_num", 2, only=int)
        if rounds != 2:
            spec["calibration_rounds"] = max(1, rounds - 1)
        if rounds < 2:
            does = "drops nobody, ever" if variant == "foolsgold" else "drops all, and then stops"
            text = f"without a round to learn from FedML's bounds stay 0: it {does}; here 1 round"
            args.note("idle", args.at("pretraining_round_num"), text)
        higher = args.get("to_keep_higher_scores", variant == "foolsgold")
        if not isinstance(higher, bool):
            text = f"FedML reads true and false only, so {shown(higher)} is not read"
            args.note("idle", args.at("to_keep_higher_scores"), text)
        elif higher is not (variant == "foolsgold"):
            text = f"`three_sigma` keeps {'high' if variant == 'foolsgold' else 'low'} scores"
            args.note("missing", args.at("to_keep_higher_scores"), text)
        if args.number("bucketing_batch_size", 1, only=int) != 1:
            text = "survivors are averaged, not in buckets"
            args.note("missing", args.at("bucketing_batch_size"), text)
        return spec

    return convert


def _residual(args: Arguments, place: Place) -> Any:
    lines = {"median": "median", "theilsen": "theil_sen", "gaussian": "repeated_median"}
    mode = args.text("mode", "median")
    if mode not in lines:
        raise ConfigError(
            f"{args.at('mode')} must be one of {tuple(lines)}, got {shown(mode)}."
            f"{suggestion(mode, lines)}"
        )
    width, threshold = args.number("lambda_param", 2), args.number("thresh", 0.1)
    spec = {"name": "residual_reweighting", "width": width, "threshold": threshold}
    if place.exact:
        spec |= {"line": lines[mode]} | ({"weights": "gaussian"} if mode == "gaussian" else {})
    return spec


def _wbc(args: Arguments, place: Place) -> Any:
    for name in ("client_idx", "batch_idx"):
        if args.get(name) is not None:
            args.note("missing", args.at(name), "`fl_wbc` acts in every client and step")
    args.note(
        "differs",
        args.at("defense_type"),
        "FedML perturbs one client's model on the server with noise of strength 1; `fl_wbc` acts "
        "in local training, as the paper has it",
    )
    return ["fl_wbc", "mean"]


def _bulyan(args: Arguments, place: Place) -> Any:
    return {"name": "bulyan", "num_byzantine": _bound(args, place)}


def _refused(text: str) -> Callable:
    def convert(args: Arguments, place: Place) -> Any:
        args.note("missing", args.at("defense_type"), text)
        return "mean"

    return convert


def _as_fedml(args: Arguments, place: Place, spec: dict, way: str) -> dict:
    """The rule as FedML computes it, with a note on how that is."""
    if not place.exact:
        args.note("differs", args.at("defense_type"), f"FedML {way}; the rule here is the paper's")
        return spec
    args.note(
        "differs",
        args.at("defense_type"),
        f"`convention: fedsecurity` follows FedML, which {way}; without it the rule is the paper's",
    )
    return spec | {"convention": "fedsecurity"}


_SETS = (
    "holds the weights in a set, so that equal numbers of examples leave one of them and the "
    "result is the first model"
)
_STOPS = "FedML stops: no defense_type leads to its class"
_NO_HOOK = "FedML does nothing: no hook of its server lists it (`fedml_defender.py`)"
#: defense_type -> (conversion, what FedML's server does with it where that is nothing, whether its
#: MPI simulation carries it out). Up to `dp` these are FedML's keys, the others classes without.
DEFENSES: dict[str, tuple[Callable, str, bool]] = {
    "norm_diff_clipping": (_clip, "", False),
    "robust_learning_rate": (_rlr, _NO_HOOK, True),
    "krum": (_krum, "", False),
    "multikrum": (_krum, "", False),
    "slsgd": (_slsgd, "", False),
    "geo_median": (_median_of_means, "", False),
    "cclip": (_cclip, "", False),
    "weak_dp": (_weak_dp, _NO_HOOK, True),
    "rfa": (_rfa, "", False),
    "foolsgold": (_foolsgold, "", False),
    "crfl": (_crfl, "", False),
    "3sigma": (_three_sigma("krum"), "", False),
    "3sigma_geo": (_three_sigma("geometric_median"), "", False),
    "3sigma_foolsgold": (_three_sigma("foolsgold"), "", False),
    "trimmed_mean": (_trimmed_mean, "", False),
    "wise_median": (_median, "", False),
    "anomaly_detection": (_anomaly, "", False),
    "diff_clipping": (_clip, "FedML stops: the name is declared, but it leads to no class", False),
    "dp": (
        _refused(
            "differential privacy has a section of its own in FedML, dp_args, and no counterpart"
        ),
        "FedML stops: the name is declared, but it leads to no class",
        False,
    ),
    "bulyan": (_bulyan, _STOPS, False),
    "residual_based_reweighting": (_residual, _STOPS, False),
    "wbc": (_wbc, _STOPS, False),
    "soteria": (
        _refused("soteria is a stage of local training here, `defense: [soteria, mean]`"),
        _STOPS,
        False,
    ),
}


def mark_rest(args: Arguments) -> None:
    """Notes the keys of both sections that neither attack nor defence has read."""
    for kind in ("attack", "defense"):
        off = not args.get(f"enable_{kind}", False)
        for key in args.unread():
            if args.at(key).startswith(f"{kind}_args."):
                args.get(key)
                text = f"the {kind} is switched off" if off else f"this {kind} does not read it"
                args.note("idle", args.at(key), text)
