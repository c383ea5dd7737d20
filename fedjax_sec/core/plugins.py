"""Components of other people: installed plug-ins, and modules or files that are named.

A package offers components by the entry-point group `fedjax_sec.components`: each entry names a
module whose import registers them, `NAME = "PACKAGE.MODULE"`. They are loaded when components are
first looked up. A single module or file is named by `--import` on the command line, or by `imports`
in a configuration.
"""

import hashlib
import importlib
import importlib.metadata
import importlib.util
import os
import sys
import traceback
import warnings
from collections.abc import Iterable
from pathlib import Path

from fedjax_sec.core import host
from fedjax_sec.core.advice import one_line, shown
from fedjax_sec.core.fields import ConfigError

GROUP = "fedjax_sec.components"

#: Whether the installed plug-ins were loaded, and what was wrong with those that could not be.
_loaded = False
_broken: list[str] = []
#: file -> digest of its content when it was imported.
_files: dict[str, str] = {}


def load_installed() -> None:
    """Imports all installed plug-ins, once in a process.

    One that cannot be imported is a warning that names it: others, and what is ours, still work.
    """
    global _loaded
    if _loaded:
        return
    _loaded = True
    for entry in importlib.metadata.entry_points(group=GROUP):
        try:
            entry.load()
        except (Exception, SystemExit) as error:
            by = "" if entry.dist is None else f" of {entry.dist.name} {entry.dist.version}"
            problem = (
                f"the plug-in {entry.name!r}{by} ({entry.value}) cannot be imported: "
                f"{_reason(error)}"
            )
            _broken.append(problem)
            warnings.warn(f"Left out: {problem}", stacklevel=2)


def broken() -> str:
    """The faults of installed plug-ins, to be added to the message about an unknown name."""
    return "".join(f" Note: {problem}" for problem in _broken)


def import_all(specs: Iterable[str] | str | None, at: str, folder: Path | None = None) -> list[str]:
    """Imports modules and files in order; returns them as they are to be written down.

    A file is written with its absolute path, so that a run finds it again wherever it is resumed.
    A relative path is relative to `folder` (None: the working directory).

    Raises: `ConfigError` that names the file and line of an exception inside one.
    """
    if specs is None:
        return []
    specs = [specs] if isinstance(specs, str) else specs
    if not isinstance(specs, (list, tuple)):
        raise ConfigError(
            f"{at} must be a list of modules and files, such as [my_rules.py], got {shown(specs)}."
        )
    named = [resolved(spec, at, folder) for spec in specs]
    for spec in named:
        _import(spec, at)
    return list(dict.fromkeys(named))


def joined(given, more: Iterable[str]) -> list[str]:
    """A configuration's `imports`, whatever was given, and more behind them.

    >>> joined("a.py", ["b"])
    ['a.py', 'b']
    """
    given = [] if given is None else given
    return [*(given if isinstance(given, (list, tuple)) else [given]), *more]


def resolved(spec: str, at: str, folder: Path | None = None) -> str:
    """A module's name as it is, a file with its absolute path."""
    if not isinstance(spec, str) or not spec.strip():
        raise ConfigError(f"{at}: a module or a file such as my_rules.py, got {shown(spec)}.")
    if not _is_file(spec):
        return spec
    path = Path(spec).expanduser()
    return str((path if folder is None else folder / path).absolute())


def _is_file(spec: str) -> bool:
    return spec.endswith(".py") or os.sep in spec


def _import(spec: str, at: str) -> None:
    with host.imports_unnoticed():
        try:
            if _is_file(spec):
                _import_file(Path(spec), at)
            else:
                importlib.import_module(spec)
        except (Exception, SystemExit) as error:
            missing = isinstance(error, ModuleNotFoundError) and error.name == spec.split(".")[0]
            if not _is_file(spec) and (missing or isinstance(error, TypeError)):
                raise ConfigError(
                    f"{at}: there is no module {spec!r} among those that Python finds; for a file "
                    f"give its path, such as {spec.split('.')[0]}.py."
                ) from error
            if isinstance(error, _NoFile):
                raise ConfigError(str(error)) from None
            reason = _reason(error, spec)
            raise ConfigError(f"{at}: {spec!r} cannot be imported: {reason}") from error


class _NoFile(ConfigError):
    """A file that is not there."""


def _import_file(path: Path, at: str) -> None:
    """Imports a file as a module of its own name; one that did not change is not run again."""
    if not path.is_file():
        raise _NoFile(f"{at}: there is no file {str(path)!r}.")
    content = path.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    if _files.get(str(path)) == digest:
        return
    # The name is the path's, so that a file that was edited defines its components again.
    place = hashlib.sha256(str(path).encode()).hexdigest()[:8]
    name = f"fedjax_sec_import_{path.stem}_{place}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise _NoFile(f"{at}: {str(path)!r} is no Python file.")
    module = importlib.util.module_from_spec(spec)
    before = sys.modules.get(name)
    sys.modules[name] = module  # annotations and pickles look their module up
    try:
        exec(compile(content, str(path), "exec"), module.__dict__)
    except BaseException:
        if before is None:
            del sys.modules[name]
        else:
            sys.modules[name] = before
        raise
    _files[str(path)] = digest


def _reason(error: BaseException, file: str = "") -> str:
    """The exception with the file and line where it was raised, if possible inside `file`."""
    said = f"{type(error).__name__}: {one_line(error, 200)}" if str(error) else type(error).__name__
    if isinstance(error, SyntaxError) and error.filename:
        return f"{said} ({error.filename}, line {error.lineno})."
    frames = traceback.extract_tb(error.__traceback__)
    inside = [frame for frame in frames if frame.filename == file]
    ours = str(Path(__file__).parent)
    others = [f for f in frames if not f.filename.startswith((ours, "<frozen"))]
    frame = (inside or others or frames)[-1]
    return f"{said.rstrip('.')} ({frame.filename}, line {frame.lineno})."
