"""YAML text as plain values: of bounded size, and with references to its own keys only."""

import io
import os
import re
from pathlib import Path

import yaml
from omegaconf import OmegaConf

from fedjax_sec.core.advice import one_line, shown
from fedjax_sec.core.fields import ConfigError

#: Limits far beyond any configuration: bytes of a file, levels inside one another, values after
#: aliases are written out, references.
BYTES, LEVELS, VALUES, REFERENCES = 2**20, 40, 100_000, 32

_QUICK = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

_REFERENCE = re.compile(r"\$\{[\w.\[\]-]+\}")  # of a key: neither a resolver nor nested


def read_text(path: str | os.PathLike) -> str:
    """The text of a configuration file; `ConfigError` where there is none that can be read."""
    if not isinstance(path, (str, os.PathLike)):
        raise ConfigError(
            f"Expected the path of a configuration file or a mapping, got {shown(path)} "
            f"({type(path).__name__})."
        )
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"No configuration file {str(path)!r}.")
    try:
        if path.stat().st_size > BYTES:
            raise ConfigError(f"{path} is larger than {BYTES} bytes, so it is no configuration.")
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is no text in UTF-8: {error}. Save it as UTF-8.") from error
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}.") from error


def holds(text: str, value) -> bool:
    """Whether a text plainly writes out a value of JSON's types, found out ten times as quickly.

    False leaves it to `parse`, which checks the text and knows more ways to write a number.

    >>> holds("{a: [1, 0.5], b: null}", {"a": [1, 0.5], "b": None}), holds("a: 1e-3", {"a": 1e-3})
    (True, False)
    """
    try:
        return yaml.load(text, Loader=_QUICK) == value
    except (yaml.YAMLError, ValueError, RecursionError):
        return False


def parse(text: str, where: str, with_references: bool = True):
    """The value of a YAML text, its references resolved; `where` begins every message.

    Raises `ConfigError` for a text that cannot be read, is too large, or refers to what is outside
    of it, or to anything at all if it is not `with_references`.

    >>> parse("a: 1e-3\\nb: ${a}", "text")
    {'a': 0.001, 'b': 0.001}
    """
    try:
        _check_size(text, where)
        config = OmegaConf.load(io.StringIO(text))
        _check_references(OmegaConf.to_container(config), where, with_references)
        return OmegaConf.to_container(config, resolve=True)
    except ConfigError:
        raise
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        at = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        tab = " Indent with blanks, not tabs." if "'\\t'" in str(error.problem) else ""
        problem = one_line(f"{error.context or ''} {error.problem}".strip())
        raise ConfigError(f"{where}{at}: not readable YAML: {problem}.{tab}") from error
    except Exception as error:  # of many kinds, all about this text
        raise ConfigError(f"{where}: not readable YAML: {one_line(error)}") from error


def _check_size(text: str, where: str) -> None:
    """Counts before anything is built: few aliases of aliases write out to billions of values."""
    sizes, opened, total = {}, [], 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        size = 1
        if isinstance(event, yaml.AliasEvent):
            if event.anchor not in sizes:
                raise ConfigError(
                    f"{where}: the alias *{event.anchor} stands for itself, or for nothing."
                )
            size = sizes[event.anchor]
        elif isinstance(event, yaml.CollectionStartEvent):
            opened.append((event.anchor, total))
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = opened.pop()
            sizes[anchor] = total - before
        elif not isinstance(event, yaml.ScalarEvent):
            continue
        elif not opened and event.value:
            raise ConfigError(f"{where} must hold keys and values, got {shown(event.value)}.")
        elif event.anchor:
            sizes[event.anchor] = 1
        total += size
        if len(opened) > LEVELS:
            raise ConfigError(f"{where}: more than {LEVELS} levels inside one another.")
        if total > VALUES:
            raise ConfigError(f"{where}: more than {VALUES} values, so it is no configuration.")


def _check_references(value, where: str, allowed: bool) -> None:
    """Refuses what reaches beyond the file: a resolver would copy, say, the environment into it."""
    count = 0
    for key, text in _texts(value):
        if "${" in text and not allowed:
            raise ConfigError(
                f"{where}: {shown(text)} is a reference, which only a file resolves, and only to "
                f'its own keys. Give the value itself; the shell fills in "$NAME".'
            )
        references = _REFERENCE.findall(text)
        count += len(references)
        if text.count("${") > len(references):
            raise ConfigError(
                f"{where}: {key}: {shown(text)} takes its value from outside the file. Give it on "
                f"the command line instead, KEY.PATH=VALUE (a data folder also by --data-dir or "
                f"TFDS_DATA_DIR); only keys of the file itself can be referred to, ${{rounds}}."
            )
    if count > REFERENCES:
        raise ConfigError(f"{where}: {count} references, of which {REFERENCES} are allowed.")


def _texts(value, path: str = ""):
    if isinstance(value, dict):
        for key, item in value.items():
            yield path or str(key), str(key)
            yield from _texts(item, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list):
        for i, item in enumerate(value):
            yield from _texts(item, f"{path}[{i}]")
    elif isinstance(value, str):
        yield path, value
