"""Settings as text: what each one may be, how a word or a comma list is read, and which name was meant."""

from __future__ import annotations

import difflib
import json
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final

from pydantic import BaseModel

from fedlora.errors import ConfigError

Scalar = bool | int | float | str
UNSET: Final = object()  # what an empty text gives where None is not allowed: the default


@dataclass(frozen=True, kw_only=True)
class Leaf:
    """One setting: its dotted key, its default, and the JSON schemas of the values that it may take."""

    key: str
    default: Any  # of one of the types above; pydantic has checked it
    forms: tuple[dict[str, Any], ...]

    @property
    def choices(self) -> list[str]:
        return [c for form in self.forms for c in form.get("enum", [form["const"]] if "const" in form else [])]

    def has(self, kind: str) -> bool:
        return any(form["type"] == kind for form in self.forms)

    def read(self, value: object) -> object:
        """Text as a value; what cannot be read is left as it came, for pydantic to refuse."""
        if isinstance(value, bool) and not self.has("boolean"):
            return str(value).lower()  # pydantic would take True for 1
        if value == "":
            return None if self.has("null") else UNSET
        nothing = isinstance(value, str) and value.lower() == "none"
        if nothing and self.has("null"):
            return None
        if self.has("array"):
            if isinstance(value, str) and value not in self.choices:
                value = [] if nothing else _list(value)
            elif isinstance(value, int | float):
                value = [value]
            if isinstance(value, list | tuple) and len(value) == 1 and value[0] in self.choices:
                return value[0]
        if self.has("object") and isinstance(value, str):
            return {} if nothing else _table(value)
        return value

    def text(self, value: Any) -> Scalar:
        """The scalar that `read` takes back to the same value."""
        if value is None:
            return ""
        if isinstance(value, tuple | dict):
            if not value:
                return "none" if self.default else ""
            if isinstance(value, tuple) and isinstance(value[0], dict):
                return json.dumps(value, ensure_ascii=False)
            pairs = [f"{k}={v}" for k, v in value.items()] if isinstance(value, dict) else [str(v) for v in value]
            simple = ",".join(pairs)
            same = value if isinstance(value, dict) else pairs
            return simple if self.read(simple) == same else json.dumps(value, ensure_ascii=False)
        scalar: Scalar = value
        return scalar

    def allowed(self) -> str:
        """What may be given, for people."""
        if self.choices and not self.has("array"):
            return "one of " + ", ".join(self.choices) + (" or none" if self.has("null") else "")
        return " or ".join(_described(form) for form in self.forms)


@cache
def settings_of(section: type[BaseModel]) -> tuple[Leaf, ...]:
    """Every setting of a section and of the sections in it; once per class."""
    schema = section.model_json_schema()["properties"]
    found: list[Leaf] = []
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            found += [
                Leaf(key=f"{name}.{leaf.key}", default=leaf.default, forms=leaf.forms)
                for leaf in settings_of(field.annotation)
            ]
        else:
            forms = tuple(schema[name].get("anyOf", [schema[name]]))
            found.append(Leaf(key=name, default=field.get_default(call_default_factory=True), forms=forms))
    return tuple(found)


def _described(form: Mapping[str, Any]) -> str:
    kinds = {"integer": "a whole number", "number": "a number", "string": "text", "boolean": "true or false"}
    if "const" in form:
        return str(form["const"])
    if form["type"] == "null":
        return "none"
    if form["type"] == "array":
        return f"a list, each {_described(form['items'])}"
    if form["type"] == "object":
        return "a table such as instruction=question,output=answer"
    signs = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    return " ".join(
        [kinds[form["type"]], " and ".join(f"{s} {form[n]:g}" for n, s in signs.items() if n in form)]
    ).strip()


def is_nothing(value: object) -> bool:
    """None, or a text that stands for it."""
    return value is None or (isinstance(value, str) and value.lower() in ("", "none"))


def _list(text: str) -> object:
    if text.lstrip().startswith("["):
        return _json(text, list)
    return [part.strip() for part in text.split(",")]


def _table(text: str) -> object:
    if text.lstrip().startswith("{"):
        return _json(text, dict)
    pairs = [part.split("=", 1) for part in text.split(",")]
    return {k.strip(): v.strip() for k, v in pairs} if all(len(p) == 2 for p in pairs) else text


def _json(text: str, kind: type) -> object:
    try:
        value: object = json.loads(text)
    except ValueError:
        return text
    return value if isinstance(value, kind) else text


def shown(value: object) -> str:
    """A value for people, cut at 80 characters."""
    if value is None or value in ((), {}, []):
        return "none"
    if isinstance(value, tuple | list):
        text = ",".join(map(str, value))
    else:
        text = repr(value) if isinstance(value, str) else json.dumps(value, default=str)
    return text if len(text) <= 80 else text[:77] + "..."


def wrong_value(leaf: Leaf, value: object) -> str:
    """The line about a value that is not allowed."""
    line = f"{leaf.key}: must be {leaf.allowed()}, got {shown(value)}"
    near = difflib.get_close_matches(str(value).lower(), leaf.choices, 1, 0.5)
    return f"{line}; did you mean {near[0]}?" if near else line


def unknown(key: str, keys: Iterable[str]) -> str:
    """The line about a name that is no setting, with the one that was probably meant."""
    keys = list(keys)
    name = key.rsplit(".", 1)[-1]
    near = difflib.get_close_matches(key, keys, 1, 0.75)
    near += [
        k
        for n in difflib.get_close_matches(name, [k.rsplit(".", 1)[-1] for k in keys], 1, 0.7)
        for k in keys
        if k.rsplit(".", 1)[-1] == n
    ]
    near += difflib.get_close_matches(key, keys, 1, 0.0)
    return f"{key}: no such setting; the nearest is {near[0]}"


def nested(values: Mapping[str, object]) -> dict[str, Any]:
    """`{"a.b": 1}` as `{"a": {"b": 1}}`."""
    top: dict[str, Any] = {}
    for key, value in values.items():
        *sections, name = key.split(".")
        inner = top
        for section in sections:
            inner = inner.setdefault(section, {})
        inner[name] = value
    return top


def split(overrides: Iterable[str], mistakes: list[str]) -> Iterator[tuple[str, str]]:
    """`a.b=c` as a key and a text; what has no `=` is noted among the mistakes."""
    for override in overrides:
        key, equals, value = override.partition("=")
        if equals and key.strip():
            yield key.strip(), value
        else:
            mistakes.append(f"{override}: an override is written key=value, e.g. training.learning_rate=1e-3")


def read_toml(path: Path) -> dict[str, Any]:
    """A settings file. Raises: ConfigError with file and line."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path}: a settings file is UTF-8, and byte {error.start} is not: save it as UTF-8"
        ) from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot read the settings: {error.strerror}; give the path of a TOML file") from None
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        last = max(1, len(text.splitlines()))
        reason = str(error).replace("at end of document", f"at line {last}, the end of the file")
        raise ConfigError(f"{path}: not valid TOML: {reason}") from None
