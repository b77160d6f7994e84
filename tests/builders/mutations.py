"""Ways to spoil a file: cuts, flipped bits, odd JSON, safetensors whose header lies."""

import json
import math
import random
import struct
from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st


def each_in_turn(count: int, strategy: st.SearchStrategy[Any], check: Callable[[Any], None]) -> None:
    """`check` on so many draws, the same ones every time."""

    @settings(
        max_examples=count, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck)
    )
    @given(strategy)
    def run(drawn: Any) -> None:
        check(drawn)

    run()


NUMBERS = (0, 1, -1, 3, 2**24, 2**31, 2**32 + 1, 2**53, 2**63 - 1, 2**63, 2**64, 10**12, 10**30, 10**400, -(10**400))
NESTED: Any = 0
for _ in range(400):
    NESTED = [NESTED]
ODD: tuple[Any, ...] = (
    *NUMBERS,
    *(0.5, -0.0, 1e-300, 1e308, math.nan, math.inf, -math.inf, None, True, False),
    *(
        "",
        "x",
        "0",
        "1",
        "F64",
        "I32",
        "U8",
        "F8_E4M3",
        "BOOL",
        "a\nb",
        "\x1b[2J",
        "\0",
        "../x",
        "/etc/passwd",
        "\ud800",
    ),
    *([], [0], [[]], [-1], [2**62, 2**62], [1, 10**12], {}, {"a": 1}, {"": None}, NESTED),
)


class Twice(dict[str, Any]):
    """An object that has its first key again, with another value."""

    def __init__(self, value: dict[str, Any], second: Any):
        super().__init__(value)
        self.again = second


def json_bytes(value: Any) -> str:
    if isinstance(value, dict):
        pairs = [f"{json.dumps(k)}: {json_bytes(v)}" for k, v in value.items()]
        pairs += [f"{json.dumps(next(iter(value)))}: {json_bytes(value.again)}"] if isinstance(value, Twice) else []
        return f"{{{', '.join(pairs)}}}"
    if isinstance(value, list) and value is not NESTED:
        return f"[{', '.join(map(json_bytes, value))}]"
    return json.dumps(value)


def places_of(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where there is something in a JSON value: the path of every part of it, the whole's first."""
    below = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, x in below for place in places_of(x, (*path, key)))]


def value_at(value: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        value = value[key]
    return value


def with_value_at(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    if not path:
        return new
    fresh = value.copy()
    fresh[path[0]] = with_value_at(value[path[0]], path[1:], new)
    return fresh


def mutations(value: Any, parts: tuple[tuple[Any, ...], ...] = ()) -> st.SearchStrategy[str]:
    """JSON text like that of `value`, with a part or two of it another, gone, moved, or there twice. `parts` are places
    to choose among; without them, all.
    """
    where = st.sampled_from(parts or tuple(places_of(value)))

    @st.composite
    def once(draw: st.DrawFn, value: Any) -> Any:
        path, odd = draw(where), draw(st.sampled_from(ODD))
        try:
            old = value_at(value, path)
        except (KeyError, IndexError, TypeError):  # an edit before this one has taken it away
            return value
        above = value_at(value, path[:-1]) if path else None
        match draw(st.sampled_from(["odd", "odd", "odd", "near", "gone", "named", "moved", "twice", "more"])):
            case "near" if type(old) is int:
                return with_value_at(value, path, old + draw(st.sampled_from([-1, 1, old, 64])))
            case "near" if isinstance(old, str):
                return with_value_at(value, path, old + draw(st.sampled_from([" ", "s", ".", "é"])))
            case "near" if isinstance(old, list):
                return with_value_at(value, path, old[::-1])
            case "gone" if isinstance(above, dict):
                return with_value_at(value, path[:-1], {k: x for k, x in above.items() if k != path[-1]})
            case "gone" if isinstance(above, list):
                return with_value_at(value, path[:-1], [x for i, x in enumerate(above) if i != path[-1]])
            case "named" if isinstance(above, dict):
                name = draw(st.sampled_from([f"{path[-1]}x", "", "a\nb", "\x1b[2J", "__metadata__", "\ud800"]))
                return with_value_at(value, path[:-1], {name if k == path[-1] else k: x for k, x in above.items()})
            case "moved":
                return with_value_at(value, path, value_at(value, draw(st.sampled_from(places_of(value)))))
            case "twice" if isinstance(old, dict) and old:
                return with_value_at(value, path, Twice(old, odd))
            case "more" if isinstance(old, dict):
                return with_value_at(value, path, old | {draw(st.sampled_from(["extra", "0", "dtype"])): odd})
            case "more" if isinstance(old, list):
                return with_value_at(value, path, [*old, old[0] if old else odd])
        return with_value_at(value, path, odd)

    @st.composite
    def mutated_json(draw: st.DrawFn) -> str:
        fresh = draw(once(value))
        return json_bytes(draw(once(fresh)) if draw(st.integers(0, 3)) == 0 else fresh)

    return mutated_json()


DEEP = ("[" * 100_000, '{"a":' * 100_000, "[" * 5000 + "]" * 5000, "", " ", "null", "{}", "[]", "\ufeff{}", '"\ud83d"')
"""Texts that are no JSON, or hardly."""


def truncations(data: bytes, count: int, seed: int = 0) -> list[bytes]:
    """`data` cut short at places near its begin and end and between."""
    rng = random.Random(seed)
    found = {0, 1, 4, 7, 8, 9, len(data) - 1, len(data) - 4, len(data) // 2}
    found = {keep for keep in found if 0 <= keep < len(data)}
    while len(found) < min(count, len(data)):
        found.add(rng.randrange(len(data)))
    return [data[:keep] for keep in sorted(found)[:count]]


def bit_flips(data: bytes, count: int, end: int | None = None, seed: int = 0) -> list[bytes]:
    """`data` with up to three bytes before `end` another."""
    rng, found = random.Random(seed), []
    for _ in range(count):
        corrupt = bytearray(data)
        for _ in range(rng.randint(1, 3)):
            corrupt[rng.randrange(end or len(data))] = rng.choice(
                [0, 1, 0x22, 0x30, 0x7F, 0x80, 0xFF, rng.randrange(256)]
            )
        found.append(bytes(corrupt))
    return found


def split_safetensors(data: bytes) -> tuple[Any, bytes]:
    """The header of a safetensors file, and its body."""
    end = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:end]), data[end:]


def join_safetensors(header: str, body: bytes) -> bytes:
    text = header.encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(text)) + text + body


def length_mutations(data: bytes) -> list[bytes]:
    """A safetensors file whose header is said to be of other lengths; with a body of nothing, or too much."""
    header, _ = split_safetensors(data)
    size = int.from_bytes(data[:8], "little")
    lies = (0, 1, 2, size - 1, size + 1, len(data), len(data) - 8, 10**8, 10**8 + 1, 2**31, 2**32, 2**63, 2**64 - 1)
    return [
        *(struct.pack("<Q", lie) + data[8:] for lie in lies),
        *(join_safetensors(json.dumps(header), body) for body in (b"", b"\0" * 5)),
        data + b"\0",
        b"\0" * 100,
    ]


def structural_mutations(data: bytes) -> list[bytes]:
    """Lies in the header that are made on purpose: shapes, offsets and dtypes that do not belong together."""
    header, body = split_safetensors(data)
    tensors = [name for name in header if name != "__metadata__"]
    first, second = sorted(tensors, key=lambda name: header[name]["data_offsets"])[:2]
    shape, (begin, end) = header[first]["shape"], header[first]["data_offsets"]
    lies: list[dict[str, Any]] = [
        {first: header[first] | edit}
        for edit in (
            {"shape": shape[::-1]},
            {"shape": [math.prod(shape)]},
            {"shape": [*shape, 1]},
            {"shape": [*shape, 0]},
            {"shape": [2**32, 2**32]},
            {"shape": [2**63, 2]},
            {"shape": [10**12]},
            {"shape": [1] * 2000 + shape},
            {"shape": [-1, -math.prod(shape)]},
            {"shape": [float(n) for n in shape]},
            {"dtype": "I32"},
            {"dtype": "F16", "shape": [*shape[:-1], 2 * shape[-1]]},
            {"dtype": "F64"},
            {"dtype": "F8_E5M2", "shape": [*shape[:-1], 4 * shape[-1]]},
            {"dtype": "U16", "shape": [*shape[:-1], 2 * shape[-1]]},
            {"dtype": "f32"},
            {"data_offsets": header[second]["data_offsets"]},
            {"data_offsets": [end, begin]},
            {"data_offsets": [begin, end + 4]},
            {"data_offsets": [begin, 10**12]},
            {"data_offsets": [2**63, 2**63 + end - begin]},
            {"data_offsets": [begin]},
        )
    ]
    lies += [
        {first: header[second], second: header[first]},
        {"spare": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}},
        {"spare": {"dtype": "F32", "shape": [0, 10**12], "data_offsets": [0, 0]}},
        {"a\nb": header[first]},
    ]
    renamed = {("a\nb\x1b[2J" if name == first else name): x for name, x in header.items()}
    less = {name: x for name, x in header.items() if name != first}
    every = [header | lie for lie in lies] + [renamed, less]
    return [join_safetensors(json.dumps(each), body) for each in every]
