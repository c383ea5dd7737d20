"""Records what torchattacks finds on a small network, which `tests/test_evasion.py` compares with.

    pip install torch torchattacks==3.5.1 scikit-learn
    python benchmarks/evasion_reference.py tests/golden/evasion.npz

The file holds the weights of a perceptron 64-32-10 that was trained on digits moved by FGSM, its
test digits, how many of them withstand each attack of `ATTACKS`, and the inputs that those without
randomness found. All are L-infinity with radius 0.1 and pixels in [0, 1].
"""

import sys

import numpy as np
import torch
import torchattacks
from sklearn.datasets import load_digits

EPS = 0.1
FIXED = ("fgsm", "pgd", "pgd momentum")  # nothing is random in them
ATTACKS = {
    "fgsm": lambda model: torchattacks.FGSM(model, eps=EPS),
    "pgd": lambda model: torchattacks.PGD(model, EPS, 0.01, 40, random_start=False),
    "pgd random start": lambda model: torchattacks.PGD(model, EPS, 0.01, 40, random_start=True),
    "pgd momentum": lambda model: torchattacks.MIFGSM(model, EPS, 0.01, 40, decay=1.0),
    "apgd": lambda model: torchattacks.APGD(model, "Linf", EPS, 100, 1, seed=0, loss="ce"),
    "apgd dlr": lambda model: torchattacks.APGD(model, "Linf", EPS, 100, 1, seed=0, loss="dlr"),
    "apgd targets": lambda model: torchattacks.APGDT(model, "Linf", EPS, 100, 1, seed=0),
}


def main(path: str) -> None:
    """Trains, attacks and writes the file."""
    torch.manual_seed(0)
    data = load_digits()
    x = torch.tensor(data.data / 16, dtype=torch.float32).reshape(-1, 1, 8, 8)
    y = torch.tensor(data.target)
    model = torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 10)
    )
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    fgsm = torchattacks.FGSM(model, eps=EPS)
    for _ in range(30):
        for rows in torch.randperm(1400).split(50):
            moved = fgsm(x[rows], y[rows])
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(moved), y[rows]).backward()
            optimizer.step()
    x, y = x[1400:], y[1400:]
    arrays = {"x": x.numpy()[:, 0, :, :, None], "y": y.numpy().astype(np.int32)}
    for name, tensor in zip(("w0", "b0", "w1", "b1"), model.parameters(), strict=True):
        arrays[name] = tensor.detach().numpy().T
    for name, make in ATTACKS.items():
        moved = make(model)(x, y).detach()
        if name in FIXED:
            arrays[name] = moved.numpy()[:, 0, :, :, None].astype(np.float16)
        robust_mask = (model(moved).argmax(1) == y).sum().item()
        arrays[f"{name}: withstood"] = np.int32(robust_mask)
        print(f"{name}: {robust_mask} of {len(y)}")
    np.savez_compressed(path, **arrays)


if __name__ == "__main__":
    main(sys.argv[1])
