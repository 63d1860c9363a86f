"""Read a YAML file into a pydantic model; an error names file and line."""

from collections.abc import Iterable
from datetime import date
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from patchscan.common.errors import UserError

Model = TypeVar("Model", bound=BaseModel)


MAX_MERGED = 10_000  # keys that `<<` may bring into one mapping: merged again and again they would fill the memory


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands twice in a mapping, of which YAML's own loader takes the last, and endless merges."""

    def compose_mapping_node(self, anchor: dict[Any, yaml.Node]) -> yaml.MappingNode:
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"{key.value} stands here twice", problem_mark=key.start_mark)
            seen.add(key.value)
        return node

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        super().flatten_mapping(node)
        if len(node.value) > MAX_MERGED:
            raise yaml.MarkedYAMLError(problem=f"over {MAX_MERGED:,} keys are merged", problem_mark=node.start_mark)


def read_yaml(
    path: Path, model: type[Model], error_type: type[UserError], keys: Iterable[str], **overrides: Any
) -> Model:
    """Read a YAML file as `model`. An override of None changes nothing; `keys` are those that a misspelt one may mean.

    Raises `error_type`, naming file and line, for YAML that does not parse, an unknown key, or a wrong type or value.
    """
    try:
        text = path.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise error_type(f"{path} cannot be read: {error}") from error
    try:
        values = yaml.load(text, _Loader)  # noqa: S506  a safe one
    except yaml.YAMLError as error:
        where, why = "", " ".join(str(error).split())
        if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark:
            where, why = f", line {error.problem_mark.line + 1}", str(error.problem)
        raise error_type(f"{path}{where} is not YAML: {why}") from error
    except Exception as error:  # PyYAML raises more for wrong dates, numbers and tags, and for deep nesting
        raise error_type(f"{path} is not YAML: {type(error).__name__}: {error}") from error
    try:
        given = {key: value for key, value in overrides.items() if value is not None}
        return model.model_validate({**values, **given} if isinstance(values, dict) else values)
    except ValidationError as error:
        # A misspelt key causes two errors, "unknown key" and "missing key": report the unknown one.
        first = min(error.errors(), key=lambda problem: problem["type"] != "extra_forbidden")
        where, key = _line_of(text, first["loc"]), str(first["loc"][-1] if first["loc"] else "")
        similar = get_close_matches(key, keys, 1) if first["type"] == "extra_forbidden" else []
        hint = f"; did you mean {similar[0]}?" if similar else ""
        what = ".".join(map(str, first["loc"])) or "the file"
        why = "keys and values are needed here" if first["type"] == "model_type" else first["msg"]
        if first["type"] == "string_type" and isinstance(first["input"], bool | int | float | date):
            why += ": put it in quotes"
        raise error_type(f"{path}{where}: {what}: {why.removeprefix('Value error, ')}{hint}") from error


def where_in(path: Path, location: tuple[int | str, ...]) -> str:
    """Return `FILE, line N` of a key of a YAML file that has been read, or of its nearest parent that stands there."""
    return f"{path}{_line_of(path.read_text('utf-8-sig'), location)}"


def _line_of(text: str, location: tuple[int | str, ...]) -> str:
    """Return `, line N` of the YAML node at `location`, or of its nearest parent that the file contains."""
    node, line = yaml.compose(text), 1
    for part in location:
        if isinstance(node, yaml.MappingNode):
            match = next((pair for pair in node.value if pair[0].value == part), None)
            if match is None:
                continue
            line, node = match[0].start_mark.line + 1, match[1]
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
            node = node.value[part]
            line = node.start_mark.line + 1
    return f", line {line}"
