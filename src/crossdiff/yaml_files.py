"""YAML that may come from others: bounded in its size, so that a few lines of aliases cannot take all memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from crossdiff.errors import UserError

MAX_VALUES = 100_000
"""Most values in a document, each alias counted with all that it stands for."""


def parse_yaml(text: str) -> Any:
    """The value of a YAML document.

    Raises:
        yaml.YAMLError: the text is not valid YAML, or has more than `MAX_VALUES` values.
    """
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        if _count(node, {}) > MAX_VALUES:
            raise yaml.YAMLError(f"it has more than {MAX_VALUES:,} values, with every alias counted as what it stands for")
        return loader.construct_document(node)
    except RecursionError:
        raise yaml.YAMLError("it is nested too deeply, or contains itself") from None
    except (ValueError, OverflowError) as error:  # such as a date of month 13
        raise yaml.YAMLError(str(error)) from None
    finally:
        loader.dispose()


def _count(node: yaml.Node, counted: dict[int, int]) -> int:
    """The values of a node; `counted` holds the numbers of nodes that were counted before, by identity."""
    if id(node) not in counted:
        children: list[Any] = node.value if isinstance(node, yaml.CollectionNode) else []
        inner = [each for child in children for each in (child if isinstance(child, tuple) else (child,))]
        counted[id(node)] = 1 + sum(_count(child, counted) for child in inner)
    return counted[id(node)]


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML mapping. A `UserError` names a file that is missing, unreadable or not a mapping."""
    try:
        values = parse_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read the config file {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 (byte {error.start}); save it as UTF-8") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {error}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"{path} must contain a mapping of settings, found {type(values).__name__}")
    return values
