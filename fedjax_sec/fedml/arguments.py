"""FedML's arguments as one namespace, and notes on what became of each."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from fedjax_sec.core import ConfigError, shown

#: Kinds of notes, in the order in which they are shown, with their headings.
KINDS = {
    "missing": "No counterpart of ours, left out",
    "idle": "FedML itself does nothing with it, or stops",
    "differs": "Computed otherwise here than in FedML",
    "place": "Where and how FedML runs; of no effect on results",
}


class Note(NamedTuple):
    """The fate of a key: `kind` is one of `KINDS`."""

    kind: str
    key: str
    text: str

    def __str__(self):
        return f"{self.key}: {self.text}" if self.text else self.key


class Arguments:
    """FedML's sections in one namespace, where a later section wins (`arguments.py`).

    Keys count as read once they are asked for; `unread` are the others.

    >>> args = Arguments({"attack_args": {"f": 1}, "defense_args": {"f": 2}})
    >>> args.get("f"), args.at("f"), args.notes[0].text
    (2, 'defense_args.f', 'FedML reads defense_args.f = 2, which comes later')
    """

    def __init__(self, config: Mapping, source: str = ""):
        self.notes: list[Note] = []
        self._values: dict[str, Any] = {}
        self._sections: dict[str, str] = {}
        self._read: set[str] = set()
        if not isinstance(config, Mapping) or not config:
            raise ConfigError(
                f"{source or 'config'}: a configuration of FedML is a mapping of sections such as "
                f"attack_args, got {shown(config) if config else 'nothing'}."
            )
        for section, values in config.items():
            if not isinstance(values, Mapping):
                raise ConfigError(
                    f"{section}: a configuration of FedML holds sections such as train_args, each "
                    f"a mapping, got {shown(values)}."
                )
            for key, value in values.items():
                self._set(str(section), str(key), value)

    def _set(self, section: str, key: str, value) -> None:
        if key in self._values and self._values[key] != value:
            self.note(
                "idle",
                self.at(key),
                f"FedML reads {section}.{key} = {shown(value)}, which comes later",
            )
        self._values[key], self._sections[key] = value, section

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def at(self, key: str, section: str = "") -> str:
        """The key with its section, which is `section` where it is not given."""
        return f"{self._sections.get(key, section)}.{key}".lstrip(".")

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a key, or the default where it is not given."""
        self._read.add(key)
        return self._values.get(key, default)

    def number(self, key: str, default: float | None = None, *, only: type | None = None) -> Any:
        """A number; with `only`, FedML reads values of that type alone, and else its default."""
        value = self.get(key)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ConfigError(f"{self.at(key)} must be a number, got {shown(value)}.")
        if only is not None and not isinstance(value, only):
            instead = "none" if default is None else shown(default)
            self.note(
                "idle",
                self.at(key),
                f"FedML reads {'an integer' if only is int else 'a number with a point'} only, so "
                f"{shown(value)} is not read; {instead} here, as there",
            )
            return default
        return value

    def count(self, key: str, default: int | None = None, *, low: int = 0) -> int:
        """A whole number; `ConfigError` where it is missing and there is no default."""
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < low:
            missing = value is None and key not in self
            raise ConfigError(
                f"{self.at(key)} must be an integer >= {low}, "
                f"{'and is missing' if missing else f'got {shown(value)}'}."
            )
        return value

    def text(self, key: str, default: str = "") -> str:
        """A text as FedML compares it, without blanks around it."""
        value = self.get(key, default)
        return "None" if value is None else str(value).strip()

    def note(self, kind: str, key: str, text: str) -> None:
        """Adds a note."""
        self.notes.append(Note(kind, key, text))

    def unread(self) -> list[str]:
        """The keys that nobody asked for, in order."""
        return [key for key in self._values if key not in self._read]
