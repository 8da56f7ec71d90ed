"""YAML as people write it by hand: 5e-6 is a number, and a key given twice is an error."""

from __future__ import annotations

import re
from typing import Any

import yaml

__all__ = ["load_yaml"]


class _Yaml(yaml.SafeLoader):
    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = [str(key.value) for key, _ in node.value]
        twice = sorted({key for key in seen if seen.count(key) > 1})
        if twice:
            again = [key.start_mark.line + 1 for key, _ in node.value if str(key.value) == twice[0]][1]
            raise yaml.YAMLError(f"key '{twice[0]}' is given twice, again in line {again}")
        return super().construct_mapping(node, deep)


_Yaml.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(?:\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def load_yaml(text: str) -> Any:
    """What a text holds.

    Raises:
        yaml.YAMLError: it is no YAML, or gives a key twice.
    """
    return yaml.load(text, Loader=_Yaml)  # noqa: S506 (a SafeLoader)
