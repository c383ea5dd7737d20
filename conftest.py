"""Modules whose library is not installed hold no tests here."""

import importlib.util

#: Library -> the modules of the package that import it.
_NEED = {
    "torch": ("bench/torch_loop.py", "bench/torch_inversion.py"),
    "flwr": tuple(
        f"flower/{name}.py" for name in ("apps", "loopback", "network", "strategy", "wire")
    ),
}

collect_ignore = [
    f"fedjax_sec/{module}"
    for library, modules in _NEED.items()
    if importlib.util.find_spec(library) is None
    for module in modules
]
if importlib.util.find_spec("flwr") is None:
    collect_ignore.append("tests/flower")
