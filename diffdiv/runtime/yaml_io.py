"""YAML in and out: a small safe subset, in which ``1e-6`` is a number and ``no`` is a word.

Accepted: mappings with text keys, lists, text, numbers, true/false, null. Refused, with the line:
duplicate keys, anchors and aliases (a few bytes of them can ask for gigabytes), tags, deep nesting.
"""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

import yaml

Plain: TypeAlias = "bool | int | float | str | list[Plain] | dict[str, Plain] | None"
MAX_BYTES = 100_000  # a config is a few kilobytes; this bounds the time of the reader
MAX_DEPTH = 20


class ConfigError(ValueError):
    """Every mistake found in a configuration; ``messages`` holds one line for each."""

    def __init__(self, messages: Sequence[str]) -> None:
        self.messages = tuple(messages)
        super().__init__("\n".join(self.messages))


_WORDS = {"": None, "~": None, "null": None, "true": True, "false": False}
_NUMBER = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)(e[-+]?[0-9]+)?|[-+]?\.(inf|nan)")
_SECRET_KEY = re.compile(r"(^|_)(token|secret|password|api_?key)$", re.IGNORECASE)
_SECRET = re.compile(
    r"\b(?:hf_|sk-|ghp_|github_pat_|xox[a-z]-|AKIA)[A-Za-z0-9_-]{8,}"
    r"|\b[0-9a-fA-F]{40}\b"
    r"|(://)[^/\s@]+(?=@)"
    r"|((?i:\b(?:\w+_)?(?:token|secret|password|api_?key)\s*[=:]\s*))\S+"
)


def redact(text: str) -> str:
    """``text`` with access tokens, keys and credentials in URLs replaced by ``***``."""
    return _SECRET.sub(r"\1\2***", text)


def read_yaml(path: Path) -> dict[str, Plain]:
    """The mapping in a YAML file.

    Raises:
        ConfigError: unreadable, too large, not a mapping, or outside the accepted subset.
    """
    try:
        if (size := path.stat().st_size) > MAX_BYTES:
            raise ConfigError([f"{path}: {size:,} bytes; a config has at most {MAX_BYTES:,}"])
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError([f"{path}: cannot be read as UTF-8 text ({error})"]) from None
    values = parse_yaml(text, str(path))
    if not isinstance(values, dict):
        raise ConfigError([f"{path}: has no 'key: value' lines"])
    return values


def parse_yaml(text: str, source: str) -> Plain:
    """Parse one YAML document; ``source`` names it in messages.

    Raises:
        ConfigError: not YAML, or outside the accepted subset.
    """
    try:
        node = _Composer(text).get_single_node()
        return None if node is None else _plain(node)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f", line {mark.line + 1}" if mark else ""
        problem = ", ".join(part for part in (error.context, error.problem) if part)
        raise ConfigError([f"{source}{line}: {problem}"]) from None
    except yaml.YAMLError as error:  # a character YAML does not allow
        raise ConfigError([f"{source}: {' '.join(str(error).split())}"]) from None


class _Composer(yaml.SafeLoader):
    """The safe loader's composer, without aliases, tags and deep nesting."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or event.anchor:
            raise _refused("anchors and aliases (& and *) are not accepted", event)
        if event.tag is not None:
            raise _refused(f"tags ({event.tag}) are not accepted", event)
        if isinstance(event, yaml.ScalarEvent) and re.search("[\ud800-\udfff]", event.value):
            raise _refused("half a character (a lone surrogate)", event)
        if self.depth > MAX_DEPTH:
            raise _refused(f"nested deeper than {MAX_DEPTH} levels", event)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


def _refused(problem: str, where: yaml.Event | yaml.Node) -> yaml.MarkedYAMLError:
    assert isinstance(where.start_mark, yaml.Mark)
    return yaml.MarkedYAMLError(problem=problem, problem_mark=where.start_mark)


def _plain(node: yaml.Node) -> Plain:
    if isinstance(node, yaml.SequenceNode):
        return [_plain(item) for item in node.value]
    if isinstance(node, yaml.ScalarNode):
        return node.value if node.style else _scalar(node)  # quoted or block text has a style
    mapping: dict[str, Plain] = {}
    for key, value in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise _refused("a key must be text", key)
        if key.value in mapping:
            raise _refused(f"duplicate key {key.value!r}", key)
        mapping[key.value] = _plain(value)
    return mapping


def _scalar(node: yaml.ScalarNode) -> Plain:
    text = node.value.lower()
    if text in _WORDS:
        return _WORDS[text]
    if not _NUMBER.fullmatch(text):
        return node.value
    if len(text) > 400:
        raise _refused("a number of more than 400 digits", node)
    if text.lstrip("+-").isdigit():
        return int(text)
    number = float(text.replace(".inf", "inf").replace(".nan", "nan"))
    # 1e5 is written for a count as often as for a real number; both accept an integer.
    is_count = "." not in text and number.is_integer() and abs(number) < 2**53
    return int(number) if is_count else number


class _Dumper(yaml.SafeDumper):
    """Writes what `parse_yaml` reads back unchanged."""

    def ignore_aliases(self, data: object) -> bool:
        return True

    def quoted_if_needed(self, text: str) -> yaml.ScalarNode:
        ambiguous = text.lower() in _WORDS or _NUMBER.fullmatch(text.lower())
        style = "'" if ambiguous else None
        return self.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _Dumper.quoted_if_needed)


def to_yaml(mapping: Mapping[str, object]) -> str:
    """A mapping of plain values as YAML, in its order, without secrets."""
    plain = _redacted(mapping)
    return yaml.dump(plain, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


def dump_yaml(mapping: Mapping[str, object], path: Path) -> None:
    """Write `to_yaml` of ``mapping``; an existing file is replaced in one move."""
    replace_text(path, to_yaml(mapping))


def replace_text(path: Path, text: str) -> None:
    """Write a file, in one move if it exists."""
    staged = path.with_name(f".{path.name}.{os.getpid()}")
    staged.write_text(text, encoding="utf-8")
    staged.replace(path)


def _redacted(value: object, key: str = "") -> object:
    if isinstance(value, Mapping):
        return {name: _redacted(inner, name) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_redacted(item, key) for item in value]
    if isinstance(value, str):
        return "***" if _SECRET_KEY.search(key) and value else redact(value)
    return value
