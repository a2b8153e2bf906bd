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


_NULL, _BOOL = re.compile(r"~|null|Null|NULL|"), re.compile(r"true|True|TRUE|false|False|FALSE")
_INT = re.compile(r"[-+]?[0-9]+")
_FLOAT = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?|[-+]?\.(inf|nan)", re.I)
_SECRET_KEY = re.compile(r"(^|_)(token|secret|password|api_?key)$", re.IGNORECASE)
_SECRETS = (
    (re.compile(r"\b(hf_|sk-|ghp_|github_pat_|xox[a-z]-|AKIA)[A-Za-z0-9_-]{8,}"), "***"),
    (re.compile(r"\b[0-9a-fA-F]{40}\b"), "***"),
    (re.compile(r"(://)[^/\s@]+@"), r"\1***@"),
    (re.compile(r"(?i)\b((?:\w+_)?(?:token|secret|password|api_?key)\s*[=:]\s*)\S+"), r"\1***"),
)


def redact(text: str) -> str:
    """``text`` with access tokens, keys and credentials in URLs replaced by ``***``."""
    for pattern, replacement in _SECRETS:
        text = pattern.sub(replacement, text)
    return text


def read_yaml(path: Path) -> dict[str, Plain]:
    """The mapping in a YAML file.

    Raises:
        ConfigError: unreadable, too large, not a mapping, or outside the accepted subset.
    """
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
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
            raise _refused("anchors and aliases (& and *) are not accepted", event.start_mark)
        if event.tag is not None:
            raise _refused(f"tags ({event.tag}) are not accepted", event.start_mark)
        if isinstance(event, yaml.ScalarEvent) and re.search("[\ud800-\udfff]", event.value):
            raise _refused("half a character (a lone surrogate)", event.start_mark)
        if self.depth > MAX_DEPTH:
            raise _refused(f"nested deeper than {MAX_DEPTH} levels", event.start_mark)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


def _refused(problem: str, mark: object) -> yaml.MarkedYAMLError:
    assert mark is None or isinstance(mark, yaml.Mark)
    return yaml.MarkedYAMLError(problem=problem, problem_mark=mark)


def _plain(node: yaml.Node) -> Plain:
    if isinstance(node, yaml.SequenceNode):
        return [_plain(item) for item in node.value]
    if isinstance(node, yaml.ScalarNode):
        return node.value if node.style in ("'", '"', "|", ">") else _scalar(node)
    mapping: dict[str, Plain] = {}
    for key_node, value_node in node.value:
        key = key_node.value
        if not isinstance(key, str):
            raise _refused("a key must be text", key_node.start_mark)
        if key in mapping:
            raise _refused(f"duplicate key {key!r}", key_node.start_mark)
        mapping[key] = _plain(value_node)
    return mapping


def _scalar(node: yaml.ScalarNode) -> Plain:
    text = node.value
    if _NULL.fullmatch(text):
        return None
    if _BOOL.fullmatch(text):
        return text.lower() == "true"
    if _FLOAT.fullmatch(text):
        if len(text) > 400:
            raise _refused("a number of more than 400 digits", node.start_mark)
        if _INT.fullmatch(text):
            return int(text)
        number = float(re.sub(r"\.(?=inf|nan)", "", text.lower()))
        # 1e5 is written for a count as often as for a real number; both accept an integer.
        return (
            int(number) if "." not in text and abs(number) < 2**53 and number % 1 == 0 else number
        )
    return text


class _Dumper(yaml.SafeDumper):
    """Writes what `parse_yaml` reads back unchanged."""

    def ignore_aliases(self, data: object) -> bool:
        return True


def _quoted_if_needed(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    ambiguous = any(p.fullmatch(text) for p in (_NULL, _BOOL, _FLOAT))
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="'" if ambiguous else None)


_Dumper.add_representer(str, _quoted_if_needed)


def to_yaml(mapping: Mapping[str, object]) -> str:
    """A mapping of plain values and paths as YAML, in its order, without secrets."""
    plain = _redacted(mapping)
    return yaml.dump(plain, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


def dump_yaml(mapping: Mapping[str, object], path: Path) -> None:
    """Write `to_yaml` of ``mapping``; an existing file is replaced in one move."""
    staged = path.with_name(f".{path.name}.{os.getpid()}")
    staged.write_text(to_yaml(mapping), encoding="utf-8")
    os.replace(staged, path)


def _redacted(value: object, key: str = "") -> object:
    if isinstance(value, Mapping):
        return {str(name): _redacted(inner, str(name)) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_redacted(item, key) for item in value]
    if isinstance(value, str):
        return "***" if _SECRET_KEY.search(key) and value else redact(value)
    return str(value) if isinstance(value, Path) else value
