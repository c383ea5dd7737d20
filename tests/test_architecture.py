"""The total order of imports, and what the package's text and modules must not hold."""

import ast
import graphlib
import importlib
import re
import sys
from pathlib import Path

import jax

import fedjax_sec

PACKAGE = Path(fedjax_sec.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))

DOCUMENT = PACKAGE.parent / "docs" / "architecture.md"
BEGIN, END = "<!-- layers -->\n", "<!-- end of layers -->\n"

#: A module imports from its own layer and from those above it in this list; parts of one layer,
#: which stand in one line, never import each other. `docs/architecture.md` prints it.
LAYERS = (
    ("core",),
    ("ops",),
    (
        "data",
        "models",
        "tasks",
        "algorithms",
        "attacks",
        "defenses",
        "monitors",
        "evaluation",
    ),
    ("round",),
    ("runs",),
    ("sweeps", "fedml"),
    ("report",),
    ("stacks", "progress"),
    ("api",),
    ("privacy",),
    ("",),  # `import fedjax_sec`: what a user types
    ("papers",),
    ("flower",),
    ("bench", "testing"),
    ("cli",),
    ("__main__",),
)
LEVEL = {part: level for level, parts in enumerate(LAYERS) for part in parts}
REMOVING = {"rmtree", "unlink", "rmdir", "remove", "rename", "mkdtemp"}


def module_of(path: Path) -> str:
    """`fedjax_sec/ops/sorting.py` -> `ops.sorting`; a package is its folder."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in FILES}


def imports_of(path: Path) -> set[str]:
    """The modules a file imports, ours without `fedjax_sec.`, others with `~` in front."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: relative import"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                names.add(full if full.removeprefix("fedjax_sec.") in MODULES else node.module)
    return {
        name.removeprefix("fedjax_sec").removeprefix(".")
        if name.split(".")[0] == "fedjax_sec"
        else f"~{name}"
        for name in names
    }


def wrong_imports(name: str, imported: set[str]) -> list[str]:
    """A module's imports against the order, or from a component's private neighbour."""
    part, wrong = name.split(".")[0], []
    for other in imported:
        if other.startswith("~"):
            if other.startswith("~flax") and part != "models" and name != "ops.interception":
                wrong.append(other)
            continue
        over = other.split(".")[0]
        same = part == over
        home = other.rpartition(".")[0]  # a package gathers what its private modules define
        private = "._" in other and home not in (name, name.rpartition(".")[0])
        if LEVEL[over] > LEVEL[part] or (not same and LEVEL[over] == LEVEL[part]) or private:
            wrong.append(other)
    return wrong


def folders_of_components() -> set[str]:
    packages = {p for one in fedjax_sec.core.registry.KINDS.values() for p in one.packages}
    return {package.removeprefix("fedjax_sec.") for package in packages}


def components_import_each_other(name: str, imported: set[str]) -> list[str]:
    """The components that a component imports: what they share belongs in `ops` or a `_helper`."""
    folders = folders_of_components()
    if name.rpartition(".")[0] not in folders:
        return []
    return [
        other
        for other in imported
        if other.rpartition(".")[0] in folders and not other.rpartition(".")[2].startswith("_")
    ]


def _parents(name: str) -> set[str]:
    """The packages that a module lies in: their `__init__` gathers what it defines."""
    parts = name.split(".")
    return {".".join(parts[:i]) for i in range(len(parts))}


def test_every_module_has_a_layer_and_imports_run_one_way():
    assert len(MODULES) > 100 and {name.split(".")[0] for name in MODULES} == set(LEVEL)
    graph = {name: imports_of(path) for name, path in MODULES.items()}
    assert {"core", "ops.distances"} <= graph["defenses.krum"]
    wrong = {name: wrong_imports(name, imported) for name, imported in graph.items()}
    assert not {name: result for name, result in wrong.items() if result}
    beside = {
        name: components_import_each_other(name, imported) for name, imported in graph.items()
    }
    assert not {name: result for name, result in beside.items() if result}
    deep = {
        name
        for name, path in MODULES.items()
        if name.rpartition(".")[0] in folders_of_components()
        and not name.rpartition(".")[2].startswith("_")
        and "from fedjax_sec.core." in re.sub(r">>> .*", "", path.read_text())
    }
    assert not deep, f"{deep} import from elsewhere than fedjax_sec.core, the one public place"
    ours = {
        name: [o for o in imported if o in MODULES and o != name]
        for name, imported in graph.items()
    }
    graphlib.TopologicalSorter(
        {name: [o for o in others if o not in _parents(name)] for name, others in ours.items()}
    ).prepare()  # raises CycleError
    # The rules see a breach: each of these is refused.
    assert wrong_imports("ops.sorting", {"round.step"}) and wrong_imports("runs.config", {"cli"})
    assert wrong_imports("defenses.krum", {"attacks.update.alie"})
    assert wrong_imports("runs.config", {"data.sources._tfds"})
    assert wrong_imports("round.step", {"~flax.linen"})
    assert components_import_each_other("defenses.krum", {"defenses.mean"})


def test_only_files_removes_and_no_text_holds_machine_paths():
    """`core/files.py` removes by name; elsewhere a folder that is not ours could be meant."""
    for name, path in MODULES.items():
        text = path.read_text()
        assert not re.findall(
            r"""["'\s(](/(?:home|root|work|tmp|mnt|Users|data|opt)/[^\s"']*)""", text
        ), name
        assert text.startswith(('"""', 'r"""', "#")), f"{name} does not begin with its docstring"
        calls = [node.func for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)]
        methods = [call for call in calls if isinstance(call, ast.Attribute)]
        names = {f.attr for f in methods if f.attr in REMOVING and ast.unparse(f.value) != "files"}
        names |= {ast.unparse(f) for f in calls} & {"os.replace", "shutil.move", "Path.replace"}
        if name == "core.files":
            assert names == {"unlink", "rmdir", "os.replace"}
        else:
            assert names <= {"remove"}, f"{name} calls {names}"
            assert not names or name in ("runs.results", "sweeps.groups"), f"{name}: {names}"


def test_importing_a_module_makes_no_arrays():
    """Components are imported when first named, perhaps within a trace, and would leak arrays."""
    looked_at = 0
    for name in sorted(MODULES):
        full = f"fedjax_sec.{name}" if name else "fedjax_sec"
        try:
            module = sys.modules.get(full) or importlib.import_module(full)
        except ImportError as error:
            assert "fedjax_sec" not in str(error.name), error  # an extra that is not installed
            continue
        made = [key for key, value in vars(module).items() if isinstance(value, jax.Array)]
        assert not made, f"{name} holds {made}: use NumPy for constants"
        looked_at += 1
    assert looked_at > 100


def layers_table() -> str:
    """The layers as `docs/architecture.md` prints them, with what each package says of itself."""
    lines = ["| layer | package | modules | what it is |", "| --- | --- | --- | --- |"]
    for number, parts in enumerate(LAYERS, 1):
        for part in parts:
            names = [name for name in MODULES if name.split(".")[0] == part]
            summary = ast.get_docstring(ast.parse(MODULES[part].read_text())).splitlines()[0]
            label = part or "fedjax_sec"
            lines.append(f"| {number} | `{label}` | {len(names)} | {summary} |")
    return "\n".join(lines) + "\n"


def documented(text: str) -> tuple[str, str, str]:
    """The text before, in and behind the table of the document."""
    before, rest = text.split(BEGIN)
    table, after = rest.split(END)
    return before, table, after


def test_the_document_shows_the_layers():
    table = documented(DOCUMENT.read_text())[1]
    assert table == layers_table(), "python tests/test_architecture.py makes it anew"


if __name__ == "__main__":
    head, _, tail = documented(DOCUMENT.read_text())
    DOCUMENT.write_text(head + BEGIN + layers_table() + END + tail)
