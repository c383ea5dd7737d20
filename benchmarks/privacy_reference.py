"""Records what authors' code computes; `tests/test_privacy_reference.py` compares.

    git clone https://github.com/JonasGeiping/breaching     # its commit 8bd99d5 was used
    git clone https://github.com/googleinterns/learning-bag-of-words ../bags     # 5d22600
    pip install torch omegaconf scipy scikit-learn cvxopt
    python benchmarks/privacy_reference.py ../breaching ../bags tests/golden/privacy.npz

Only breaching's modules on objectives and attacks are loaded, which need nothing but PyTorch. The
file holds the weights of a network (convolution 3 x 3 with 4 channels, sigmoid, dense), 4 images of
8 x 8 with labels, and of breaching:

- `gradient`, and the label strategies `iDLG`, `yin` and `bias-corrected` on several batches;
- the cosine distance at `start`, and its derivative, of one step and of three steps on two images
  each (its graph through local steps);
- where its `invertinggradients` attacker stands after 40 signed steps of Adam from `start`;
- where its `deep-leakage` attacker stands after 3 calls of L-BFGS, on the first image, in float64;
- on other small networks: `DeepInversion`'s distance of two batch norms' statistics and its
  derivative; `EuclideanTag` of guessed embeddings and labels and its derivatives; and the inputs
  that its attackers read from a first dense layer, with the gradients: `analytic`, Robbing the Fed,
  and when the curious abandon honesty;

and of the author code of Revealing Labels the set of labels that it reads from the gradient of a
last layer of 1,000 classes, of batches of 1, 4 and 10 examples (its functions alone: it is a
script).

Images are [n, H, W, C], kernels as flax has them. The guesses of the last attackers are in units
behind the normalisation.
"""

import ast
import importlib
import sys
import types
from pathlib import Path

import numpy as np
import torch
from omegaconf import OmegaConf

CLASSES, STEPS, PER_STEP, RATE = 5, 3, 2, 0.1
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
BATCHES = ([3], [0, 1, 2, 4], [1, 1, 1, 3], [2, 2, 4, 4, 4, 0])


def load(checkout: Path):
    """A function that gives a module of breaching by name, without loading the others."""
    folders = (".attacks", ".attacks.auxiliaries", ".cases", ".cases.models")
    for name in ("", *folders, ".cases.malicious_modifications"):
        package = types.ModuleType(f"breaching{name}")
        package.__path__ = [str(checkout / f"breaching{name}".replace(".", "/"))]
        sys.modules[package.__name__] = package
    return lambda name: importlib.import_module(f"breaching.{name}")


def network() -> torch.nn.Sequential:
    """The small network, with its default initial weights."""
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3),
        torch.nn.Sigmoid(),
        torch.nn.Flatten(),
        torch.nn.Linear(4 * 36, CLASSES),
    )


def settings(**changes) -> OmegaConf:
    """breaching's defaults of what is read here."""
    base = {
        "label_strategy": None,
        "objective": {"type": "euclidean", "scale": 1.0, "task_regularization": 0.0},
        "restarts": {"num_trials": 1, "scoring": "euclidean"},
        "init": "randn",
        "normalize_gradients": False,
        "optim": {
            "optimizer": "Adam",
            "signed": None,
            "step_size": 1.0,
            "boxed": False,
            "max_iterations": 400,
            "step_size_decay": None,
            "langevin_noise": 0.0,
            "warmup": 0,
            "grad_clip": None,
            "callback": 1000,
        },
        "augmentations": None,
        "differentiable_augmentations": False,
        "regularization": None,
        "impl": {"dtype": "float", "mixed_precision": False, "JIT": None},
    }
    return OmegaConf.merge(base, changes)


def images(x):
    """[n, C, H, W] as [n, H, W, C]."""
    return x.detach().numpy().transpose(0, 2, 3, 1)


def tree(gradients) -> dict:
    """The four arrays of the network as flax has them."""
    kernel, bias, dense, dense_bias = (g.detach().numpy() for g in gradients)
    dense = dense.reshape(CLASSES, 4, 6, 6).transpose(2, 3, 1, 0).reshape(-1, CLASSES)
    return {
        "kernel": kernel.transpose(2, 3, 1, 0),
        "bias": bias,
        "dense": dense,
        "dense bias": dense_bias,
    }


def attacker(kind, model, config):
    """An attacker with what `prepare_attack` would give it, and the candidates that it moves."""
    dtype = getattr(torch, config.impl.dtype)
    one = kind(
        model, torch.nn.CrossEntropyLoss(), config, {"dtype": dtype, "device": torch.device("cpu")}
    )
    one.data_shape = (3, 8, 8)
    one.dm = torch.tensor(MEAN, dtype=dtype)[None, :, None, None]
    one.ds = torch.tensor(STD, dtype=dtype)[None, :, None, None]
    moved = []
    begin = one._init_optimizer
    one._init_optimizer = lambda candidates: moved.extend(candidates) or begin(candidates)
    return one, moved


def batch_norms(breaching, x, start) -> dict:
    """DeepInversion's distance of statistics in a network of two batch norms, and its derivative.

    The network is in training mode with a momentum of 0: its running statistics stay as they are.
    """
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3),
        torch.nn.BatchNorm2d(4, momentum=0.0),
        torch.nn.Sigmoid(),
        torch.nn.Conv2d(4, 4, 3),
        torch.nn.BatchNorm2d(4, momentum=0.0),
        torch.nn.Flatten(),
        torch.nn.Linear(4 * 16, CLASSES),
    )
    arrays = {}
    for number, (conv, norm) in enumerate(((model[0], model[1]), (model[3], model[4]))):
        with torch.no_grad():
            norm.running_mean.uniform_(-0.5, 0.5)
            norm.running_var.uniform_(0.1, 1.0)
            norm.weight.uniform_(0.5, 1.5)
            norm.bias.uniform_(-0.5, 0.5)
        arrays |= {
            f"bn Conv_{number}/kernel": conv.weight.detach().numpy().transpose(2, 3, 1, 0),
            f"bn Conv_{number}/bias": conv.bias.detach().numpy(),
            f"bn BatchNorm_{number}/scale": norm.weight.detach().numpy(),
            f"bn BatchNorm_{number}/bias": norm.bias.detach().numpy(),
            f"bn BatchNorm_{number}/mean": norm.running_mean.numpy(),
            f"bn BatchNorm_{number}/var": norm.running_var.numpy(),
        }
    prior = breaching("attacks.auxiliaries.regularizers").DeepInversion({}, 0.1, 10)
    prior.initialize([model])
    for name, batch in (("truth", x), ("start", start)):
        candidate = batch.clone().requires_grad_()
        model(candidate)
        value = prior(candidate)
        (derivative,) = torch.autograd.grad(value, candidate)
        arrays |= {f"bn {name}": value.detach().numpy(), f"bn {name} slope": images(derivative)}
    return arrays


class Text(torch.nn.Module):
    """Tanh between two dense layers on embeddings [n, 4, 6]; biases first, as in our vectors."""

    def __init__(self):
        super().__init__()
        first, second = torch.nn.Linear(24, 10), torch.nn.Linear(10, 12)
        self.a_bias, self.a_kernel = first.bias, torch.nn.Parameter(first.weight.T.clone())
        self.b_bias, self.b_kernel = second.bias, torch.nn.Parameter(second.weight.T.clone())

    def forward(self, z):
        hidden = torch.tanh(z.flatten(1) @ self.a_kernel + self.a_bias)
        return hidden @ self.b_kernel + self.b_bias


def text(objectives) -> dict:
    """EuclideanTag of guessed embeddings and scores of labels, and its derivatives."""
    model, loss = Text(), torch.nn.CrossEntropyLoss()
    table = torch.randn(12, 6)
    tokens, labels = torch.tensor([[3, 7, 1, 9], [0, 2, 11, 2]]), torch.tensor([5, 8])
    sent = torch.autograd.grad(loss(model(table[tokens]), labels), list(model.parameters()))
    objective = objectives.EuclideanTag(tag_scale=0.1, scale_scheme="linear")
    objective.initialize(loss, settings().impl)
    guess = torch.randn(2, 4, 6, requires_grad=True)
    scores = torch.randn(2, 12, requires_grad=True)
    value, _ = objective(model, sent, guess, scores.softmax(dim=-1))
    slopes = torch.autograd.grad(value, (guess, scores))
    recorded = {name: parameter for name, parameter in model.named_parameters()}
    recorded |= {f"sent {name}": one for name, one in zip(recorded.copy(), sent, strict=True)}
    recorded |= {"table": table, "tokens": tokens, "labels": labels, "guess": guess}
    recorded |= {"scores": scores, "value": value[0]}
    recorded |= {"guess slope": slopes[0], "scores slope": slopes[1]}
    return {f"tag {name}": one.detach().numpy() for name, one in recorded.items()}


def first_layers(breaching, x, pixels, labels) -> dict:
    """What the attackers that read a first dense layer get, with the gradients that they read."""
    analytic = breaching("attacks.analytic_attack")
    blocks = breaching("cases.malicious_modifications.imprint")
    loss, shape = torch.nn.CrossEntropyLoss(), (3, 8, 8)

    def read(kind, model, inputs, y, secrets):
        """(the first layer's gradients by kernel and bias, the attacker's guesses)."""
        gradients = list(torch.autograd.grad(loss(model(inputs), y), model.parameters()))
        choices = {"sort_by_bias": False, "breach_padding": False, "breach_reduction": None}
        one, _ = attacker(kind, model, settings(**choices))
        one.prepare_attack = lambda payload, shared: ([model], y, {})
        if inputs is pixels:  # in [0, 1]
            one.dm, one.ds = torch.tensor(0.0), torch.tensor(1.0)
        payload = [{"metadata": types.SimpleNamespace(modality="vision")}]
        shared = [{"gradients": gradients, "metadata": {"num_data_points": len(y)}}]
        made, _ = one.reconstruct(payload, shared, secrets)
        return *gradients[:2], made["data"].reshape(-1, *shape)

    def secrets(block):
        return {
            "ImprintBlock": {
                "weight_idx": 0,
                "bias_idx": 1,
                "structure": block.structure,
                "shape": shape,
            }
        }

    dense = torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.Linear(192, 20), torch.nn.ReLU(), torch.nn.Linear(20, CLASSES)
    )
    imprint = blocks.ImprintBlock(shape, 40, gain=1, linfunc="fourier", mode=32)
    traps = blocks.CuriousAbandonHonesty(shape, 60, connection="addition")
    rest = network()
    cases = {
        "analytic": (analytic.AnalyticAttacker, dense, dense[1], x[:1], labels[:1], {}),
        "imprint": (
            analytic.ImprintAttacker,
            torch.nn.Sequential(imprint, rest),
            imprint.linear0,
            x,
            labels,
            secrets(imprint),
        ),
        "traps": (
            analytic.ImprintAttacker,
            torch.nn.Sequential(traps, rest),
            traps.linear0,
            pixels,
            labels,
            secrets(traps),
        ),
    }
    arrays = {"imprint edges": np.array(imprint.bins)}
    arrays["imprint query"] = imprint.linear0.weight[0].detach().numpy()
    normal = blocks.ImprintBlock(shape, 40, gain=1, linfunc="avg")
    arrays["imprint normal edges"] = np.array(normal.bins)
    for name, (kind, model, layer, inputs, y, secret) in cases.items():
        kernel, bias, guesses = read(kind, model, inputs, y, secret)
        weights = layer.weight.detach()
        for what, one in (("kernel", kernel), ("weights", weights)):
            by_pixel = one.reshape(-1, *shape).permute(2, 3, 1, 0)
            arrays[f"{name} {what}"] = by_pixel.reshape(192, -1).numpy()
        arrays |= {f"{name} bias": bias.numpy(), f"{name} guesses": images(guesses)}
        arrays[f"{name} biases"] = layer.bias.detach().numpy()
    return arrays


def label_bags(checkout: Path) -> dict:
    """The labels that `infer_labels` of the author code names, with the gradients [F, C]."""
    source = ast.parse((checkout / "image_recognition" / "rlg.py").read_text())
    kept = [one for one in source.body if isinstance(one, (ast.FunctionDef, ast.Import))]
    kept = [one for one in kept if "tqdm" not in ast.unparse(one)]
    # For this network it takes classes with a negative entry, as behind a ReLU, without a program.
    names: dict = {"args": types.SimpleNamespace(model="ResNet50")}
    exec(compile(ast.Module(kept, []), "rlg", "exec"), names)
    rng, arrays = np.random.default_rng(0), {}
    for count in (1, 4, 10):
        features = np.maximum(rng.normal(size=(count, 24)), 0)
        logits = features @ rng.normal(size=(24, 1000)) * 0.05
        y = rng.integers(0, 1000, count)
        errors = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
        errors[np.arange(count), y] -= 1
        kernel = (features.T @ errors / count).astype(np.float32)
        rank, labels = names["infer_labels"](kernel.copy(), gt_k=count, epsilon=1e-10)
        arrays |= {f"bag {count} kernel": kernel, f"bag {count}": np.array(labels)}
        arrays |= {f"bag {count} true": y, f"bag {count} rank": np.array(rank)}
    return arrays


def main(checkout: str, bags: str, path: str) -> None:
    """Computes everything and writes the file."""
    breaching = load(Path(checkout))
    objectives = breaching("attacks.auxiliaries.objectives")
    based = breaching("attacks.optimization_based_attack").OptimizationBasedAttacker
    joint = breaching("attacks.optimization_with_label_attack").OptimizationJointAttacker
    torch.manual_seed(0)
    model, loss = network(), torch.nn.CrossEntropyLoss()
    mean, std = (torch.tensor(v)[None, :, None, None] for v in (MEAN, STD))
    pixels, labels = torch.rand(4, 3, 8, 8), torch.tensor([3, 0, 4, 1])
    x, start = (pixels - mean) / std, torch.randn(4, 3, 8, 8)
    arrays = {"pixels": images(pixels), "labels": labels.numpy(), "start": images(start)}
    arrays |= {f"weights {k}": v for k, v in tree(model.parameters()).items()}

    def slope(x, y):
        return list(torch.autograd.grad(loss(model(x), y), model.parameters()))

    truth = slope(x, labels)
    arrays |= {f"gradient {k}": v for k, v in tree(truth).items()}

    local = {
        "steps": STEPS,
        "data_per_step": PER_STEP,
        "lr": RATE,
        "labels": [labels[:2], labels[2:], labels[:2]],
    }
    for name, hyper in (("one", None), ("local", local)):
        objective = objectives.CosineSimilarity()
        objective.initialize(loss, settings().impl, hyper)
        sent = truth
        if hyper:
            sent, _ = objective._grad_fn(model, x, labels)
            sent = [g.detach() for g in sent]
            arrays |= {f"update {k}": v for k, v in tree(sent).items()}
        candidate = start.clone().requires_grad_()
        value, _ = objective(model, sent, candidate, labels)
        (derivative,) = torch.autograd.grad(value, candidate)
        arrays[f"cosine {name}"] = value.detach().numpy()[0]
        arrays[f"cosine {name} derivative"] = images(derivative)

    config = settings(
        objective={"type": "cosine-similarity"},
        optim={
            "signed": "hard",
            "step_size": 0.1,
            "boxed": True,
            "max_iterations": 40,
            "step_size_decay": "step-lr",
        },
    )
    one, moved = attacker(based, model, config)
    shared = [
        {"gradients": truth, "metadata": {"num_data_points": 4, "local_hyperparams": None}},
    ]
    one._run_trial([model], shared, labels, {"Trial_0_Val": []}, 0, initial_data=start)
    arrays["adam"] = images(moved[0])

    double = network().double()
    double.load_state_dict(model.state_dict())
    sent = torch.autograd.grad(loss(double(x[:1].double()), labels[:1]), double.parameters())
    config = settings(
        # Twice breaching's half of the squares are DLG's squares.
        objective={"scale": 2.0},
        optim={"optimizer": "L-BFGS", "max_iterations": 3},
        impl={"dtype": "double"},
    )
    one, moved = attacker(joint, double, config)
    shared = [
        {"gradients": list(sent), "metadata": {"num_data_points": 1, "local_hyperparams": None}},
    ]
    scores = torch.randn(1, CLASSES).double()
    draw = one._initialize_data
    one._initialize_data = lambda shape: (
        scores.clone().requires_grad_() if tuple(shape) == (1, CLASSES) else draw(shape)
    )
    first = start[:1].double()
    stats = {"Trial_0_Val": []}
    one._run_trial([double], shared, scores, stats, 0, initial_data=first)
    arrays |= {"lbfgs scores": scores.numpy(), "lbfgs": images(moved[0])}
    arrays["lbfgs values"] = np.array(stats["Trial_0_Val"])
    arrays["lbfgs end scores"] = moved[1].detach().numpy()

    for place, batch in enumerate(BATCHES):
        y = torch.tensor(batch)
        gradients = slope((torch.rand(len(batch), 3, 8, 8) - mean) / std, y)
        arrays |= {f"batch {place} {k}": v for k, v in tree(gradients).items()}
        arrays[f"batch {place}"] = y.numpy()
        for strategy in ("iDLG", "yin", "bias-corrected"):
            if strategy == "iDLG" and len(batch) > 1:
                continue
            one, _ = attacker(based, model, settings(label_strategy=strategy))
            shared = [{"gradients": gradients, "metadata": {"num_data_points": len(batch)}}]
            named = one._recover_label_information(shared, None, [model])
            arrays[f"batch {place} {strategy}"] = named.numpy()
    arrays |= batch_norms(breaching, x, start)
    arrays |= text(objectives)
    arrays |= first_layers(breaching, x, pixels, labels)
    arrays |= label_bags(Path(bags))
    np.savez_compressed(path, **arrays)
    print({name: array.shape for name, array in arrays.items()}, arrays["cosine local"])


if __name__ == "__main__":
    main(*sys.argv[1:])
