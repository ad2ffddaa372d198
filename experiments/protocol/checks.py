"""Settings that cannot be run are refused."""

import dataclasses
import math
from typing import Any


def _each(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


def at_least(least: float, config: Any, *names: str) -> None:
    """Raises if one of these fields of a configuration, or a number of one, is smaller."""
    for name in names:
        for value in _each(getattr(config, name)):
            if value < least:
                raise ValueError(f"{name}: got {value}, expected at least {least}")


def above(bound: float, config: Any, *names: str) -> None:
    """Raises if one of these fields, or a number of one, is not larger; None passes."""
    for name in names:
        for value in _each(getattr(config, name)):
            if value is not None and not value > bound:
                raise ValueError(f"{name}: got {value}, expected above {bound}")


def finite(config: Any) -> None:
    """Raises if a number of a configuration is none, or infinite where its default is not."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        allowed = _each(field.default)
        for each in _each(value):
            if isinstance(each, float) and not (math.isfinite(each) or each in allowed):
                raise ValueError(f"{field.name}: got {each}, expected a finite number")


def enough(what: str, wanted: int, there: int) -> None:
    """Raises if a run draws more pairs than there are."""
    if wanted > there:
        raise ValueError(f"{what}: a run draws {wanted}, expected at most the {there} there are")
