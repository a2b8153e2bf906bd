"""Turn validation errors into sentences a user can act on: key, what is wrong, nearest name."""

import difflib
import re
from collections.abc import Mapping
from typing import get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from diffdiv.runtime.yaml_io import redact

# Kind of a pydantic error -> sentence; {given} is the value at fault, {gt} and so on the bound.
_SENTENCES = {
    "missing": "is missing, and has no default",
    "value_error": "{error}",
    "finite_number": "must be finite, got {given}",
    "greater_than": "must be more than {gt:.16g}, got {given}",
    "greater_than_equal": "must be at least {ge:.16g}, got {given}",
    "less_than": "must be less than {lt:.16g}, got {given}",
    "less_than_equal": "must be at most {le:.16g}, got {given}",
    "too_long": "wants at most {max_length} values, got {given}",
    "too_short": "wants at least {min_length} values, got {given}",
    "int_type": "wants a whole number, got {given}",
    "int_from_float": "wants a whole number, got {given}",
    "float_type": "wants a number, got {given}",
    "bool_type": "wants true or false, got {given}",
    "string_type": "wants text, got {given}",
    "path_type": "wants text, got {given}",
    "tuple_type": "wants a list, got {given}",
    "dict_type": "wants a section of keys, got {given}",
    "model_type": "wants a section of keys, got {given}",
}


def explain(error: ValidationError, config_class: type[BaseModel]) -> list[str]:
    """One line for each key at fault, in the order found."""
    details = error.errors(include_url=False)
    lines = [f"{_key(d['loc'])}: {_sentence(d, config_class)}" for d in details]
    return list(dict.fromkeys(lines))  # the branches of a union say the same


def _key(loc: tuple[int | str, ...]) -> str:
    # a part such as tuple[float, float] names the branch of a union, not a key
    keys = [part for part in loc if not re.match(r"\w+\[.*\]$", str(part))]
    parts = [str(part) if str(part).isprintable() else ascii(part) for part in keys]
    return ".".join(parts) or "the config"


def _sentence(error: ErrorDetails, config_class: type[BaseModel]) -> str:
    kind, context, given = error["type"], error.get("ctx", {}), _shown(error["input"])
    if kind == "extra_forbidden":
        options = leaves(config_class)
        parts = [part for part in error["loc"][:-1] if isinstance(part, str)]
        if parts and any(leaf.startswith(f"{parts[0]}.NAME.") for leaf in options):
            parts[1:2] = ["NAME"]
        section = "".join(f"{part}." for part in parts)
        inside = [leaf.removeprefix(section) for leaf in options if leaf.startswith(section)]
        here = sorted({leaf.partition(".")[0] for leaf in inside})
        places = {leaf.rpartition(".")[2]: leaf for leaf in options} | {name: name for name in here}
        guess = nearest(str(error["loc"][-1]), places)
        return f"unknown key{guess}, allowed here: {', '.join(here)}"
    if kind == "literal_error":
        allowed = re.findall(r"'([^']*)'", context["expected"])
        guess = nearest(str(error["input"]), {name: name for name in allowed})
        return f"{given} is not one of {', '.join(allowed)}{guess}"
    if kind in _SENTENCES:
        return _SENTENCES[kind].format(given=given, **context)
    return f"{error['msg'][:1].lower()}{error['msg'][1:]}, got {given}"


def nearest(name: str, places: Mapping[str, str]) -> str:
    """A hint at what resembles ``name`` most, by the key of ``places``; empty if nothing does."""
    found = difflib.get_close_matches(name.lower(), places, n=1, cutoff=0.55)
    return f" (did you mean {places[found[0]]!r}?)" if found else ""


def leaves(config_class: type[BaseModel]) -> list[str]:
    """Dotted names of all options, sorted; the name of the recipe is none.

    NAME stands for the names that a user gives, in a mapping of names to sections.
    """
    names: set[str] = set()
    for name, field in config_class.model_fields.items():
        inner = _sections(field.annotation)
        if get_origin(field.annotation) is dict:
            name = f"{name}.NAME"
        names.update(f"{name}.{leaf}" for part in inner for leaf in leaves(part))
        names.update([] if inner else [name])
    return sorted(names - {"recipe"})


def _sections(annotation: object) -> list[type[BaseModel]]:
    """The sections a field can hold: model classes inside Optional, Union and Annotated."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [found for part in get_args(annotation) for found in _sections(part)]


def _shown(value: object) -> str:
    """A value as the user wrote it, short, on one line, without secrets."""
    if value is None or isinstance(value, bool):
        return {None: "nothing", True: "true", False: "false"}[value]
    if isinstance(value, Mapping):
        return "a section of keys"
    text = redact(ascii(value) if not str(value).isprintable() else repr(value))
    return text if len(text) <= 60 else text[:57] + "..."
