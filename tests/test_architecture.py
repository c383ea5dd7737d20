"""The directions of imports, and what the package's text must not hold."""

import ast
import importlib
import re
import sys
from pathlib import Path

import jax
import pytest

import fedjax_sec

PACKAGE = Path(fedjax_sec.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
COMPONENTS = ("datasets", "partitions", "models", "clients", "attacks", "defenses")
BASE = {"types", "registry", "schema", "caching", "advice", "files"}


def module_of(path: Path) -> str:
    """`fedjax_sec/ops/sorting.py` -> `ops.sorting`; a package is its folder."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path: Path, at_import_time=False) -> set[str]:
    """The modules a file imports, ours without `fedjax_sec.`, others with `~` in front."""
    tree = ast.parse(path.read_text())
    inside_functions = {
        node
        for function in ast.walk(tree)
        if isinstance(function, (ast.FunctionDef, ast.Lambda))
        for node in ast.walk(function)
    }
    found = set()
    for node in ast.walk(tree):
        if at_import_time and node in inside_functions:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: relative import"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                known = {f"fedjax_sec.{module_of(file)}" for file in FILES}
                found.add(full if full in known else node.module)
    return {
        name.removeprefix("fedjax_sec.") if name.startswith("fedjax_sec") else f"~{name}"
        for name in found
    }


def ours(names) -> set[str]:
    return {name for name in names if name in {module_of(file) for file in FILES} and name}


GRAPH = {module_of(path): imports_of(path) for path in FILES}


def test_there_is_something_to_look_at():
    assert len(GRAPH) > 40 and "schema" in GRAPH["registry"] and "defenses.krum" in GRAPH
    assert "ops.distances" in GRAPH["defenses.krum"]


@pytest.mark.parametrize("name", ["types", "schema", "caching", "advice"])
def test_the_base_imports_nothing_of_ours(name):
    allowed = {"advice"} if name == "schema" else set()
    assert ours(GRAPH[name]) == allowed and "fedjax_sec" not in GRAPH[name]


def test_files_import_the_error_only():
    assert ours(GRAPH["files"]) == {"schema"}


REMOVING = {"rmtree", "unlink", "rmdir", "remove", "rename", "mkdtemp"}


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_only_files_removes(path):
    """`files.py` removes by name; elsewhere a folder that is not ours could be meant."""
    called = [
        node.func
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
    ]
    names = {f.attr for f in called if f.attr in REMOVING and ast.unparse(f.value) != "files"}
    names |= {ast.unparse(f) for f in called} & {"os.replace", "shutil.move", "Path.replace"}
    if module_of(path) == "files":
        assert names == {"unlink", "rmdir", "os.replace"}
    else:
        assert names - {"remove"} == set()
        assert "remove" not in names or module_of(path) in ("results", "sweep")  # of our classes


def test_registry_imports_no_component():
    at_import_time = ours(imports_of(PACKAGE / "registry.py", at_import_time=True))
    assert at_import_time == {"schema", "advice", "host"}
    assert ours(GRAPH["registry"]) <= {"schema", "advice", "host", "optimizers", "pipeline"}


def test_ops_import_ops_and_types_only():
    for name, imported in GRAPH.items():
        if name.split(".")[0] == "ops":
            assert {i for i in ours(imported) if i.split(".")[0] not in ("ops", "types")} == set()


@pytest.mark.parametrize("name", [n for n in GRAPH if n.split(".")[0] in COMPONENTS])
def test_components_import_the_base_and_ops_only(name):
    folder = name.rpartition(".")[0] if name.split(".")[0] in GRAPH else name
    for imported in ours(GRAPH[name]):
        helper = imported.rpartition(".")[0] == folder and imported.split(".")[-1][0] == "_"
        shared = imported in ("datasets", "datasets.source", "datasets.packing")
        allowed = imported in BASE or imported.split(".")[0] == "ops" or helper
        if name.split(".")[0] in ("datasets", "partitions"):
            allowed = allowed or shared
        assert allowed, f"{name} imports {imported}"


def test_only_models_import_flax():
    for name, imported in GRAPH.items():
        if any(i.split(".")[0] == "~flax" for i in imported):
            assert name.split(".")[0] == "models"


def test_layers_from_round_to_command_line():
    order = [
        "types", "round", "preparation", "trained", "program", "experiment", "sweep", "papers",
        "cli",
    ]  # fmt: skip
    for name, imported in GRAPH.items():
        layer = name.split(".")[0]
        for other in ours(imported):
            other = other.split(".")[0]
            if layer in order and other in order:
                assert order.index(other) <= order.index(layer), f"{name} imports {other}"


def test_nothing_imports_the_command_line():
    assert [name for name, imported in GRAPH.items() if "cli" in imported] == []
    assert "cli" in GRAPH


def test_no_import_cycles():
    graph = {module_of(p): ours(imports_of(p, at_import_time=True)) for p in FILES}
    done, active = set(), []

    def visit(name):
        assert name not in active, f"import cycle: {' -> '.join([*active, name])}"
        if name not in done:
            active.append(name)
            for other in graph[name]:
                visit(other)
            active.pop()
            done.add(name)

    for name in graph:
        visit(name)
    assert len(done) == len(graph)


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_text_holds_no_machine_paths(path):
    text = path.read_text()
    found = re.findall(r"""["'\s(](/(?:home|root|work|tmp|mnt|Users|data|opt)/[^\s"']*)""", text)
    assert not found
    assert text.startswith(('"""', 'r"""', "#")), "a module begins with its docstring"


@pytest.mark.parametrize("name", sorted(GRAPH))
def test_importing_a_module_makes_no_arrays(name):
    """Components are imported when first named, perhaps within a trace, and would leak arrays."""
    module = sys.modules.get(f"fedjax_sec.{name}") if name else fedjax_sec
    if module is None:
        try:
            module = importlib.import_module(f"fedjax_sec.{name}")
        except ImportError as error:  # an extra that is not installed
            pytest.skip(str(error))
    made = [key for key, value in vars(module).items() if isinstance(value, jax.Array)]
    assert not made, f"{name} holds {made}: use NumPy for constants"
