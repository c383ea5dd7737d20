"""Poisoned examples as pictures: of each backdoor of a folder, clean beside stamped."""

import base64
import io
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from fedjax_sec.core import ConfigError
from fedjax_sec.report.inspection import Pictures, backdoor_pictures
from fedjax_sec.report.page.folder import Cell
from fedjax_sec.runs import config as config_lib

#: Backdoors that are drawn, and images of each.
BACKDOORS, IMAGES = 12, 4


def pictures(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """For each backdoor its title, what is said of it, and rows of images as `data:` addresses.

    The data set is read for them; where it is not here, the reason stands in place of images.
    """
    groups: dict[str, list[Cell]] = {}
    for cell in cells:
        evaluated = cell.config.get("evaluation", {}).get("backdoor")
        if cell.runs[0].attacked or evaluated is not None:
            parts = (cell.config.get("attack"), evaluated, cell.config.get("data"))
            groups.setdefault(json.dumps(parts, sort_keys=True), []).append(cell)
    made: dict[str, dict[str, Any]] = {}
    for some in groups.values():
        if len(made) == BACKDOORS:
            break
        _add(made, some)
    return list(made.values())


def _add(made: dict[str, dict[str, Any]], cells: Sequence[Cell]) -> None:
    """Adds the pictures of cells of one attack, or only the cells where they are there already."""
    titles = [cell.title for cell in cells]
    try:
        experiment = config_lib.from_mapping(cells[0].config)
        if experiment.backdoor is None:
            return
        known = json.dumps([repr(experiment.backdoor), repr(experiment.data)])
        if known not in made:
            drawn = _drawn(backdoor_pictures(experiment, IMAGES))
            title = f"{experiment.backdoor.registered_name}, {experiment.data.name}"
            made[known] = {"title": title, "titles": [], "reason": "", **drawn}
    except (ConfigError, OSError) as error:
        known = str(error)
        made[known] = {"title": titles[0], "titles": [], "rows": [], "under": []}
        made[known]["reason"] = f" There are no pictures: {error}"
    one = made[known]
    one["titles"] += titles
    named = "; ".join(one["titles"][:6])
    more = f" and {len(one['titles']) - 6} more" if len(one["titles"]) > 6 else ""
    one["said"] = f"In {named}{more}.{one['reason']}"


def _drawn(drawn: Pictures) -> dict[str, Any]:
    change = 0.5 + 0.5 * (np.asarray(drawn.stamped) - np.asarray(drawn.clean))
    rows = [("clean", drawn.clean), ("stamped", drawn.stamped), ("difference (grey: none)", change)]
    for ranks, images in drawn.parts.items():
        shown = ", ".join(map(str, ranks[:3])) + (", ..." if len(ranks) > 3 else "")
        rows.append((f"malicious client {shown}", images))
    under = [
        f"{label} read as {target}"
        for label, target in zip(drawn.labels, drawn.targets, strict=True)
    ]
    return {
        "rows": [{"name": name, "images": [png(one) for one in images]} for name, images in rows],
        "under": under,
    }


def png(image: np.ndarray) -> str:
    """An image [H, W, C] in [0, 1] as a `data:` address.

    >>> png(np.zeros((2, 2, 1)))[:22]
    'data:image/png;base64,'
    """
    pixels = np.clip(np.asarray(image, float) * 255, 0, 255).round().astype(np.uint8)
    grey = pixels.shape[-1] != 3
    file = io.BytesIO()
    Image.fromarray(pixels[..., 0] if grey else pixels).save(file, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
