"""Strict decoding: the bytes of a body to a typed struct, or one sentence that names the field which is wrong."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any, TypeVar, get_args, get_origin

import msgspec
from msgspec import inspect

from rustllama.errors import BadRequest, Unsupported

S = TypeVar("S", bound=msgspec.Struct)

Fields = Mapping[str, object]
"""A decoded JSON object."""

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_SHOWN_CHARACTERS = 40
_DEEPEST = 64  # objects and lists in each other
_EMPTY: tuple[object, ...] = (None, False, 0, "", [], {})


def parse_object(body: bytes) -> Fields:
    """The JSON object of a body; `{}` for an empty one. Raises BadRequest for anything that is not strict JSON."""
    text = body.removeprefix(_BYTE_ORDER_MARK)
    if not text.strip():
        return {}
    try:
        value = msgspec.json.decode(text)
    except RecursionError:
        raise _too_deep() from None
    except ValueError as error:  # malformed JSON, bad UTF-8, numbers that no double or integer holds
        raise BadRequest(f"The body is not valid JSON: {error}.") from None
    if not isinstance(value, dict):
        raise BadRequest(f"The body must be a JSON object, not {_shown(value)}.")
    _check_depth(value)
    return value


def _check_depth(value: object) -> None:
    level: list[Any] = [value]
    for _ in range(_DEEPEST):
        parents = (parent.values() if isinstance(parent, dict) else parent for parent in level)
        level = [child for children in parents for child in children if isinstance(child, (dict, list))]
        if not level:
            return
    raise _too_deep()


def _too_deep() -> BadRequest:
    return BadRequest(f"The body is nested too deeply: send at most {_DEEPEST} lists and objects within each other.")


def typed(cls: type[S], raw: Fields, path: str = "") -> S:
    """Reads the fields of `cls` from `raw`; null counts as absent, unknown fields are left alone.

    `path` stands before a field's name in messages, like `options.`. Raises BadRequest.
    """
    try:
        return msgspec.convert(raw, cls)
    except msgspec.ValidationError:
        return _typed_by_field(cls, raw, path)


def _typed_by_field(cls: type[S], raw: Fields, path: str) -> S:
    """The same where something is unusual, or wrong and to be named."""
    values: dict[str, object] = {}
    for spec in msgspec.structs.fields(cls):
        value, where = raw.get(spec.encode_name), path + spec.encode_name
        if value is not None:
            values[spec.name] = _convert(value, spec.type, where)
        elif spec.required:
            raise BadRequest(f"'{where}' is missing: it must be {describe(spec.type)}.", where)
    return cls(**values)


def wrong(where: str, expected: str, value: object) -> BadRequest:
    """The error for a field that holds something else than what is expected."""
    return BadRequest(f"'{where}' must be {expected}, not {_shown(value)}.", where)


def refuse_unbuilt(raw: Fields, unbuilt: Mapping[str, tuple[object, ...]], path: str = "") -> None:
    """Raises Unsupported for a field that asks for what is not built.

    `unbuilt` has the fields, each with the values that ask for nothing besides null, false, 0, "", [] and {}.
    """
    for name, harmless in unbuilt.items():
        value = raw.get(name)
        if value not in _EMPTY and value not in harmless:
            raise Unsupported(f"'{path}{name}' is not supported yet: send the request without it.", path + name)


def _convert(value: object, kind: Any, where: str) -> object:
    items = get_args(kind)
    if get_origin(kind) is list:
        if not isinstance(value, list):
            raise wrong(where, describe(kind), value)
        return [_convert(item, items[0], f"{where}[{index}]") for index, item in enumerate(value)]
    if _is_struct(kind):
        if not isinstance(value, dict):
            raise wrong(where, describe(kind), value)
        return typed(kind, value, where + ".")
    return _scalar(value, kind, where)


def _scalar(value: object, kind: Any, where: str) -> object:
    whole = isinstance(value, float) and value.is_integer()  # JavaScript and YAML write 3 as 3.0
    for candidate in (value, int(value)) if whole else (value,):  # type: ignore[call-overload]
        try:
            return msgspec.convert(candidate, kind)
        except msgspec.ValidationError:
            continue
    raise wrong(where, describe(kind), value)


def _is_struct(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, msgspec.Struct)


@cache
def describe(kind: Any) -> str:
    """A type in words, with its range: "a whole number from 1 to 512"."""
    return _words(inspect.type_info(kind))


def _words(info: inspect.Type) -> str:
    if isinstance(info, inspect.UnionType):
        return " or ".join(_words(each) for each in info.types if not isinstance(each, inspect.NoneType))
    if isinstance(info, (inspect.IntType, inspect.FloatType)):
        noun = "a whole number" if isinstance(info, inspect.IntType) else "a number"
        return noun if info.ge is None else f"{noun} from {info.ge} to {info.le}"
    if isinstance(info, inspect.StrType):
        return "a string" + _length(info)
    if isinstance(info, inspect.ListType):
        most = "" if info.max_length is None else f"at most {info.max_length} "
        item = info.item_type
        return f"a list of {most}" + (f"strings{_length(item)}" if isinstance(item, inspect.StrType) else "objects")
    if isinstance(info, inspect.LiteralType):
        return "one of " + ", ".join(map(str, info.values))
    return "true or false" if isinstance(info, inspect.BoolType) else "an object"


def _length(info: inspect.StrType) -> str:
    return "" if info.max_length is None else f" of at most {info.max_length} characters"


def _shown(value: object) -> str:
    """A short scalar as it is, anything else by its kind."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, (int, float)):
        text = repr(value)
        return text if len(text) <= _SHOWN_CHARACTERS else "a number of that size"
    if isinstance(value, str):
        return repr(value) if len(value) <= _SHOWN_CHARACTERS else "a long string"
    return "a list" if isinstance(value, list) else "an object"
