"""Turn validation errors into sentences a user can act on: key, what is wrong, nearest name."""

import difflib
import re
from collections.abc import Mapping, Sequence
from typing import get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from diffdiv.runtime.yaml_io import Plain, redact


def section_classes(annotation: object) -> list[type[BaseModel]]:
    """The sections a field can hold: model classes inside Optional, Union and Annotated."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [found for part in get_args(annotation) for found in section_classes(part)]


def leaves(config_class: type[BaseModel]) -> list[str]:
    """Dotted names of all options, sorted; the name of the recipe is none."""
    names: set[str] = set()
    for name, field in config_class.model_fields.items():
        inner = section_classes(field.annotation)
        names.update(f"{name}.{leaf}" for part in inner for leaf in leaves(part))
        names.update([] if inner else [name])
    return sorted(names - {"recipe"})


def explain(error: ValidationError, values: Plain, config_class: type[BaseModel]) -> list[str]:
    """One line for each key at fault, in the order found.

    Args:
        error: what pydantic raised for ``values``.
        values: the mapping it was given.
        config_class: the class it was validated against.
    """
    lines: dict[str, list[str]] = {}
    for detail in error.errors(include_url=False):
        key, sentence = _sentence(detail, values, config_class)
        if sentence not in lines.setdefault(key, []):  # the branches of a union repeat a key
            lines[key].append(sentence)
    return [f"{key}: {', or '.join(sentences)}" for key, sentences in lines.items()]


_KINDS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "string": "text",
    "path": "a path",
    "tuple": "a list",
    "list": "a list",
    "dict": "a section of keys",
    "model": "a section of keys",
    "model_attributes": "a section of keys",
}
_BOUNDS = {
    "greater_than": ("gt", "more than"),
    "greater_than_equal": ("ge", "at least"),
    "less_than": ("lt", "less than"),
    "less_than_equal": ("le", "at most"),
}


def _sentence(error: ErrorDetails, values: Plain, config_class: type[BaseModel]) -> tuple[str, str]:
    """One pydantic error as (dotted key, sentence)."""
    path, here = _walk(error["loc"], values, config_class)
    kind, context, given = error["type"], error.get("ctx", {}), _shown(error["input"])
    if kind == "extra_forbidden":
        name, allowed = str(error["loc"][-1]), sorted({key for c in here for key in c.model_fields})
        elsewhere = [leaf for leaf in leaves(config_class) if leaf.split(".")[-1] == name]
        guess = nearest(name, allowed) or (f"did you mean {elsewhere[0]!r}? " if elsewhere else "")
        return path, f"unknown key ({guess}allowed here: {', '.join(allowed)})"
    if kind == "missing":
        return path, "is missing, and has no default"
    if kind == "literal_error":
        allowed = re.findall(r"'([^']*)'", str(context["expected"]))
        guess = nearest(str(error["input"]), allowed).strip()
        return path, f"{given} is not one of {', '.join(allowed)}" + (
            f" ({guess})" if guess else ""
        )
    if kind in _BOUNDS:
        name, words = _BOUNDS[kind]
        return path, f"must be {words} {context[name]:.16g}, got {given}"
    if kind == "finite_number":
        return path, f"must be finite, got {given}"
    if kind == "value_error":
        return path, str(context["error"])
    base = re.sub(r"_(type|parsing|parsing_size|from_float)$", "", kind)
    if base in _KINDS:
        return path, f"wants {_KINDS[base]}, got {given}"
    if kind == "too_long":
        return path, f"wants at most {context['max_length']} values, got {given}"
    if kind == "too_short":
        return path, f"wants at least {context['min_length']} values, got {given}"
    return path, f"{error['msg'][:1].lower()}{error['msg'][1:]}, got {given}"


def _walk(
    loc: tuple[int | str, ...], values: Plain, config_class: type[BaseModel]
) -> tuple[str, list[type[BaseModel]]]:
    """Dotted key of an error (without pydantic's union tags), and the classes of its section."""
    here, inside, keys = [config_class], [config_class], []
    for place, part in enumerate(loc):
        if isinstance(values, dict) and (part in values or place == len(loc) - 1):
            here, values = inside, values.get(str(part))
            fields = [c.model_fields[str(part)] for c in here if str(part) in c.model_fields]
            inside = [found for field in fields for found in section_classes(field.annotation)]
        elif isinstance(values, list) and isinstance(part, int):
            values = values[part] if part < len(values) else None
        else:
            continue
        keys.append(str(part) if str(part).isprintable() else ascii(part))
    return ".".join(keys) or "the config", here


def nearest(name: str, allowed: Sequence[str]) -> str:
    """A hint at the allowed name that resembles ``name``, as a whole or in one of its words."""

    def likeness(candidate: str) -> tuple[float, float]:
        words = [candidate, *candidate.split("_")]
        ratios = [difflib.SequenceMatcher(None, name.lower(), word).ratio() for word in words]
        return max(ratios), ratios[0]

    best = max(allowed, key=likeness, default="")
    return f"did you mean {best!r}? " if best and likeness(best)[0] > 0.55 else ""


def _shown(value: object) -> str:
    """A value as the user wrote it, short, on one line, without secrets."""
    if value is None or isinstance(value, bool):
        return {None: "nothing", True: "true", False: "false"}[value]
    if isinstance(value, Mapping):
        return "a section of keys"
    text = redact(ascii(value) if not str(value).isprintable() else repr(value))
    return text if len(text) <= 60 else text[:57] + "..."
