"""Configurations of FedML's FedSecurity as ours: every example, every key, every trap."""

import re
import sys
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from fedjax_sec import fedml
from fedjax_sec.cli import app
from fedjax_sec.core import ConfigError, registry
from fedjax_sec.fedml import security
from fedjax_sec.runs import config as config_lib

KRUM = {"name": "multi_krum", "num_byzantine": 1, "num_selected": 5}


def fedml_config(**changes):
    """FedML's example of ResNet20 on CIFAR-10; `changes` are keys of whatever section."""
    config = {
        "common_args": {
            "training_type": "cross_silo",
            "scenario": "horizontal",
            "using_mlops": False,
            "random_seed": 0,
            "config_version": "release",
        },
        "environment_args": {"bootstrap": "config/bootstrap.sh"},
        "data_args": {
            "dataset": "cifar10",
            "data_cache_dir": "~/.cache/fedml_data",
            "partition_method": "hetero",
            "partition_alpha": 0.5,
        },
        "model_args": {
            "model": "resnet20",
            "model_file_cache_folder": "./model_file_cache",
            "global_model_file_path": "./model_file_cache/global_model.pt",
        },
        "train_args": {
            "federated_optimizer": "FedAvg",
            "client_id_list": None,
            "client_num_in_total": 10,
            "client_num_per_round": 10,
            "comm_round": 100,
            "epochs": 1,
            "batch_size": 10,
            "client_optimizer": "sgd",
            "learning_rate": 0.03,
            "weight_decay": 0.001,
        },
        "validation_args": {"frequency_of_the_test": 1},
        "device_args": {"worker_num": 10, "using_gpu": True, "gpu_mapping_file": "gpu.yaml"},
        "comm_args": {"backend": "MPI"},
        "tracking_args": {"enable_wandb": False, "wandb_project": "fedml"},
        "attack_args": {"enable_attack": False},
        "defense_args": {"enable_defense": False},
    }
    for key, value in changes.items():
        section = next((name for name, part in config.items() if key in part), None)
        config[section or HOME.get(key, "attack_args")][key] = value
    return {name: {k: v for k, v in part.items() if v is not ...} for name, part in config.items()}


#: Where keys stand that the example above lacks; all others are of the attack.
HOME = {
    "server_lr": "train_args",
    "server_optimizer": "train_args",
    "server_momentum": "train_args",
    "fedprox_mu": "train_args",
    "enable_defense": "defense_args",
    "defense_type": "defense_args",
    "krum_param_m": "defense_args",
    "bucket_size": "defense_args",
    "tau": "defense_args",
    "sigma": "defense_args",
    "norm_bound": "defense_args",
    "batch_num": "defense_args",
    "beta": "defense_args",
    "trim_param_b": "defense_args",
    "alpha": "defense_args",
    "option_type": "defense_args",
    "robust_threshold": "defense_args",
    "stddev": "defense_args",
    "cosine_similarity_bound": "defense_args",
    "clip_threshold": "defense_args",
    "pretraining_round_num": "defense_args",
    "to_keep_higher_scores": "defense_args",
    "bucketing_batch_size": "defense_args",
    "mode": "defense_args",
}


def attacked(kind, **keys):
    return fedml_config(enable_attack=True, attack_type=kind, **keys)


def defended(kind, **keys):
    return fedml_config(enable_defense=True, defense_type=kind, **keys)


def said(made, kind=None):
    """The notes' texts in one, of a kind."""
    return "\n".join(str(note) for note in made.notes if kind in (None, note.kind))


# --- FedML's own examples -------------------------------------------------------------------------

RULES = {
    "none": {},
    "foolsgold": {"enable_defense": True, "defense_type": "foolsgold"},
    "krum_m5": {"enable_defense": True, "defense_type": "krum", "krum_param_m": 5},
    "krum_m50": {"enable_defense": True, "defense_type": "krum", "krum_param_m": 50},
    "krum": {"enable_defense": True, "defense_type": "krum"},
    "rfa": {"enable_defense": True, "defense_type": "rfa"},
}
BYZANTINE = {"enable_attack": True, "attack_type": "byzantine", "byzantine_client_num": 1}
FLIPPING = {
    "enable_attack": True,
    "attack_type": "label_flipping",
    "original_class_list": [3, 2],
    "target_class_list": [9, 1],
    "ratio_of_poisoned_client": 0.1,
}
MNIST = {"dataset": "mnist", "model": "lr", "comm_round": 10, "client_num_in_total": 1000}
#: Keys of the 82 files below `examples/federate/security` that are not those of `fedml_config`,
#: each kind once: names of folders and files, and what is in them.
EXAMPLES = {
    **{
        f"cv/{mode}/{rule}": {**BYZANTINE, "attack_mode": mode, **RULES[rule]}
        for mode in ("random", "zero", "flip")
        for rule in ("none", "foolsgold", "krum_m5", "rfa")
    },
    **{
        f"cv/label_flipping/{r}": FLIPPING | RULES[r]
        for r in ("none", "foolsgold", "krum_m5", "rfa")
    },
    **{
        f"cv/benign/{rule}": RULES[rule] | {"byzantine_client_num": 1}
        for rule in ("none", "foolsgold", "krum_m5", "rfa")
    },
    **{
        f"cv/varying_adv_num/{f}": {
            **BYZANTINE,
            "attack_mode": "random",
            "byzantine_client_num": f,
            **RULES["krum"],
        }
        for f in (1, 2, 3)
    },
    **{
        f"cv/100clients/{method}/{rule}": {
            **BYZANTINE,
            "attack_mode": "random",
            "byzantine_client_num": 10,
            "client_num_in_total": 100,
            "client_num_per_round": 100,
            "partition_method": method,
            **RULES[rule],
        }
        for method in ("hetero", "homo")
        for rule in ("none", "foolsgold", "krum_m50", "rfa")
    },
    **{
        f"resnet56/{rule}": {
            **BYZANTINE,
            "attack_mode": "random",
            "dataset": "cifar100",
            "model": "resnet56",
            **RULES[rule],
        }
        for rule in ("none", "krum_m5")
    },
    "cnn": BYZANTINE | {"attack_mode": "random", "dataset": "femnist", "model": "cnn"},
    "nlp": BYZANTINE
    | {
        "attack_mode": "random",
        "dataset": "shakespeare",
        "model": "rnn",
        "random_seed": 100,
        "batch_size": 32,
        **RULES["krum_m5"],
    },
    "mnist/byzantine": MNIST | BYZANTINE | {"attack_mode": "random", "client_num_per_round": 4},
    "mnist/cclip": MNIST
    | {"client_num_in_total": 4, "client_num_per_round": 4}
    | {"enable_defense": True, "defense_type": "cclip", "bucket_size": 2},
    "mnist/crfl": MNIST | {"enable_defense": True, "defense_type": "crfl", "sigma": 0.02},
    "mnist/diff_clipping": MNIST
    | {"enable_defense": True, "defense_type": "diff_clipping", "norm_bound": 0.33},
    "mnist/geometric_median": MNIST
    | {"client_num_in_total": 4, "client_num_per_round": 4, "byzantine_client_num": 1}
    | {"enable_defense": True, "defense_type": "geo_median", "batch_num": 2},
    "mnist/krum": MNIST | RULES["krum"] | {"client_num_per_round": 6, "byzantine_client_num": 1},
    "mnist/multikrum": MNIST
    | {"byzantine_client_num": 1}
    | {"enable_defense": True, "defense_type": "multikrum", "krum_param_m": 2},
    "mnist/slsgd": MNIST
    | {"enable_defense": True, "defense_type": "slsgd", "alpha": 0.95}
    | {"trim_param_b": 1, "option_type": 2},
    "mnist/trimmed_mean": MNIST
    | {"enable_defense": True, "defense_type": "trimmed_mean", "beta": 0.25},
    "mnist/wise_median": MNIST
    | {"client_num_in_total": 4, "client_num_per_round": 4}
    | {"enable_defense": True, "defense_type": "wise_median"},
    "mnist/anomaly": MNIST
    | BYZANTINE
    | {"attack_mode": "random", "byzantine_client_num": 5, "client_num_per_round": 20}
    | {"enable_defense": True, "defense_type": "anomaly_detection"}
    | {"cosine_similarity_bound": 0.5},
    "dlg": {
        "dataset": "cifar100",
        "model": "resnet56",
        "client_num_in_total": 1000,
        "client_num_per_round": 4,
        "partition_method": "homo",
        "enable_attack": True,
        "attack_type": "dlg",
    },
    "model_replacement": {
        "model": "lr",
        "client_num_in_total": 4,
        "client_num_per_round": 4,
        "attack_type": "model_replacement",
        "byzantine_client_num": 1,
    },
}


@pytest.mark.parametrize("convention", security.CONVENTIONS)
@pytest.mark.parametrize("name", EXAMPLES)
def test_the_examples_of_fedml_load(name, convention, tmp_path):
    path = tmp_path / "fedml_config.yaml"
    path.write_text(yaml.safe_dump(fedml_config(**EXAMPLES[name]), sort_keys=False))
    made = fedml.convert(path, convention=convention)
    if name == "mnist/geometric_median":  # f = 1 and k = 2: Chen et al. ask for more batches
        assert "asks for 2 f < k, which k = 2 batches and f = 1 do not meet" in said(made)
        if convention == "paper":
            with pytest.raises(ConfigError, match="needs 2 f < k <= K"):
                made.experiment()
            return
    experiment = made.experiment()
    assert experiment.rounds == EXAMPLES[name].get("comm_round", 100)
    assert experiment.clients_per_round == EXAMPLES[name].get("client_num_per_round", 10)
    written = tmp_path / "ours.yaml"
    written.write_text(made.to_yaml(path.name))
    assert config_lib.load(written).to_dict() == experiment.to_dict()


def test_the_first_example_is_the_papers_default():
    made = fedml.convert(fedml_config(**FLIPPING, **RULES["krum_m5"], byzantine_client_num=1))
    assert made.spec == {
        "data": {
            "name": "cifar10",
            "num_clients": 10,
            "partition": {
                "name": "dirichlet",
                "alpha": 0.5,
                "min_examples": 10,
                "balanced": True,
            },
        },
        "model": {"name": "fedml_resnet", "depth": 20},
        "client": {
            "name": "sgd",
            "epochs": 1,
            "batch_size": 10,
            "augmentation": "fedml_cifar",
            "optimizer": {"name": "sgd", "learning_rate": 0.03},
        },
        "threat": {"num_malicious": 1, "redraw": True},
        "attack": {"name": "label_flip", "pairs": [[3, 9], [2, 1]]},
        "defense": KRUM | {"weighted": True},
        "evaluation": {"every": 1},
        "rounds": 100,
        "seed": 0,
    }


def test_stackoverflow_is_refused_by_name():
    with pytest.raises(ConfigError, match="data_args.dataset: stackoverflow_lr has no counterpart"):
        fedml.convert(fedml_config(dataset="stackoverflow_lr", model="lr"))


# --- Attacks and threats --------------------------------------------------------------------------


def test_every_attack_of_fedml_is_ours_or_refused():
    keys = {
        "byzantine": {"attack_mode": "zero", "byzantine_client_num": 2},
        "label_flipping": FLIPPING,
        "lazy_worker": {"attack_mode": "no_mask", "attack_base": "client", "lazy_worker_num": 1},
        "backdoor": {"backdoor_client_num": 1, "num_std": 1.5},
        "edge_case_backdoor": {"poisoned_client_num": 1, "backdoor_sample_percentage": 0.1},
    }
    ours = {}
    for kind in security.ATTACKS:
        given = {k: v for k, v in keys.get(kind, {}).items() if not k.endswith(("attack", "type"))}
        made = fedml.convert(attacked(kind, **given))
        spec = made.spec["attack"]
        ours[kind] = spec["name"] if isinstance(spec, dict) else spec
        if spec is None:
            assert "`fedjax-sec reconstruct FILE attack=" in said(made, "missing")
            assert "threat" not in made.spec
        else:
            assert ours[kind] in registry.attacks.names()
    assert ours == {
        "byzantine": "byzantine",
        "label_flipping": "label_flip",
        "model_replacement": "boost",
        "dlg": None,
        "lazy_worker": "lazy_worker",
        "backdoor": "alie_backdoor",
        "edge_case_backdoor": "edge_case",
        "invert_gradient": None,
        "revealing_labels": None,
    }


@pytest.mark.parametrize(
    ("kind", "keys", "text"),
    [
        ("dlg", {"attack_round_num": 300}, "FedML reconstructs nothing"),
        ("dlg", {}, "FedML stops with an error: attack_round_num is missing"),
        (
            "lazy_worker",
            {"attack_mode": "no_mask", "lazy_worker_num": 1},
            "never acts either, since its round counter stays at 1",
        ),
        ("edge_case_backdoor", {"poisoned_client_num": 1}, "no attack_type leads to it"),
        ("invert_gradient", {}, "no attack_type leads to it"),
        ("byzantin", {}, "FedML carries out no attack of this name, and says nothing"),
        ("None", {}, "FedML carries out no attack of this name, and says nothing"),
    ],
)
def test_attacks_that_fedml_never_carries_out_are_said(kind, keys, text):
    assert text in said(fedml.convert(attacked(kind, **keys)), "idle")


def test_attacks_that_act_are_not_called_idle():
    made = fedml.convert(attacked("byzantine", attack_mode="flip", byzantine_client_num=1))
    assert "attack" not in said(made, "idle")
    assert "Did you mean 'byzantine'" in said(fedml.convert(attacked("byzantin")), "missing")


def test_a_switched_off_attack_is_none():
    made = fedml.convert(
        fedml_config(attack_type="byzantine", attack_mode="zero", byzantine_client_num=3)
    )
    assert made.spec["attack"] is None and "threat" not in made.spec
    notes = said(made, "idle")
    assert "attack_type: 'byzantine' does nothing, since enable_attack is false" in notes
    assert "attack_args.attack_mode: the attack is switched off" in notes


def test_attackers_are_redrawn_and_counted_in_a_round():
    byzantine = {"attack_mode": "random", "byzantine_client_num": 3}
    made = fedml.convert(attacked("byzantine", **byzantine))
    assert made.spec["threat"] == {"num_malicious": 3, "redraw": True}
    assert "server" not in made.spec
    made = fedml.convert(attacked("byzantine", **byzantine, client_num_in_total=40))
    assert made.spec["threat"] == {"num_malicious": 3, "redraw": True, "per_round": 3}
    assert made.spec["server"] == {"clients_per_round": 10}
    made = fedml.convert(attacked("byzantine", **byzantine | {"byzantine_client_num": 30}))
    assert made.spec["threat"]["num_malicious"] == 10  # FedML takes all that are there
    made = fedml.convert(attacked("byzantine", **byzantine | {"byzantine_client_num": 0}))
    assert made.spec["attack"] is None and "no malicious client" in said(made, "idle")


def test_label_flips_are_those_that_come_about_one_after_the_other():
    def pairs(sources, targets):
        keys = FLIPPING | {"original_class_list": sources, "target_class_list": targets}
        return fedml.convert(fedml_config(**keys))

    assert pairs([3, 2], [9, 1]).spec["attack"]["pairs"] == [[3, 9], [2, 1]]
    swapped = pairs([3, 9], [9, 3])  # 3 -> 9 -> 3, and 9 -> 3
    assert swapped.spec["attack"]["pairs"] == [[9, 3]]
    assert "[[3, 9], [9, 3]] comes to [[9, 3]]" in said(swapped, "differs")
    chain = pairs([1, 2, 3], [2, 3, 4])  # all end at 4
    assert chain.spec["attack"]["pairs"] == [[1, 4], [2, 4], [3, 4]]
    back = pairs([2, 1], [3, 2])  # 2 -> 3, then 1 -> 2
    assert back.spec["attack"]["pairs"] == [[2, 3], [1, 2]] and "comes to" not in said(back)
    same = pairs([4], [4])
    assert same.spec["attack"] is None and "no label changes" in said(same, "idle")
    with pytest.raises(ConfigError, match="different classes, as many as"):
        pairs([1, 1], [2, 3])
    with pytest.raises(ConfigError, match="target_class_list must be a list of classes"):
        pairs([1], "nine")


def test_label_flips_begin_and_are_counted():
    keys = FLIPPING | {"ratio_of_poisoned_client": 0.4, "poison_start_round_id": 20}
    made = fedml.convert(fedml_config(**keys, poison_end_round_id=50))
    assert made.spec["threat"] == {"num_malicious": 4, "redraw": True, "start": 20}
    assert "exactly 4 of 10" in said(made, "differs")
    assert "poison_end_round_id: here the attack goes on" in said(made, "missing")
    made = fedml.convert(fedml_config(**FLIPPING, poison_end_round_id=99))
    assert "poison_end_round_id" not in said(made)
    for share in (1, 1.5, None):  # FedML wants a float
        with pytest.raises(ConfigError, match="ratio_of_poisoned_client must be a number with"):
            fedml.convert(fedml_config(**FLIPPING | {"ratio_of_poisoned_client": share}))
    made = fedml.convert(fedml_config(**FLIPPING | {"ratio_of_poisoned_client": 0.0}))
    assert made.spec["attack"] is None and "exactly" not in said(made)


def test_model_replacement_is_boosting_in_fedml():
    made = fedml.convert(attacked("model_replacement", byzantine_client_num=3))
    assert made.spec["attack"] == "boost"
    assert made.spec["threat"] == {"num_malicious": 1, "redraw": True}  # one, whatever the number
    assert "FedML trains no backdoor" in said(made, "differs")
    paper = fedml.convert(attacked("model_replacement"), convention="paper")
    assert paper.spec["attack"] == "model_replacement"
    made = fedml.convert(attacked("model_replacement", scale_factor_S=2.5))
    assert (
        made.spec["attack"]["mode"] == "train_and_scale" and made.spec["attack"]["max_norm"] == 2.5
    )
    made = fedml.convert(attacked("model_replacement", scale_factor_S=2))  # no float: not read
    assert made.spec["attack"] == "boost" and "not read" in said(made, "idle")
    rounds = {"attack_training_rounds": [5, 6], "poisoned_training_round": [5]}
    assert "never attacks" in said(
        fedml.convert(attacked("model_replacement", **rounds)), "missing"
    )
    made = fedml.convert(attacked("model_replacement", attack_training_rounds=[1]))
    assert "stops with an error where that is missing" in said(made, "idle")
    made = fedml.convert(attacked("model_replacement", malicious_client_id=2))
    assert "malicious_client_id" in said(made, "missing")


@pytest.mark.parametrize(
    ("keys", "spec"),
    [
        ({"attack_mode": "no_mask", "attack_base": "global"}, {"base": "global", "mask": "none"}),
        (
            {"attack_mode": "uniform", "attack_base": "client"},
            {"base": "client", "mask": "uniform"},
        ),
        (
            {"attack_mode": "gaussian", "gaussian_mu": 0.5, "gaussian_sigma": 2.0},
            {"base": "client", "mask": "gaussian", "mean": 0.5, "scale": 2.0},
        ),
        (
            {"attack_mode": "gaussian", "gaussian_mu": 1},
            {"base": "client", "mask": "gaussian", "mean": 0.0, "scale": 1.0},
        ),
    ],
)
def test_lazy_workers(keys, spec):
    made = fedml.convert(attacked("lazy_worker", lazy_worker_num=2, **keys))
    assert made.spec["attack"] == {"name": "lazy_worker", **spec, "convention": "fedsecurity"}
    paper = fedml.convert(attacked("lazy_worker", lazy_worker_num=2, **keys), convention="paper")
    assert paper.spec["attack"] == {"name": "lazy_worker", **spec}
    made.experiment()


def test_unknown_modes_are_refused_with_the_nearest():
    with pytest.raises(ConfigError, match="attack_mode must be one of .* Did you mean 'random'"):
        fedml.convert(attacked("byzantine", attack_mode="randm", byzantine_client_num=1))
    with pytest.raises(ConfigError, match="attack_mode must be one of .*'no_mask'"):
        fedml.convert(attacked("lazy_worker", attack_mode="none", lazy_worker_num=1))
    with pytest.raises(
        ConfigError, match="byzantine_client_num must be an integer >= 0, and is mis"
    ):
        fedml.convert(attacked("byzantine", attack_mode="zero"))


def test_the_probability_of_an_attack_has_no_counterpart():
    keys = {"attack_mode": "zero", "byzantine_client_num": 1}
    assert "attack_prob" in said(
        fedml.convert(attacked("byzantine", **keys, attack_prob=0.5)), "missing"
    )
    made = fedml.convert(attacked("byzantine", **keys, attack_prob=1))
    assert "attack_prob" not in said(made, "missing")


@pytest.mark.parametrize("keys", [{}, {"gaussian_mu": 0.0, "gaussian_sigma": 1}])
def test_numbers_of_a_mask_that_fedml_does_not_read_are_said(keys):
    made = fedml.convert(attacked("lazy_worker", lazy_worker_num=1, attack_mode="gaussian", **keys))
    assert ("gaussian_sigma: FedML reads the two" in said(made, "idle")) == bool(keys)


def test_attacks_that_never_happen_are_said():
    never = fedml.convert(fedml_config(**FLIPPING, poison_start_round_id=5, poison_end_round_id=3))
    assert "poison_end_round_id: FedML never poisons" in said(never, "idle")
    keys = {"attack_mode": "zero", "byzantine_client_num": 1, "attack_prob": 0.0}
    never = said(fedml.convert(attacked("byzantine", **keys)))
    assert "attack_prob: FedML never attacks" in never and "with that probability" not in never
    for kind in (None, ["byzantine"]):
        assert "FedML stops with an error" in said(fedml.convert(attacked(kind)), "idle")


# --- No key goes unsaid ---------------------------------------------------------------------------


def asked(**changes) -> set[str]:
    """The keys that a conversion asks for."""
    args, seen = security.Arguments, set()

    class Listening(args):
        def get(self, key, default=None):
            seen.add(key)
            return super().get(key, default)

    conversion = sys.modules[fedml.convert.__module__]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(conversion, "Arguments", Listening)
        fedml.convert(fedml_config(**changes))
    return seen


#: Keys without which an attack is refused.
ASKED_FOR = {
    "byzantine": {"attack_mode": "random", "byzantine_client_num": 1},
    "label_flipping": FLIPPING,
    "lazy_worker": {"attack_mode": "gaussian", "lazy_worker_num": 1},
    "backdoor": {"backdoor_client_num": 1},
    "edge_case_backdoor": {"poisoned_client_num": 1},
}


def kinds_of_configurations():
    for kind in security.ATTACKS:
        yield ASKED_FOR.get(kind, {}) | {"enable_attack": True, "attack_type": kind}
    for kind in security.DEFENSES:
        needed = {"option_type": 2, "trim_param_b": 1, "clip_threshold": 3.5}
        yield needed | {"enable_defense": True, "defense_type": kind}
    for name in ("FedAvg", "FedProx", "SCAFFOLD", "FedOpt"):
        for optimizer in ("adam", "sgd") if name == "FedOpt" else (None,):
            yield {"federated_optimizer": name} | (
                {"server_optimizer": optimizer} if optimizer else {}
            )


def test_every_key_acts_or_is_named():
    """Whatever key a conversion may ask for: it changes ours, is refused, or has a note."""
    cases = list(kinds_of_configurations())
    universe = set().union(*(asked(**case) for case in cases))
    assert len(universe) > 60
    plain = {key for part in fedml_config().values() for key in part}
    unsaid = []
    for case in cases:
        base = fedml.convert(fedml_config(**case))
        for key in sorted(universe - plain - set(case)):
            for value in (7, 0.37, "odd"):
                try:
                    made = fedml.convert(fedml_config(**case, **{key: value}))
                except ConfigError as error:
                    if key not in str(error):
                        unsaid.append((case, key, value, str(error)))
                    continue
                if made.spec == base.spec and not re.search(rf"\b{key}\b", said(made)):
                    unsaid.append((case, key, value))
    assert not unsaid


# --- Where FedML runs -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("place", "attack", "defense", "texts"),
    [
        ({"training_type": "cross_silo"}, "byzantine", "krum", []),
        (
            {"training_type": "simulation", "backend": "sp"},
            "byzantine",
            "krum",
            ["sp with FedAvg (simulation) calls no attack and no defence"] * 2,
        ),
        (
            {"training_type": "simulation", "backend": "MPI"},
            "byzantine",
            "krum",
            ["its MPI simulation calls `run`, which the class has not"],
        ),
        ({"training_type": "simulation", "backend": "MPI"}, "byzantine", "weak_dp", []),
        (
            {"training_type": "simulation", "backend": "MPI"},
            "label_flipping",
            "robust_learning_rate",
            ["FedML poisons no data"],
        ),
        (
            {"training_type": "simulation", "backend": "MPI"},
            "model_replacement",
            "weak_dp",
            ["hands the attack no global model"],
        ),
        (
            {"training_type": "cross_silo", "ml_engine": "jax"},
            "byzantine",
            "krum",
            ["with ml_engine jax FedML switches attacks and defences off"] * 2,
        ),
        (
            {"training_type": "cross_device"},
            "byzantine",
            "krum",
            ["training on devices (cross_device) calls no attack"] * 2,
        ),
    ],
)
def test_what_fedml_does_depends_on_where_it_runs(place, attack, defense, texts):
    keys = {"attack_mode": "random"} if attack == "byzantine" else {}
    config = fedml_config(
        **FLIPPING | {"attack_type": attack} | keys,
        enable_defense=True,
        defense_type=defense,
        byzantine_client_num=1,
        stddev=0.1,
        robust_threshold=4,
        **place,
    )
    notes = said(fedml.convert(config), "idle")
    lines = [line for line in notes.splitlines() if "_type: FedML" in line]
    assert len(lines) == len(texts), notes
    for line, text in zip(lines, texts, strict=True):
        assert text in line


# --- Defences -------------------------------------------------------------------------------------

NEEDED = {
    "norm_diff_clipping": {"norm_bound": 5.0},
    "diff_clipping": {"norm_bound": 5.0},
    "robust_learning_rate": {"robust_threshold": 4},
    "krum": {"byzantine_client_num": 1},
    "multikrum": {"byzantine_client_num": 1, "krum_param_m": 5},
    "slsgd": {"trim_param_b": 1, "alpha": 0.95, "option_type": 2},
    "geo_median": {"byzantine_client_num": 1, "batch_num": 5},
    "cclip": {"bucket_size": 3, "tau": 4},
    "weak_dp": {"stddev": 0.1},
    "crfl": {"clip_threshold": 8, "sigma": 0.02},
    "trimmed_mean": {"beta": 0.25},
    "anomaly_detection": {"cosine_similarity_bound": 0.4},
    "bulyan": {"byzantine_client_num": 1},
    "residual_based_reweighting": {"mode": "theilsen"},
}
FEDML = {"convention": "fedsecurity"}
CLIPPED = [{"name": "clip_norm", "max_norm": 5.0}, "mean"]
#: defense_type -> (as FedML computes it, as the paper does), for 10 clients.
RULE = {
    "norm_diff_clipping": (CLIPPED, CLIPPED),
    "diff_clipping": (CLIPPED, CLIPPED),
    "robust_learning_rate": (["mean", {"name": "rlr", "threshold": 4.0}],) * 2,
    "krum": ({"name": "krum", "num_byzantine": 1},) * 2,
    "multikrum": (KRUM | {"weighted": True}, KRUM),
    "slsgd": (
        {"name": "slsgd", "alpha": 0.95, "num_byzantine": 1} | FEDML,
        {"name": "slsgd", "alpha": 0.95, "num_byzantine": 1},
    ),
    "geo_median": (
        {"name": "median_of_means", "num_byzantine": 1, "num_batches": 5} | FEDML,
        {"name": "median_of_means", "num_byzantine": 1, "num_batches": 5},
    ),
    "cclip": (
        {"name": "centered_clipping", "radius": 4, "bucket_size": 3} | FEDML,
        [{"name": "bucketing", "size": 3}, {"name": "centered_clipping", "radius": 4}],
    ),
    "weak_dp": ({"name": "weak_dp", "std": 0.1} | FEDML, {"name": "weak_dp", "std": 0.1}),
    "rfa": ({"name": "geometric_median"} | FEDML, {"name": "geometric_median"}),
    "foolsgold": ({"name": "foolsgold"} | FEDML, {"name": "foolsgold"}),
    "crfl": (["mean", {"name": "crfl", "slope": 0.0, "offset": 8.0, "cap": 8, "std": 0.02}],) * 2,
    "3sigma": ({"name": "three_sigma", "variant": "krum"},) * 2,
    "3sigma_geo": ({"name": "three_sigma", "variant": "geometric_median"},) * 2,
    "3sigma_foolsgold": ({"name": "three_sigma", "variant": "foolsgold"},) * 2,
    "trimmed_mean": (
        {"name": "slsgd", "alpha": 1.0, "num_byzantine": 2} | FEDML,
        {"name": "trimmed_mean", "num_byzantine": 2},
    ),
    "wise_median": ({"name": "median", "middle": "lower"}, "median"),
    "anomaly_detection": (
        {"name": "cross_round", "min_cosine": 0.4} | FEDML,
        {"name": "cross_round", "min_cosine": 0.4},
    ),
    "dp": ("mean", "mean"),
    "bulyan": ({"name": "bulyan", "num_byzantine": 1},) * 2,
    "residual_based_reweighting": (
        {"name": "residual_reweighting", "width": 2, "threshold": 0.1, "line": "theil_sen"},
        {"name": "residual_reweighting", "width": 2, "threshold": 0.1},
    ),
    "wbc": (["fl_wbc", "mean"],) * 2,
    "soteria": ("mean", "mean"),
}


def test_every_defence_of_fedml_is_in_the_table():
    assert set(RULE) == set(security.DEFENSES)
    #: `constants.py` of FedML, without its attacks.
    constants = {
        "norm_diff_clipping",
        "robust_learning_rate",
        "krum",
        "slsgd",
        "geo_median",
        "cclip",
        "weak_dp",
        "dp",
        "rfa",
        "foolsgold",
        "crfl",
        "3sigma_foolsgold",
        "3sigma",
        "3sigma_geo",
        "multikrum",
        "trimmed_mean",
        "diff_clipping",
        "wise_median",
        "anomaly_detection",
    }
    assert constants <= set(security.DEFENSES)
    attacks = {"byzantine", "dlg", "label_flipping", "model_replacement"}
    assert attacks <= set(security.ATTACKS)


@pytest.mark.parametrize("convention", security.CONVENTIONS)
@pytest.mark.parametrize("kind", RULE)
def test_defences(kind, convention):
    made = fedml.convert(defended(kind, **NEEDED.get(kind, {})), convention=convention)
    assert made.spec["defense"] == RULE[kind][convention == "paper"]
    if made.spec["defense"] == "mean":
        expected = "a stage of local training here" if kind == "soteria" else "no counterpart"
        assert expected in said(made, "missing")
    made.experiment()


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("weak_dp", "FedML does nothing: no hook of its server lists it"),
        ("robust_learning_rate", "FedML does nothing: no hook of its server lists it"),
        ("diff_clipping", "FedML stops: the name is declared, but it leads to no class"),
        ("dp", "FedML stops: the name is declared, but it leads to no class"),
        ("wbc", "FedML stops: no defense_type leads to its class"),
        ("soteria", "FedML stops: no defense_type leads to its class"),
        ("bulyan", "FedML stops: no defense_type leads to its class"),
    ],
)
def test_defences_that_fedml_never_carries_out_are_said(kind, text):
    made = fedml.convert(defended(kind, **NEEDED.get(kind, {})))
    assert text in said(made, "idle")


@pytest.mark.parametrize("kind", ["krum", "rfa", "foolsgold", "cclip", "crfl", "wise_median"])
def test_defences_that_act_are_not_called_idle(kind):
    made = fedml.convert(defended(kind, **NEEDED.get(kind, {})))
    assert "defense" not in said(made, "idle")


def test_krum_is_checked_as_fedml_does():
    """2 f + 2 <= K - m there, 2 f + 2 < K here."""
    fits = fedml.convert(defended("krum", byzantine_client_num=1, krum_param_m=6))
    assert "2 f + 2" not in said(fits)
    fails = fedml.convert(defended("krum", byzantine_client_num=1, krum_param_m=7))
    assert "it asks for 2 f + 2 <= K - m, with f = 1, m = 7, K = 10" in said(fails, "idle")
    assert fails.spec["defense"]["num_selected"] == 7
    keys = MNIST | {"byzantine_client_num": 4}
    many = fedml.convert(defended("krum", **keys))
    assert "2 f + 2 <= K - m" in said(many, "idle")
    with pytest.raises(ConfigError, match="2 f"):
        many.experiment()


def test_attack_and_defence_share_the_number_of_byzantine_clients():
    config = attacked("byzantine", attack_mode="zero", byzantine_client_num=2)
    config["defense_args"] = {"enable_defense": True, "defense_type": "krum"}
    assert fedml.convert(config).spec["defense"]["num_byzantine"] == 2
    config["defense_args"]["byzantine_client_num"] = 1  # the later section wins, for both
    made = fedml.convert(config)
    assert made.spec["defense"]["num_byzantine"] == 1
    assert made.spec["threat"]["num_malicious"] == 1
    assert "FedML reads defense_args.byzantine_client_num = 1, which comes later" in said(
        made, "idle"
    )
    del config["defense_args"]["byzantine_client_num"], config["attack_args"]
    assert "byzantine_client_num is missing; here it is 1" in said(fedml.convert(config), "idle")


def test_a_switched_off_attack_still_bounds_krum():
    config = fedml_config(byzantine_client_num=3, enable_defense=True, defense_type="krum")
    made = fedml.convert(config)
    assert made.spec["defense"]["num_byzantine"] == 3 and made.spec["attack"] is None
    assert "byzantine_client_num" not in said(made)


@pytest.mark.parametrize(
    ("kind", "keys", "defense", "text"),
    [
        ("slsgd", {"option_type": 1}, {"num_byzantine": 0}, "option_type 1 trims nothing"),
        ("cclip", {"tau": -1}, {"radius": 10}, "FedML takes 10 in place of -1"),
        ("3sigma_geo", {"pretraining_round_num": 5}, {"calibration_rounds": 4}, ""),
        ("3sigma_geo", {"to_keep_higher_scores": True}, {}, "keeps low scores"),
        ("3sigma_foolsgold", {"bucketing_batch_size": 3}, {}, "not in buckets"),
        ("multikrum", {"krum_param_m": 2.0}, {"name": "krum"}, "FedML reads an integer only"),
        ("norm_diff_clipping", {"norm_bound": ...}, None, "norm_bound is missing; here it is 1.0"),
    ],
)
def test_details_of_defences(kind, keys, defense, text):
    made = fedml.convert(defended(kind, **NEEDED.get(kind, {}) | keys))
    if defense is not None:
        assert defense.items() <= made.spec["defense"].items()
    assert text in said(made)


def test_crfl_grows_by_data_set():
    made = fedml.convert(fedml_config(**EXAMPLES["mnist/crfl"]))
    assert made.spec["defense"][1] == {
        "name": "crfl",
        "slope": 0.1,
        "offset": 2.0,
        "cap": None,
        "std": 0.02,
    }
    made = fedml.convert(
        fedml_config(**EXAMPLES["mnist/crfl"] | {"clip_threshold": 15, "sigma": 1})
    )
    assert made.spec["defense"][1]["cap"] == 15
    assert made.spec["defense"][1]["std"] == 0.01  # FedML reads a float only
    assert "sigma" in said(made, "idle")
    with pytest.raises(ConfigError, match="crfl needs clip_threshold"):
        fedml.convert(defended("crfl"))


def test_unknown_defences_are_refused_with_the_nearest():
    with pytest.raises(ConfigError, match="none of FedML's defences, .* Did you mean 'foolsgold'"):
        fedml.convert(defended("foolsgld"))
    with pytest.raises(ConfigError, match="'None' is none of FedML's defences, and FedML stops"):
        fedml.convert(defended("None"))
    with pytest.raises(ConfigError, match="option_type must be 1 or 2"):
        fedml.convert(defended("slsgd", trim_param_b=1, alpha=0.5, option_type=3))


# --- Data, model, training ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "model", "number", "partition", "batch"),
    [
        ("femnist", "cnn", 3400, "natural", 20),
        ("shakespeare", "rnn", 715, "natural", 10),
        ("fed_shakespeare", "rnn", 715, "natural", 4),
        ("mnist", "lr", 1000, {"name": "by_label", "shards_per_client": 2}, 10),
    ],
)
def test_data_by_user_overwrites_the_number_of_clients(name, model, number, partition, batch):
    made = fedml.convert(fedml_config(dataset=name, model=model))
    assert made.spec["data"]["num_clients"] == number
    assert made.spec["data"]["partition"] == partition
    assert made.spec["server"]["clients_per_round"] == 10
    assert made.spec["client"]["batch_size"] == batch
    notes = said(made, "idle")
    assert f"FedML overwrites 10 with the number of users of {name}, here {number}" in notes
    assert f"data_args.partition_method: FedML deals {name} out by user" in notes
    assert (f"takes batches of {batch}" in notes) == (batch != 10)


def test_partitions():
    assert fedml.convert(fedml_config(partition_method="homo")).spec["data"]["partition"] == "iid"
    with pytest.raises(ConfigError, match="'hetero-fix' reads a file"):
        fedml.convert(fedml_config(partition_method="hetero-fix"))
    with pytest.raises(ConfigError, match="has no data set 'fashion', and reads CIFAR-10"):
        fedml.convert(fedml_config(dataset="fashion"))
    with pytest.raises(ConfigError, match="client_num_per_round = 11 exceeds the 10 clients"):
        fedml.convert(fedml_config(client_num_per_round=11))


def test_models():
    with pytest.raises(ConfigError, match="'mobilenet' has no counterpart"):
        fedml.convert(fedml_config(model="mobilenet"))
    with pytest.raises(ConfigError, match="FedML has no 'cnn' for cifar10, .* femnist, mnist"):
        fedml.convert(fedml_config(model="cnn"))
    assert "sigmoid" in said(fedml.convert(fedml_config(model="lr")), "differs")


def test_weight_decay_is_read_by_adam_alone():
    made = fedml.convert(fedml_config())
    assert "l2" not in made.spec["client"]
    assert "weight_decay: FedML's trainer hands it to Adam only" in said(made, "idle")
    made = fedml.convert(fedml_config(client_optimizer="adam", learning_rate=0.001))
    assert made.spec["client"]["l2"] == 0.001
    assert made.spec["client"]["optimizer"] == {"name": "amsgrad", "learning_rate": 0.001}
    assert "weight_decay" not in said(made)
    assert "FedML takes Adam for whatever" in said(
        fedml.convert(fedml_config(client_optimizer="rmsprop")), "idle"
    )
    with pytest.raises(ConfigError, match="batch_size = -1 trains on all examples"):
        fedml.convert(fedml_config(batch_size=-1))


def test_numbers_are_taken_over():
    spec = fedml.convert(
        fedml_config(
            frequency_of_the_test=5,
            comm_round=40,
            random_seed=7,
            epochs=3,
            batch_size=16,
            learning_rate=0.1,
            partition_alpha=0.2,
            client_num_in_total=30,
        )
    ).spec
    assert (spec["evaluation"], spec["rounds"], spec["seed"]) == ({"every": 5}, 40, 7)
    assert (spec["client"]["epochs"], spec["client"]["batch_size"]) == (3, 16)
    assert spec["client"]["optimizer"]["learning_rate"] == 0.1
    assert (spec["data"]["partition"]["alpha"], spec["data"]["num_clients"]) == (0.2, 30)


def test_the_servers_rate_is_not_read_by_fedavg():
    keys = {"server_lr": 0.001, "server_optimizer": "sgd", "server_momentum": 0.9}
    made = fedml.convert(fedml_config(**keys))
    assert "server" not in made.spec
    for key in keys:
        assert f"train_args.{key}: FedAvg does not read it" in said(made, "idle")
    simulated = {"training_type": "simulation", **keys}
    made = fedml.convert(fedml_config(federated_optimizer="FedOpt", **simulated))
    step = {"name": "sgd", "learning_rate": 0.001, "momentum": 0.9}
    assert made.spec["server"] == {"optimizer": step}
    made = fedml.convert(fedml_config(federated_optimizer="SCAFFOLD", **simulated))
    assert made.spec["algorithm"] == "scaffold"
    assert "FedML returns the last client's update" in said(made, "differs")
    made = fedml.convert(fedml_config(federated_optimizer="FedProx", fedprox_mu=0.1, **MNIST))
    assert made.spec["algorithm"] == {"name": "fedprox", "mu": 0.1}
    assert "its cross-silo server has FedAvg, not FedProx" in said(made, "idle")
    made.experiment()
    with pytest.raises(ConfigError, match="'FedNas' has no counterpart"):
        fedml.convert(fedml_config(federated_optimizer="FedNas"))


# --- Every key is named ---------------------------------------------------------------------------


def test_every_key_is_converted_or_named():
    """Whatever is changed in a configuration changes what is made of it, or is in a note."""
    config = fedml_config(**FLIPPING, **RULES["krum_m5"], byzantine_client_num=1)
    made = fedml.convert(config)
    named = " ".join(note.key for note in made.notes)
    other = {
        "learning_rate": 0.1,
        "epochs": 2,
        "comm_round": 7,
        "batch_size": 5,
        "random_seed": 3,
        "frequency_of_the_test": 2,
        "client_num_in_total": 20,
        "client_num_per_round": 9,
        "dataset": "cifar100",
        "model": "resnet56",
        "partition_method": "homo",
        "partition_alpha": 0.1,
        "attack_type": "byzantin",
        "original_class_list": [4, 2],
        "target_class_list": [8, 1],
        "ratio_of_poisoned_client": 0.3,
        "enable_attack": False,
        "enable_defense": False,
        "defense_type": "rfa",
        "byzantine_client_num": 2,
        "krum_param_m": 4,
        "client_optimizer": "adam",
        "federated_optimizer": "FedProx",
        "weight_decay": 0.5,
        "training_type": "simulation",
        "backend": "sp",
    }
    for section, keys in config.items():
        for key in keys:
            if key in other:
                changed = {name: dict(part) for name, part in config.items()}
                changed[section][key] = other[key]
                again = fedml.convert(changed)
                differs = (again.spec, said(again)) != (made.spec, said(made))
                assert differs or f"{section}.{key}" in named, key
            else:
                assert f"{section}.{key}" in named, key


def test_unknown_keys_are_named():
    config = fedml_config()
    config["train_args"] |= {"momentun": 0.9, "lr": 0.1}
    config["dp_args"] = {"enable_dp": True, "epsilon": 1.0}
    notes = said(fedml.convert(config), "missing")
    assert "train_args.momentun: a key that we do not know" in notes
    assert "dp_args.enable_dp: privacy of FedML's has no counterpart" in notes
    assert "train_args.lr: FedML reads it for stackoverflow_lr only" in said(
        fedml.convert(config), "idle"
    )


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ({}, "is a mapping of sections"),
        ({"rounds": 3}, "rounds: a configuration of FedML holds sections"),
        ([1], "Expected the path of a configuration file or a mapping, got [1]"),
        ({"train_args": {"comm_round": 5}}, "client_num_in_total must be an integer >= 1, and is"),
        (fedml_config(comm_round="many"), "comm_round must be an integer"),
        (fedml_config(epochs=0), "epochs must be an integer >= 1, got 0"),
        (fedml_config(learning_rate=...), "learning_rate is missing; FedML stops"),
        (fedml_config(learning_rate="x"), "learning_rate must be a number"),
    ],
)
def test_what_is_no_configuration_of_fedmls_is_refused(config, text):
    with pytest.raises(ConfigError, match=re.escape(text)):
        fedml.convert(config)
    with pytest.raises(ConfigError, match="Did you mean 'paper'"):
        fedml.convert(fedml_config(), convention="papr")


def test_platforms_and_server_optimizers_without_which_fedml_stops():
    with pytest.raises(ConfigError, match="training_type must be one of .* Did you mean 'simul"):
        fedml.convert(fedml_config(training_type="simulaton"))
    with pytest.raises(ConfigError, match="server_optimizer is missing, which FedOpt asks for"):
        fedml.convert(fedml_config(federated_optimizer="FedOpt"))


# --- The command ----------------------------------------------------------------------------------


def test_the_command_asks_for_the_folder_of_what_it_writes(tmp_path):
    path = tmp_path / "theirs.yaml"
    path.write_text(yaml.safe_dump(defended("wise_median", **MNIST), sort_keys=False))
    out = tmp_path / "nowhere" / "ours.yaml"
    ran = CliRunner().invoke(app, ["import-fedml", str(path), "--out", str(out)])
    assert ran.exit_code != 0 and "there is no folder" in " ".join(ran.output.split())


def test_the_command_writes_a_configuration(tmp_path):
    path, out = tmp_path / "theirs.yaml", tmp_path / "ours.yaml"
    path.write_text(yaml.safe_dump(defended("wise_median", **MNIST), sort_keys=False))
    done = CliRunner().invoke(app, ["import-fedml", str(path), "--out", str(out)])
    assert done.exit_code == 0, done.output
    assert "FedML itself does nothing with it, or stops:" in done.output
    assert config_lib.load(out).defense.stages[0].middle == "lower"
    text = out.read_text()
    assert text.startswith("# Made of theirs.yaml by `fedjax-sec import-fedml`.")
    assert all(len(line) <= 100 for line in text.splitlines())
    again = CliRunner().invoke(app, ["import-fedml", str(path), "--out", str(out)])
    assert again.exit_code == 2 and "exists" in again.output and out.read_text() == text
    printed = CliRunner().invoke(app, ["import-fedml", str(path), "--convention", "paper"])
    assert printed.exit_code == 0 and "defense: median" in printed.output


def test_the_command_reports_what_our_checks_refuse(tmp_path):
    path, out = tmp_path / "theirs.yaml", tmp_path / "ours.yaml"
    config = defended("krum", byzantine_client_num=4, **MNIST)
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    done = CliRunner().invoke(app, ["import-fedml", str(path), "--out", str(out)])
    assert done.exit_code == 2 and "2 f + 2" in done.output and not out.exists()
    missing = CliRunner().invoke(app, ["import-fedml", str(tmp_path / "none.yaml")])
    assert missing.exit_code == 2 and "No configuration file" in missing.output


# --- The guide's tables ---------------------------------------------------------------------------

GUIDE = (Path(__file__).parents[1] / "docs" / "guide" / "fedsecurity.md").read_text()


def rows(heading):
    """The cells of a table of the guide, below the line that holds its heading."""
    lines = GUIDE[GUIDE.index(heading) :].splitlines()[2:]
    end = next(i for i, line in enumerate(lines) if not line.startswith("|"))
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[:end]]


def ours(cell):
    """The components that a cell names: what stands in backticks, but not in parentheses."""
    return re.findall(r"`([a-z_]+)`", re.sub(r"\(.*?\)", "", cell))


#: Tables 1 and 2 of the paper.
TABLES = {
    "Table 1": {
        "Byzantine attack: zero mode, random mode, flipping mode": ["byzantine"],
        "Minimizing Distance Backdoor": ["alie_backdoor"],
        "Model Replacement Backdoor": ["model_replacement"],
        "Lazy Worker (or Free Rider)": ["lazy_worker", "free_rider"],
        "Label Flipping Backdoor attack": ["label_flip"],
        "Edge Case Backdoor Attack": ["edge_case"],
        "Deep Leakage Attack": ["dlg"],
        "Inverting Gradient Attack": ["inverting_gradients"],
        "Revealing Labels Attack": ["label_bag"],
    },
    "Table 2": {
        "SLSGD": ["slsgd"],
        "Residual Reweighting Defense": ["residual_reweighting"],
        "Foolsgold": ["foolsgold"],
        "Krum and m-Krum": ["krum", "multi_krum"],
        "Bulyan": ["bulyan"],
        "Norm Clipping": ["clip_norm"],
        "Fl-wbc": ["fl_wbc"],
        "coordinate-wise median": ["median"],
        "CClip": ["centered_clipping", "bucketing"],
        "coordinate-wise trimmed mean": ["trimmed_mean"],
        "weak DP": ["weak_dp"],
        "anomaly detection": ["three_sigma", "cross_round"],
        "Robust Learning Rate": ["rlr"],
        "Geometric median": ["median_of_means"],
        "RFA": ["geometric_median"],
        "CRFL": ["crfl"],
    },
}


@pytest.mark.parametrize("table", TABLES)
def test_the_guide_has_every_row_of_the_papers_tables(table):
    named = {}
    for _, theirs, cell in rows(f"FedSecurity, {table}"):
        named.setdefault(theirs, ours(cell))
    assert named == TABLES[table]


@pytest.mark.parametrize(
    "name", [name for table in TABLES.values() for names in table.values() for name in names]
)
def test_our_names_in_the_guide_are_components(name):
    kinds = registry.attacks, registry.defenses, registry.privacy_attacks
    assert name in {one for kind in kinds for one in kind.names()}


def test_the_guide_has_every_function_of_the_papers_tables_3_and_4():
    assert [row[0].strip("`") for row in rows("| FedSecurity | ours |")] == [
        "poison_model",
        "is_model_poisoning_attack",
        "poison_data",
        "is_data_poisoning_attack",
        "reconstruct_data",
        "is_data_reconstruction_attack",
        "defend_before_aggregation",
        "is_defense_before_aggregation",
        "defend_on_aggregation",
        "is_defense_on_aggregation",
        "defend_after_aggregation",
        "is_defense_after_aggregation",
    ]
