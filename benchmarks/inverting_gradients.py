"""Inverting gradients over networks, batch sizes and local steps, in evaluation mode.

    python benchmarks/inverting_gradients.py --data-dir DATA --out results/inverting

A network that has not been trained takes gradient steps on the first images of CIFAR10's test set,
with the running statistics of its batch norm in place of the batch's, as in Geiping et al. 2020;
the attack knows the labels. Each line is all images, in messages of one batch. Lines that OUT holds
are kept.
"""

import json
from pathlib import Path
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
import typer

import fedjax_sec
from fedjax_sec.core import make_space, registry
from fedjax_sec.report import plotting
from fedjax_sec.runs import results

NETWORKS = {"ConvNet": {"name": "small_cnn"}, "ResNet20": {"name": "resnet", "depth": 20}}
BATCHES, STEPS = (1, 4, 8), (1, 5)


def updates_of(model, space, params, x, y, steps: int, rate: float):
    """What clients send, [m, D]: their parameters after `steps` steps on all of x [m, n, ...]."""

    def loss(weights, x, y):
        logits = model.apply(space.join(weights, ()), x, train=False, key=None)
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), y[:, None], axis=1).mean()

    def train(x, y):
        slope = jnp.zeros_like(params)
        for _ in range(steps):
            slope = slope + jax.grad(loss)(params - rate * slope, x, y)
        return -rate * slope

    return jax.jit(jax.vmap(train))(x, y)


def measure(network: str, batch: int, steps: int, images, labels, mean, std, rate, fields):
    """One line: the scores of all images, reconstructed from messages of `batch` images each."""
    spec = NETWORKS[network]
    model = registry.models.build(spec).make(images.shape[1:], 10)
    space = make_space(model)
    params = space.split(model.init(jax.random.key(0)))[0]
    x = images.reshape(-1, batch, *images.shape[1:])
    y = labels.reshape(-1, batch)
    updates = updates_of(model, space, params, (np.asarray(x) - mean) / std, y, steps, rate)
    if not np.isfinite(updates).all():
        raise typer.BadParameter(
            f"{network} diverges within {steps} local steps of {batch} image(s) at rate {rate:g}: "
            f"lower --rate."
        )
    made = fedjax_sec.reconstruct(
        updates,
        {"name": "inverting_gradients", "labels": "known", **fields},
        model=spec,
        params=params,
        shape=images.shape[1:],
        num_classes=10,
        examples=batch,
        steps=steps,
        rate=rate,
        labels=y,
        mean=mean,
        std=std,
        truth=(x, y),
        key=1,
    )
    scores = {name: np.ravel(np.asarray(getattr(made.scores, name))) for name in ("psnr", "ssim")}
    # Guesses stand in the order of the images that they are matched to.
    order = np.asarray(made.scores.match)
    guesses = np.take_along_axis(np.asarray(made.x), order[:, :, None, None, None], axis=1).reshape(
        images.shape
    )
    line = {
        "network": network,
        "batch": batch,
        "local steps": steps,
        "rate": rate,
        "images": images.shape[0],
        "PSNR (dB)": float(scores["psnr"].mean()),
        "best PSNR (dB)": float(scores["psnr"].max()),
        "SSIM": float(scores["ssim"].mean()),
        "loss": float(np.mean(made.loss)),
        **fields,
    }
    return line, guesses


def main(
    out: Annotated[Path, typer.Option(help="Folder for the table and the pictures.")],
    data_dir: Annotated[Path | None, typer.Option(help="Prepared data sets.")] = None,
    network: Annotated[list[str] | None, typer.Option(help="ConvNet, ResNet20; all.")] = None,
    images: Annotated[int, typer.Option(help="A multiple of 8.", min=8)] = 8,
    iterations: Annotated[int, typer.Option(help="Steps of Adam; author code: 24000.")] = 24_000,
    steps: Annotated[list[int] | None, typer.Option(help="Local steps: 1 and 5.", min=1)] = None,
    rate: Annotated[float, typer.Option(help="Of the local steps.")] = 1e-3,
    restarts: Annotated[int, typer.Option(help="Independent starts.")] = 1,
    total_variation: Annotated[float, typer.Option(help="Its weight.")] = 1e-4,
) -> None:
    """Writes `inverting.json`, `inverting.md` and a picture for each network."""
    if images % max(BATCHES):
        raise typer.BadParameter(f"--images must be a multiple of {max(BATCHES)}, got {images}.")
    dataset = registry.datasets.build("cifar10")
    source = dataset.load(None if data_dir is None else str(data_dir), True)
    x = jnp.asarray(source.x_test[:images], jnp.float32) / 255
    y = jnp.asarray(source.y_test[:images])
    mean, std = np.array(source.mean), np.array(source.std)
    fields = {
        "iterations": iterations,
        "restarts": restarts,
        "total_variation": total_variation,
    }
    out.mkdir(parents=True, exist_ok=True)
    path = out / "inverting.json"
    lines = json.loads(path.read_text()) if path.exists() else []
    for name in network or NETWORKS:
        strips = [plotting.Strip("original", np.asarray(x), [])]
        for count in steps or STEPS:
            for batch in BATCHES:
                wanted = {"network": name, "batch": batch, "local steps": count, "images": images}
                wanted |= {"rate": rate} | fields
                kept = out / f"{name}-{batch}-{count}.npy"
                if not any(wanted.items() <= line.items() for line in lines) or not kept.exists():
                    line, made = measure(name, batch, count, x, y, mean, std, rate, fields)
                    np.save(kept, made)
                    lines = [one for one in lines if not wanted.items() <= one.items()] + [line]
                    path.write_text(json.dumps(results.to_json(lines), indent=2) + "\n")
                    print(line)
                guesses = np.load(kept)
                errors = np.mean((guesses - np.asarray(x)) ** 2, axis=(1, 2, 3))
                notes = [f"{-10 * np.log10(error):.1f} dB" for error in errors]
                steps_of = f"batch {batch}, {count} step{'s' * (count > 1)}"
                strips.append(plotting.Strip(steps_of, guesses, notes))
        title = f"{name} on CIFAR10, {iterations} iterations, best of {restarts}"
        plotting.strips(strips, title, out / f"{name}.png")
    _write(lines, out / "inverting.md")


def _write(lines: list[dict], path: Path) -> None:
    import pandas as pd

    path.write_text(pd.DataFrame(lines).to_markdown(index=False, floatfmt=".3g") + "\n")


if __name__ == "__main__":
    typer.run(main)
