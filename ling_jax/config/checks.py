"""The checks of settings are made of these functions: each failure is a ValueError that names the value and the
limit."""

import dataclasses
import typing
from collections.abc import Mapping
from typing import Any


def check(ok: bool, message: str) -> None:
    if not ok:
        raise ValueError(message)


def check_types(config: Any) -> None:
    """Each field against its annotation, for the simple types that files and users get wrong."""
    for field in dataclasses.fields(config):
        value, kinds = getattr(config, field.name), str(field.type).replace(" | ", " ").split()
        names = [getattr(field.type, "__name__", "")] if isinstance(field.type, type) else kinds
        simple = {"int": int, "float": (int, float), "bool": bool, "str": str, "None": type(None)}
        if not all(name in simple for name in names):
            continue
        fits = any(isinstance(value, simple[name]) for name in names)
        if isinstance(value, bool) and "bool" not in names:
            fits = False
        check(fits, f"{field.name} = {value!r} must be of type {' or '.join(names)}")


def check_at_least(config: Any, low: float, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        check(value >= low, f"{name} = {value} must be at least {low}")


def as_declared(cls: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    """`values` for the dataclass `cls`, as JSON may spell them: 20.0 for a whole number, 1 for a fraction."""
    kinds = {field.name: typing.get_args(field.type) or (field.type,) for field in dataclasses.fields(cls)}

    def declared(name: str, value: Any) -> Any:
        if isinstance(value, float) and float not in kinds[name] and int in kinds[name] and value.is_integer():
            return int(value)
        whole = isinstance(value, int) and not isinstance(value, bool)
        return float(value) if whole and float in kinds[name] else value

    return {name: declared(name, value) for name, value in values.items()}
