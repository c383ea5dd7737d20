"""Words for error messages: the nearest valid name, and values in one short line."""

import difflib
import re
from collections.abc import Iterable
from typing import Any

#: A thing's name in other texts and libraries -> our names for it, of whatever kind. Without a
#: name there is nothing of ours that does it, so nothing is suggested.
SYNONYMS = {
    # defences
    "average": ("mean",),
    "fedavg": ("mean", "sgd"),
    "fedsgd": ("mean", "sgd"),
    "avg": ("mean",),
    "trmean": ("trimmed_mean",),
    "trim": ("trimmed_mean", "trim_attack"),
    "geomed": ("geometric_median",),
    "gm": ("geometric_median",),
    "rfa": ("geometric_median",),
    "comed": ("median",),
    "coordinatewisemedian": ("median",),
    "cc": ("centered_clipping",),
    "cclip": ("centered_clipping",),
    "centeredclip": ("centered_clipping",),
    "normclipping": ("clip_norm",),
    "normbound": ("clip_norm",),
    "normbounding": ("clip_norm",),
    "clipping": ("clip_norm",),
    "weakdp": ("gaussian_noise",),
    "dp": ("gaussian_noise",),
    "mkrum": ("multi_krum",),
    "signsgd": ("sign", "sign_sgd"),
    "majorityvote": ("sign",),
    "robustlearningrate": ("rlr",),
    "flame": (),
    "signguard": (),
    "dnc": (),
    "spectral": (),
    # attacks
    "lf": ("label_flip",),
    "labelflipping": ("label_flip",),
    "littleisenough": ("alie",),
    "lie": ("alie",),
    "ipm": (),
    "innerproductmanipulation": (),
    "minmax": (),
    "minsum": (),
    "backdoor": ("pattern", "trojan"),
    "badnet": ("pattern", "trojan"),
    "badnets": ("pattern", "trojan"),
    "dba": ("trojan",),
    "bitflip": ("sign_flip",),
    "signflipping": ("sign_flip",),
    "modelreplacement": ("scaling",),
    "gaussian": ("random", "gaussian_noise"),
    "fang": ("trim_attack", "krum_attack"),
    # the rest
    "bim": ("pgd",),
    "autopgd": ("apgd",),
    "autoattack": ("apgd",),
    "cnn": ("small_cnn",),
    "convnet": ("small_cnn",),
    "linear": ("logistic_regression",),
    "lr": ("learning_rate", "logistic_regression"),
    "logreg": ("logistic_regression",),
    "resnet20": ("resnet",),
    "resnet18": ("resnet",),
    "emnist": ("femnist",),
    "fmnist": ("fashion_mnist",),
    "cifar": ("cifar10",),
    "noniid": ("dirichlet", "label_groups"),
    "shards": ("by_label",),
    "pathological": ("by_label",),
    "user": ("natural",),
    # keys
    "rate": ("learning_rate",),
    "stepsize": ("learning_rate", "step_size"),
    "bs": ("batch_size",),
    "batch": ("batch_size",),
    "localepochs": ("epochs",),
    "localsteps": ("steps",),
    "numrounds": ("rounds",),
    "nrounds": ("rounds",),
    "commrounds": ("rounds",),
    "globalepochs": ("rounds",),
    "iterations": ("rounds", "steps"),
    "randomseed": ("seed",),
    "nclients": ("num_clients",),
    "numworkers": ("num_clients",),
    "numusers": ("num_clients",),
    "nbyzantine": ("num_byzantine", "num_malicious"),
    "numattackers": ("num_malicious",),
    "attackers": ("num_malicious",),
    "numbyzantine": ("num_byzantine", "num_malicious"),
    "f": ("num_byzantine", "num_malicious"),
    "epsilon": ("eps",),
    "weightdecay": ("weight_decay", "l2"),
    "wd": ("weight_decay", "l2"),
    "aggregator": ("defense",),
    "aggregation": ("defense",),
    "aggregationrule": ("defense",),
    "defence": ("defense",),
    "gar": ("defense",),
    "rule": ("defense",),
    "adversary": ("attack", "threat"),
    "dataset": ("data",),
    "network": ("model",),
    "net": ("model",),
    "participation": ("clients_per_round",),
    "clientfraction": ("clients_per_round",),
    "distribution": ("partition",),
}


def letters(name) -> str:
    """The name in lower case without blanks, hyphens and underscores."""
    return re.sub(r"[\s_-]+", "", str(name)[:200].lower())


def _abbreviates(short: str, name: str) -> bool:
    """Whether `short` is `name` with letters left out, the first one kept."""
    letters = iter(name)
    return len(short) >= 3 and short[0] == name[:1] and all(letter in letters for letter in short)


def likeness(name, other) -> float:
    """How much of two names is the same, from 0 to 1."""
    return difflib.SequenceMatcher(None, letters(name), letters(other)).ratio()


def nearest(name, known: Iterable, cutoff: float = 0.6) -> list[str]:
    """The known names that were probably meant, the likeliest first; often none.

    >>> nearest("trmean", ["mean", "median", "trimmed_mean"])
    ['trimmed_mean']
    >>> nearest("signguard", ["sign", "krum"])
    []
    """
    known = [str(one) for one in known]
    wanted = letters(name)
    if same := [one for one in known if letters(one) == wanted]:
        return same
    if wanted in SYNONYMS:
        return [one for one in SYNONYMS[wanted] if one in known]

    def likest(some):
        return sorted(some, key=lambda one: likeness(name, one), reverse=True)[:1]

    if len(wanted) >= 3 and (whole := [one for one in known if _abbreviates(wanted, letters(one))]):
        return likest(whole)
    return likest(one for one in known if likeness(name, one) >= cutoff)


def suggestion(name, known: Iterable) -> str:
    """`" Did you mean 'krum'?"`, or nothing when no known name is near.

    >>> suggestion("kurm", ["krum", "mean"])
    " Did you mean 'krum'?"
    """
    near = nearest(name, known)
    return f" Did you mean {' or '.join(map(repr, near))}?" if near else ""


def shown(value: Any, limit: int = 80) -> str:
    """The value as Python writes it, in one line of at most about `limit` characters.

    >>> shown(10**5000)
    'an integer of about 5001 digits'
    >>> shown("a" * 200, limit=20)
    "'aaaaaaaaa...aaaaaa'"
    """
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 256:
        return f"an integer of about {int(value.bit_length() * 0.30103) + 1} digits"
    if getattr(value, "ndim", 0) and (shape := getattr(value, "shape", None)) is not None:
        return f"an array of shape {tuple(shape)}"
    if isinstance(value, (list, tuple)) and any(getattr(item, "ndim", 0) for item in value):
        return f"a {type(value).__name__} of {len(value)} values, among them arrays"
    if isinstance(value, str) and len(value) > 4 * limit:
        value = value[: 2 * limit] + value[-2 * limit :]
    if isinstance(value, bytes) and len(value) > 4 * limit:
        value = value[: 2 * limit] + value[-2 * limit :]
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # a huge integer or too many levels inside
        text = f"a value of type {type(value).__name__}"
    text = " ".join(text.split())
    if len(text) <= limit:
        return text
    begin = limit // 2
    return f"{text[:begin]}...{text[-(limit - begin - 3) :]}"


def one_line(text: str | BaseException, limit: int = 300) -> str:
    """A text or the message of an error in one line, shortened."""
    text = " ".join(str(text).split())
    return text if len(text) <= limit else f"{text[: limit - 3]}..."
