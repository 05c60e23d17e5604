"""Options that know their own help text and legal values, for `Config` and `SamplingParams`."""

import difflib
import numbers
import sys
import types
from dataclasses import field, fields
from typing import Any, Union, get_args, get_origin


def option(
    default: Any,
    description: str,
    *,
    minimum: float | None = None,
    above: float | None = None,
    maximum: float | None = None,
    choices: tuple[str, ...] | None = None,
    offered: bool = True,
) -> Any:
    """A dataclass field that `check_options` can check, and that the command line offers or not.

    `minimum` and `maximum` are inclusive, `above` is an exclusive lower bound.
    """
    limits = dict(minimum=minimum, above=above, maximum=maximum, choices=choices)
    return field(default=default, metadata={"help": description, "offered": offered, **limits})


def check_options(options: Any) -> None:
    """Check every field of a dataclass that `option` made; a ValueError names the first misfit.

    Numbers of other libraries are kept as Python's own.
    """
    for spec in fields(options):
        value, limits = as_python(getattr(options, spec.name)), spec.metadata
        object.__setattr__(options, spec.name, value)  # the way a frozen class sets its own fields
        accepted = types_of(spec.type)
        if not matches(value, accepted):
            wanted = " or ".join("None" if t is type(None) else t.__name__ for t in accepted)
            raise ValueError(f"{spec.name} must be {wanted}, got {value!r}")
        if value is None:
            continue
        if float in accepted and not abs(value) <= sys.float_info.max:  # NaN fails it too
            raise ValueError(f"{spec.name} must be a finite number, got {value}")
        if limits.get("minimum") is not None and value < limits["minimum"]:
            raise ValueError(f"{spec.name} must be at least {limits['minimum']}, got {value}")
        if limits.get("above") is not None and value <= limits["above"]:
            raise ValueError(f"{spec.name} must be greater than {limits['above']}, got {value}")
        if limits.get("maximum") is not None and value > limits["maximum"]:
            raise ValueError(f"{spec.name} must be at most {limits['maximum']}, got {value}")
        if limits.get("choices") and value not in limits["choices"]:
            raise ValueError(f"{spec.name} must be one of {limits['choices']}, got {value!r}")


def as_python(value: Any) -> Any:
    """Another library's number, such as NumPy's, as Python's own; anything else as it is."""
    if isinstance(value, numbers.Integral):
        return value if isinstance(value, bool) else int(value)
    return float(value) if isinstance(value, numbers.Real) else value


def reject_unknown(cls: type, options: dict[str, Any]) -> None:
    """Raise a ValueError for the first keyword that is not a field of the dataclass `cls`."""
    known = [spec.name for spec in fields(cls)]
    for name in options:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else f"; known options: {known}"
            raise ValueError(f"unknown option {name!r}{hint}")


def types_of(annotation: Any) -> tuple[type, ...]:
    """The plain types that an annotation such as `int | None` or `tuple[str, ...]` admits."""
    if isinstance(annotation, types.UnionType) or get_origin(annotation) is Union:
        return tuple(t for arg in get_args(annotation) for t in types_of(arg))
    return (get_origin(annotation) or annotation,)


def matches(value: Any, accepted: tuple[type, ...]) -> bool:
    """isinstance, except that True is no number and an int may stand for a float."""
    if isinstance(value, bool):
        return bool in accepted
    return isinstance(value, accepted) or (isinstance(value, int) and float in accepted)
