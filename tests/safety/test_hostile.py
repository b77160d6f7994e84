"""Files that are corrupt, or made to harm: over a thousand, each gives one typed line, or loads as what it says.

What a file says is told by readers that are not ours: safetensors', gguf's and pyarrow's own, and json and csv. Each
file has a few seconds and some memory beyond what the process holds: a hang or a giant allocation fails the test.
"""

import base64
import csv
import io
import json
import math
import random
import re
import resource
import signal
import struct
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from bitsandbytes.functional import QuantState, dequantize_4bit
from builders import same, tiny, with_noise
from builders.gguf_files import HEADS, in_ggml_order, random_model, write_gguf
from builders.tokenizers import train_tokenizer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GPT2Config, LlamaConfig

import fgpt
from fgpt import families, library_errors
from fgpt.data import classification_datasets, instruction_datasets
from fgpt.errors import InputError
from fgpt.families import hf_config, mapping
from fgpt.io import models, serialization
from fgpt.io.peft.adapter_files import load_peft
from fgpt.kernels.quantized_linear import Blockwise4bit
from fgpt.kernels.rotary import DynamicScaling, YarnScaling, rope_cos_sin
from fgpt.model import Config
from fgpt.tokenizers import huggingface
from fgpt.tokenizers.child_process import Child
from fgpt.tokenizers.tokenizer_files import Tokenizer, of_folder
from fgpt.tree import leaves, walk

COUNTS = {
    "safetensors": 190,
    "trees": 220,
    "shards": 70,
    "gguf": 250,
    "peft": 280,
    "configs": 200,
    "tokenizers": 200,
    "datasets": 240,
    "bitsandbytes": 80,
}
"""How many files of each kind are corrupt, at least."""
TRIED: Counter[str] = Counter()
LOADED: Counter[str] = Counter()
AGAIN = "read another way"
"""No kind: the file has been counted."""
SECONDS, ROOM = 5.0, 2 << 30


# ----------------------------------------------------------------------------------------------------------- the guard


class HangError(BaseException):
    """What no `except Exception` takes for an error of the file."""


@contextmanager
def guarded() -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise HangError

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def enough(kind: str, tests: int = 1) -> None:
    """Asserts that a test has tried its share of the files of a kind; and that some were loaded, and most were not."""
    assert TRIED[kind] >= COUNTS[kind] / tests
    assert 0 < LOADED[kind] < TRIED[kind] * 0.6


@pytest.fixture(autouse=True)
def room() -> Iterator[None]:
    """So much memory may be mapped on top of what is: an allocation of more fails."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + ROOM, hard))
    yield
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def outcome(kind: str, path: Path, read: Callable[[], Any]) -> Any:
    """What `read` makes of a corrupt file; None where it says in one line that `path` cannot be read."""
    TRIED[kind] += 1
    with guarded():
        try:
            found = read()
            LOADED[kind] += 1
            return found
        except InputError as err:
            said = str(err)
    assert said.strip()
    assert "\n" not in said
    assert said.isprintable(), said
    assert len(said) < 2000
    assert str(path) in said
    return None


def each(count: int, strategy: st.SearchStrategy[Any], check: Callable[[Any], None]) -> None:
    """`check` on so many draws, the same ones every time."""

    @settings(
        max_examples=count, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck)
    )
    @given(strategy)
    def run(drawn: Any) -> None:
        check(drawn)

    run()


# -------------------------------------------------------------------------------------------------------- how to spoil

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

    def __init__(self, value: dict[str, Any], again: Any):
        super().__init__(value)
        self.again = again


def dumped(value: Any) -> str:
    if isinstance(value, dict):
        pairs = [f"{json.dumps(k)}: {dumped(v)}" for k, v in value.items()]
        pairs += [f"{json.dumps(next(iter(value)))}: {dumped(value.again)}"] if isinstance(value, Twice) else []
        return f"{{{', '.join(pairs)}}}"
    if isinstance(value, list) and value is not NESTED:
        return f"[{', '.join(map(dumped, value))}]"
    return json.dumps(value)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where there is something in a JSON value: the path of every part of it, the whole's first."""
    below = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, x in below for place in places(x, (*path, key)))]


def at(value: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        value = value[key]
    return value


def put(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    if not path:
        return new
    fresh = value.copy()
    fresh[path[0]] = put(value[path[0]], path[1:], new)
    return fresh


def mutated(value: Any, parts: tuple[tuple[Any, ...], ...] = ()) -> st.SearchStrategy[str]:
    """JSON text like that of `value`, with a part or two of it another, gone, moved, or there twice. `parts` are places
    to choose among; without them, all.
    """
    where = st.sampled_from(parts or tuple(places(value)))

    @st.composite
    def once(draw: st.DrawFn, value: Any) -> Any:
        path, odd = draw(where), draw(st.sampled_from(ODD))
        try:
            old = at(value, path)
        except (KeyError, IndexError, TypeError):  # an edit before this one has taken it away
            return value
        above = at(value, path[:-1]) if path else None
        match draw(st.sampled_from(["odd", "odd", "odd", "near", "gone", "named", "moved", "twice", "more"])):
            case "near" if type(old) is int:
                return put(value, path, old + draw(st.sampled_from([-1, 1, old, 64])))
            case "near" if isinstance(old, str):
                return put(value, path, old + draw(st.sampled_from([" ", "s", ".", "é"])))
            case "near" if isinstance(old, list):
                return put(value, path, old[::-1])
            case "gone" if isinstance(above, dict):
                return put(value, path[:-1], {k: x for k, x in above.items() if k != path[-1]})
            case "gone" if isinstance(above, list):
                return put(value, path[:-1], [x for i, x in enumerate(above) if i != path[-1]])
            case "named" if isinstance(above, dict):
                name = draw(st.sampled_from([f"{path[-1]}x", "", "a\nb", "\x1b[2J", "__metadata__", "\ud800"]))
                return put(value, path[:-1], {name if k == path[-1] else k: x for k, x in above.items()})
            case "moved":
                return put(value, path, at(value, draw(st.sampled_from(places(value)))))
            case "twice" if isinstance(old, dict) and old:
                return put(value, path, Twice(old, odd))
            case "more" if isinstance(old, dict):
                return put(value, path, old | {draw(st.sampled_from(["extra", "0", "dtype"])): odd})
            case "more" if isinstance(old, list):
                return put(value, path, [*old, old[0] if old else odd])
        return put(value, path, odd)

    @st.composite
    def some(draw: st.DrawFn) -> str:
        fresh = draw(once(value))
        return dumped(draw(once(fresh)) if draw(st.integers(0, 3)) == 0 else fresh)

    return some()


DEEP = ("[" * 100_000, '{"a":' * 100_000, "[" * 5000 + "]" * 5000, "", " ", "null", "{}", "[]", "\ufeff{}", '"\ud83d"')
"""Texts that are no JSON, or hardly."""


def cuts(data: bytes, count: int, seed: int = 0) -> list[bytes]:
    """`data` cut short at places near its begin and end and between."""
    rng = random.Random(seed)
    found = {0, 1, 4, 7, 8, 9, len(data) - 1, len(data) - 4, len(data) // 2}
    found = {keep for keep in found if 0 <= keep < len(data)}
    while len(found) < min(count, len(data)):
        found.add(rng.randrange(len(data)))
    return [data[:keep] for keep in sorted(found)[:count]]


def flips(data: bytes, count: int, end: int | None = None, seed: int = 0) -> list[bytes]:
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


def apart(data: bytes) -> tuple[Any, bytes]:
    """The header of a safetensors file, and its body."""
    end = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:end]), data[end:]


def together(header: str, body: bytes) -> bytes:
    text = header.encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(text)) + text + body


def lengths(data: bytes) -> list[bytes]:
    """A safetensors file whose header is said to be of other lengths; with a body of nothing, or too much."""
    header, _ = apart(data)
    size = int.from_bytes(data[:8], "little")
    lies = (0, 1, 2, size - 1, size + 1, len(data), len(data) - 8, 10**8, 10**8 + 1, 2**31, 2**32, 2**63, 2**64 - 1)
    return [
        *(struct.pack("<Q", lie) + data[8:] for lie in lies),
        *(together(json.dumps(header), body) for body in (b"", b"\0" * 5)),
        data + b"\0",
        b"\0" * 100,
    ]


def structural(data: bytes) -> list[bytes]:
    """Lies in the header that are made on purpose: shapes, offsets and dtypes that do not belong together."""
    header, body = apart(data)
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
    return [together(json.dumps(each), body) for each in every]


# ------------------------------------------------------------------------------------------- models in the hub's layout


def stored(params: fgpt.GPT) -> dict[str, Tensor]:
    """A model's tensors as the hub names them, without a prefix."""
    family = families.family_of(params.cfg)
    return {name.removeprefix(family.prefix): x for name, x in mapping.to_hf(params, family).items()}


def said(files: list[Path], params: fgpt.GPT) -> dict[str, Tensor]:
    """What safetensors itself reads in `files`."""
    family, found = families.family_of(params.cfg), {}
    for file in files:
        found |= {name.removeprefix(family.prefix): x.float() for name, x in load_file(file).items()}
    return {name: x for name, x in found.items() if not name.endswith(family.buffers)}


def agree(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Asserts the same names and shapes, and bit by bit the same numbers, what is no number included."""
    assert got.keys() == expected.keys()
    for name, x in got.items():
        assert x.shape == expected[name].shape, name
        assert x.dtype == expected[name].dtype, name
        torch.testing.assert_close(x, expected[name], rtol=0, atol=0, equal_nan=True, msg=name)


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    fgpt.save(tiny(n_layer=1), tmp_path)
    return tmp_path


def test_spoiled_models(whole: Path):
    path = whole / "model.safetensors"
    data = path.read_bytes()
    header, body = apart(data)

    def check(corrupt: bytes) -> None:
        path.write_bytes(corrupt)
        if params := outcome("safetensors", path, lambda: fgpt.load(str(whole))):
            assert params.cfg == tiny(n_layer=1).cfg
            agree(stored(params), said([path], params))

    corrupt = [*lengths(data), *structural(data), *cuts(data, 30), *flips(data, 40, len(data) - len(body))]
    for each_of in [*corrupt, *flips(data, 10, seed=1), *(together(text, body) for text in DEEP)]:
        check(each_of)
    each(60, mutated(header), lambda text: check(together(text, body)))
    enough("safetensors")


def test_whole_numbers_are_no_weights(whole: Path):
    """The header's word for one tensor, F32 made I32, is enough: as floats they would be numbers of another size."""
    path = whole / "model.safetensors"
    header, body = apart(path.read_bytes())
    header["transformer.ln_f.weight"]["dtype"] = "I32"
    path.write_bytes(together(json.dumps(header), body))
    for dtype in (torch.float32, None):
        with pytest.raises(InputError, match=r"tensor ln_f\.weight: expected a floating dtype, got int32"):
            fgpt.load(str(whole), dtype)


# --------------------------------------------------------------------------------------------------------------- shards


def test_spoiled_shards(tmp_path: Path):
    params = tiny(n_layer=1)
    fgpt.save(params, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    where = {name: shards[i % 2] for i, name in enumerate(tensors)}
    for shard in shards:
        save_file({name: tensors[name] for name in tensors if where[name] == shard}, tmp_path / shard)
    path = tmp_path / "model.safetensors.index.json"
    index = {"metadata": {"total_size": 4 * sum(x.numel() for x in tensors.values())}, "weight_map": where}

    def check(text: str) -> None:
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        if found := outcome("shards", tmp_path, lambda: fgpt.load(str(tmp_path))):
            listed = sorted(set(json.loads(text)["weight_map"].values()))
            agree(stored(found), said([tmp_path / name for name in listed], found))

    check(json.dumps(index))
    assert same(fgpt.load(str(tmp_path)), params)
    for text in DEEP:
        check(text)
    each(50, mutated(index), check)
    path.write_text(json.dumps(index))
    data = (tmp_path / shards[0]).read_bytes()
    for corrupt in (*cuts(data, 5), *flips(data, 5, 200)):
        (tmp_path / shards[0]).write_bytes(corrupt)
        if found := outcome("shards", tmp_path, lambda: fgpt.load(str(tmp_path))):
            agree(stored(found), said([tmp_path / name for name in shards], found))
    enough("shards")


# ---------------------------------------------------------------------------------------------------------------- trees


def alike(form: Any, own: Any) -> bool:
    """Whether a structure is one that we would write, but for fields of None, which may be left out."""
    if isinstance(form, dict) and isinstance(own, dict):
        return own.keys() <= form.keys() and all(alike(x, own.get(k)) for k, x in form.items())
    if isinstance(form, list) and isinstance(own, list | tuple):
        return len(form) == len(own) and all(alike(x, y) for x, y in zip(form, own))
    return form == own or (form != form and own != own)


def check_tree(tree: Any, path: Path) -> None:
    """Asserts that a tree has the tensors and the structure that its file has."""
    tensors = load_file(path)
    agree(leaves(tree), tensors) if isinstance(tree, dict | tuple) or leaves(tree) else None
    with safe_open(path, framework="pt") as file:
        form = json.loads(file.metadata()["structure"])
    assert alike(form, serialization._structure(tree, "", "", {}))


TREES: dict[str, Callable[[], Any]] = {
    "adapters": lambda: union(tiny(n_layer=1, d_model=64, d_mlp=64)),
    "nf4": lambda: fgpt.quantize(tiny(n_layer=1, d_model=64, d_mlp=64)),
    "int8": lambda: fgpt.quantize(tiny(n_layer=1, d_model=64, d_mlp=64), "int8"),
}


def union(params: fgpt.GPT) -> fgpt.Adapters:
    return with_noise(
        fgpt.lora(params, fgpt.key(0), 2, target=r".*\.q", rs=True, dropout=0.1)
        | fgpt.dora(params, fgpt.key(0), 2, target=r".*\.v")
        | fgpt.ia3(params, r".*\.k", r".*\.down")
        | fgpt.trainable_leaves(params, r".*\.q\.b|ln_f\.w")
    )


@pytest.mark.parametrize("kind", TREES)
def test_spoiled_trees(kind: str, tmp_path: Path):
    tree = TREES[kind]()
    base = tiny(n_layer=1, d_model=64, d_mlp=64)
    if kind == "adapters":
        path = tmp_path / "adapters.safetensors"
        serialization.write_tree(path, tree)
    else:
        path = tmp_path / "fgpt.safetensors"
        fgpt.save(tree, tmp_path)
    data = path.read_bytes()
    header, body = apart(data)
    structure = json.loads(header["__metadata__"]["structure"])

    def check(corrupt: bytes) -> None:
        path.write_bytes(corrupt)
        if found := outcome("trees", path, lambda: serialization.read_tree(path)):
            check_tree(found, path)
        if kind == "adapters":
            outcome(AGAIN, path, lambda: serialization.load_adapters(path, base))
        elif found := outcome(AGAIN, path, lambda: fgpt.load(str(tmp_path), dtype=None)):
            check_tree(found, path)

    def restructured(text: str) -> bytes:
        return together(json.dumps(header | {"__metadata__": {"format": "fgpt", "structure": text}}), body)

    check(data)
    assert serialization.read_tree(path) is not None
    for corrupt in (
        *lengths(data)[::3],
        *structural(data)[::2],
        *cuts(data, 5),
        *flips(data, 15, len(data) - len(body)),
    ):
        check(corrupt)
    for text in DEEP:
        check(restructured(text))
    each(60, mutated(structure), lambda text: check(restructured(text)))
    each(20, mutated(header), lambda text: check(together(text, body)))
    enough("trees", len(TREES))


# --------------------------------------------------------------------------------------------------------- bitsandbytes


def as_bitsandbytes(params: fgpt.GPT) -> dict[str, Tensor]:
    """A model's tensors, those of its first block in 4 bits, as bitsandbytes packs them."""
    family, tensors = families.family_of(params.cfg), {}
    paths = {s.name: s.paths[0] for s in family.tensor_mappings(params.cfg)}
    held = dict(walk(fgpt.quantize(params)))
    for name, x in mapping.to_hf(params, family).items():
        w: Any = held[paths[name.removeprefix(family.prefix)]]
        if not isinstance(w, Blockwise4bit):
            tensors[name] = x
            continue
        scales: Any = w.absmax
        state = {"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": list(w.shape)}
        state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": scales_offset(w)}
        tensors |= {name: w.codes.reshape(-1, 1), f"{name}.absmax": scales.codes, f"{name}.quant_map": w.code.clone()}
        tensors |= {f"{name}.nested_absmax": scales.absmax, f"{name}.nested_quant_map": scales.code.clone()}
        tensors[f"{name}.quant_state.bitsandbytes__nf4"] = packed(json.dumps(state))
    return tensors


def scales_offset(w: Blockwise4bit) -> float:
    assert w.offset is not None
    return w.offset.item()


def packed(text: str) -> Tensor:
    return torch.tensor([*text.encode("utf-8", "surrogatepass")], dtype=torch.uint8)


def check_bitsandbytes(params: fgpt.GPT, path: Path) -> None:
    """Asserts that the matrices are those that bitsandbytes makes of the file."""
    tensors, family = load_file(path), families.family_of(params.cfg)
    held = dict(walk(params))
    for s in family.tensor_mappings(params.cfg):
        name = family.prefix + s.name
        parts = {k.removeprefix(f"{name}."): x for k, x in tensors.items() if k.startswith(f"{name}.")}
        if parts:
            state = QuantState.from_dict(parts, device=torch.device("cpu"))
            agree({name: fgpt.dense(held[s.paths[0]])}, {name: dequantize_4bit(tensors[name], state).float()})
        elif name in tensors:
            agree({name: held[s.paths[0]]}, {name: tensors[name].float()})


def test_spoiled_files_of_bitsandbytes(tmp_path: Path):
    params = tiny(**LLAMA | {"n_layer": 1, "d_model": 64, "d_mlp": 64, "rotary_dim": 32})
    fgpt.save(params, tmp_path)
    path, state = tmp_path / "model.safetensors", "model.layers.0.mlp.up_proj.weight.quant_state.bitsandbytes__nf4"
    tensors = as_bitsandbytes(params)

    def check() -> None:
        if found := outcome("bitsandbytes", path, lambda: fgpt.load(str(tmp_path))):
            check_bitsandbytes(found, path)

    def stated(text: str) -> None:
        save_file(tensors | {state: packed(text)}, path)
        check()

    save_file(tensors, path)
    check_bitsandbytes(fgpt.load(str(tmp_path)), path)
    data, said = path.read_bytes(), bytes(tensors[state].tolist()).decode()
    header, body = apart(data)
    for text in DEEP:
        stated(text)
    each(50, mutated(json.loads(said)), stated)
    for odd in (torch.tensor(10**12), torch.zeros(2, 2, dtype=torch.uint8), torch.zeros(0), torch.ones(3)):
        for part in (
            state,
            state.replace("quant_state.bitsandbytes__nf4", "absmax"),
            state.rpartition(".quant_state")[0],
        ):
            save_file(tensors | {part: odd.contiguous()}, path)
            check()

    def restructured(text: str) -> None:
        path.write_bytes(together(text, body))
        check()

    each(20, mutated(header), restructured)
    enough("bitsandbytes")


# ----------------------------------------------------------------------------------------------------------------- GGUF

NARROW: dict[str, Any] = {"vocab_size": 9, "max_position_embeddings": 8, "hidden_size": 32, "num_hidden_layers": 1}
FEW: dict[str, Any] = HEADS | {"intermediate_size": 32}
GGUFS = {
    "llama": (LlamaConfig(**NARROW, **FEW), gguf.GGMLQuantizationType.Q8_0),
    "gpt2": (GPT2Config(vocab_size=9, n_positions=8, n_embd=32, n_layer=1, n_head=2), gguf.GGMLQuantizationType.F32),
}


def check_gguf(arch: str, params: fgpt.GPT, path: Path, config: Any) -> None:
    """Asserts that a model has the sizes and the numbers that gguf's own reader finds in its file."""
    with guarded():
        reader = gguf.GGUFReader(path)
    table = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, arch.upper()), 1)
    family = families.family_of(params.cfg)
    ours = {}
    for hub_name, x in mapping.to_hf(params, family).items():
        name = table.get_name(hub_name, try_suffixes=(".weight", ".bias"))
        ours[name] = in_ggml_order(arch, hub_name, x, config)
    theirs = {}
    for t in reader.tensors:
        shape = [int(n) for n in reversed(t.shape)]
        theirs[t.name] = torch.from_numpy(np.array(gguf.dequantize(t.data, t.tensor_type), np.float32)).view(shape)
    agree(ours, theirs)
    for key, value in (("block_count", params.cfg.n_layer), ("attention.head_count", params.cfg.n_head)):
        assert reader.fields[f"{arch}.{key}"].contents() == value


@pytest.mark.parametrize("arch", GGUFS)
def test_spoiled_gguf_files(arch: str, tmp_path: Path):
    path = tmp_path / "m.gguf"
    config, kind = GGUFS[arch]
    write_gguf(path, arch, random_model(config), kind)
    data = path.read_bytes()
    start = len(data) - min(t.data_offset for t in gguf.GGUFReader(path).tensors)
    start = len(data) - start

    def check(corrupt: bytes) -> None:
        path.write_bytes(corrupt)
        if params := outcome("gguf", path, lambda: fgpt.load(str(path))):
            check_gguf(arch, params, path, config)

    check(data)
    assert fgpt.load(str(path)) is not None
    for corrupt in (*cuts(data, 40), *flips(data, 40, start), *flips(data, 10, seed=1)):
        check(corrupt)
    path.write_bytes(data)
    keys = [field.offset for field in gguf.GGUFReader(path).fields.values() if field.offset]
    for word in (8, 16, 24):  # the counts of tensors and keys, the length of the first key
        for count in (0, 1, 2, 70_000, 2**24, 2**31, 2**40, 2**63 - 1, 2**64 - 1):
            check(data[:word] + struct.pack("<Q", count) + data[word + 8 :])
    for offset in keys[:12]:  # the type of a key's value, after its length and its name
        kind_at = offset + 8 + int.from_bytes(data[offset : offset + 8], "little")
        for number in (3, 7, 8, 9, 13, 2**32 - 1):
            check(data[:kind_at] + struct.pack("<I", number) + data[kind_at + 4 :])
    enough("gguf", len(GGUFS))


# ----------------------------------------------------------------------------------------------------------------- PEFT

LLAMA: dict[str, Any] = {
    "norm_type": "rms",
    "gated_mlp": True,
    "rotary_dim": 8,
    "tie_word_embeddings": False,
    "activation": "silu",
    "biases": "",
}
HUB = {"self_attn.q_proj": "attn.q", "self_attn.v_proj": "attn.v", "mlp.up_proj": "mlp.up", "mlp.down_proj": "mlp.down"}
MADE: dict[str, Callable[[fgpt.GPT], fgpt.Adapters]] = {
    "lora": lambda p: fgpt.lora(p, fgpt.key(0), 2, 6, r".*\.(q|v)"),
    "dora": lambda p: fgpt.dora(p, fgpt.key(0), 2, 6, r".*\.(q|up)"),
    "ia3": lambda p: fgpt.ia3(p, r".*\.v", r".*\.down"),
    "norms": lambda p: fgpt.trainable_leaves(p, r".*ln_.\.w"),
}


def adapters_said(folder: Path) -> dict[str, Any]:
    """An adapter's tensors and numbers by our paths, of what PEFT's two files say, by PEFT's own rules."""
    config = json.loads((folder / "adapter_config.json").read_text())
    found: dict[str, Any] = {}
    for name, x in load_file(folder / "adapter_model.safetensors").items():
        module, part = re.fullmatch(
            r"(?:base_model\.model\.)(?:model\.)?(.*?)\."
            r"(lora_A|lora_B|lora_magnitude_vector|ia3_l|ln_tuning_layers)(?:\.default)?(?:\.weight)?",
            name,
        ).groups()  # pyright: ignore[reportOptionalMemberAccess]
        layer = re.sub(r"layers\.(\d+)\.", r"blocks.\1.", module)
        for theirs, ours in (HUB | {"input_layernorm": "ln_1", "post_attention_layernorm": "ln_2"}).items():
            layer = layer.replace(theirs, ours)
        layer = "ln_f" if layer == "norm" else layer
        found.setdefault(layer, {})[part] = x.float()
        if part == "lora_A":

            def by(patterns: Any, default: Any, module: str = module) -> Any:
                known = (n for p, n in (patterns or {}).items() if re.match(rf"(.*\.)?({p})$", f"model.{module}"))
                return next(known, default)

            rank, alpha = (
                by(config.get("rank_pattern"), config.get("r")),
                by(config.get("alpha_pattern"), config["lora_alpha"]),
            )
            found[layer] |= {"r": rank or x.shape[0], "alpha": alpha, "rs": bool(config.get("use_rslora"))}
            found[layer] |= {"dropout": config.get("lora_dropout") or 0}
    return found


def check_peft(adapters: Any, folder: Path) -> None:
    expected = adapters_said(folder)
    assert {path.removesuffix(".w") if isinstance(x, Tensor) else path for path, x in adapters.items()} == set(expected)
    x: Any
    for path, x in adapters.items():
        parts = expected[path.removesuffix(".w") if isinstance(x, Tensor) else path]
        lora = x.lora if isinstance(x, fgpt.DoRA) else x
        if isinstance(x, Tensor):
            agree({"": x}, {"": parts["ln_tuning_layers"]})
        elif isinstance(lora, fgpt.LoRA):
            agree({"a": lora.a, "b": lora.b}, {"a": parts["lora_A"], "b": parts["lora_B"]})
            assert lora.a.shape[0] == parts["r"]
            assert (lora.alpha, lora.rs, lora.dropout) == (parts["alpha"], parts["rs"], parts["dropout"])
            assert isinstance(x, fgpt.DoRA) == ("lora_magnitude_vector" in parts)
            if isinstance(x, fgpt.DoRA):
                agree({"m": x.m}, {"m": parts["lora_magnitude_vector"].flatten()})
        else:
            assert isinstance(lora, fgpt.IA3)
            agree({"": lora.row if lora.col is None else lora.col}, {"": parts["ia3_l"].flatten()})


def with_patterns(params: fgpt.GPT, folder: Path) -> None:
    """Add a LoRA of another rank and alpha to the folder, as PEFT writes it."""
    path, config_path = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    tensors, config = load_file(path), json.loads(config_path.read_text())
    fgpt.save_peft(with_noise(fgpt.lora(params, fgpt.key(1), 3, 5, r".*\.up")), params, folder, "base")
    save_file(tensors | load_file(path), path, {"format": "pt"})
    more = {name: {r"layers\.0\.mlp\.up_proj": x} for name, x in (("rank_pattern", 3), ("alpha_pattern", 5))}
    targets = [*config["target_modules"], "mlp.up_proj"]
    config_path.write_text(json.dumps(config | more | {"target_modules": targets}))


@pytest.mark.parametrize("kind", MADE)
def test_spoiled_peft_adapters(kind: str, tmp_path: Path):
    params = tiny(n_layer=1, **LLAMA)
    fgpt.save_peft(with_noise(MADE[kind](params)), params, tmp_path, "base")
    if kind == "lora":
        with_patterns(params, tmp_path)
    path, config_path = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    data, config = path.read_bytes(), json.loads(config_path.read_text())
    header, body = apart(data)

    def read() -> None:
        if adapters := outcome("peft", tmp_path, lambda: load_peft(tmp_path, params)):
            check_peft(adapters, tmp_path)

    def check(corrupt: bytes) -> None:
        path.write_bytes(corrupt)
        read()

    def configured(text: str) -> None:
        config_path.write_bytes(text.encode("utf-8", "surrogatepass"))
        read()

    configured(json.dumps(config))
    assert load_peft(tmp_path, params)
    for corrupt in (*structural(data), *lengths(data)[::4], *cuts(data, 5), *flips(data, 15, len(data) - len(body))):
        check(corrupt)
    each(20, mutated(header), lambda text: check(together(text, body)))
    path.write_bytes(data)
    for text in DEEP:
        configured(text)
    each(40, mutated(config), configured)
    enough("peft", len(MADE))


# -------------------------------------------------------------------------------------------------------------- configs

GPT2 = {"model_type": "gpt2", "n_layer": 1, "n_head": 2, "n_embd": 16, "n_positions": 24, "vocab_size": 31}
GPT2 |= {"n_inner": 40, "layer_norm_epsilon": 1e-5, "activation_function": "gelu_new", "tie_word_embeddings": True}
GPT2 |= {"scale_attn_weights": True, "torch_dtype": "float32", "bos_token_id": 30}
GPTJ = {k: v for k, v in GPT2.items() if k not in ("scale_attn_weights",)}
GPTJ |= {"model_type": "gptj", "rotary_dim": 4, "tie_word_embeddings": False}
SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 40, "vocab_size": 31}
SIZES |= {"max_position_embeddings": 24, "tie_word_embeddings": False, "torch_dtype": "bfloat16"}
STRETCHED = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
STRETCHED |= {"original_max_position_embeddings": 8}
WARPED = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 4}
WARPED |= {"beta_fast": 8, "beta_slow": 1.0, "attention_factor": 1.5, "truncate": False, "mscale": 1.0}
CONFIGS: dict[str, dict[str, Any]] = {
    "gpt2": GPT2,
    "gptj": GPTJ,
    "neox": SIZES
    | {"model_type": "gpt_neox", "hidden_act": "gelu", "layer_norm_eps": 1e-5, "rotary_pct": 0.5}
    | {"use_parallel_residual": True, "rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
    "llama": SIZES
    | {"model_type": "llama", "hidden_act": "silu", "num_key_value_heads": 1, "head_dim": 8, "rms_norm_eps": 1e-6}
    | {"attention_bias": False, "mlp_bias": False, "rope_theta": 1e4, "rope_scaling": STRETCHED}
    | {"layer_types": ["full_attention"]},
    "mistral": SIZES
    | {"model_type": "mistral", "hidden_act": "silu", "num_key_value_heads": 1, "head_dim": 8, "rms_norm_eps": 1e-6}
    | {"sliding_window": 3, "rope_parameters": WARPED},
    "qwen2": SIZES
    | {"model_type": "qwen2", "hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 1e4}
    | {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 0, "layer_types": ["sliding_attention"]}
    | {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
}
SAME = {
    "n_layer": ("n_layer", "num_hidden_layers"),
    "n_head": ("n_head", "num_attention_heads"),
    "d_model": ("n_embd", "hidden_size"),
    "n_ctx": ("n_positions", "max_position_embeddings"),
    "vocab_size": ("vocab_size",),
    "d_mlp": ("n_inner", "intermediate_size"),
    "norm_eps": ("layer_norm_epsilon", "layer_norm_eps", "rms_norm_eps"),
    "tie_word_embeddings": ("tie_word_embeddings",),
    "kv_heads": ("num_key_value_heads",),
    "head_size": ("head_dim",),
    "parallel_residual": ("use_parallel_residual",),
}
"""Fields of ours, and what the hub calls them: where they are there, they are equal."""


def check_config(cfg: Config, said: dict[str, Any]) -> None:
    for ours, theirs in SAME.items():
        for name in theirs:
            if said.get(name) is not None and not (
                name == "use_parallel_residual" and said["model_type"] != "gpt_neox"
            ):
                if name in ("num_key_value_heads", "head_dim") and said["model_type"] != "llama":
                    continue
                if ours == "n_ctx" and isinstance(cfg.rope_scaling, DynamicScaling):
                    continue
                assert getattr(cfg, ours) == said[name], name
                assert type(getattr(cfg, ours)) in (type(said[name]), float), name
    assert math.isfinite(cfg.norm_eps)
    assert cfg.norm_eps >= 0
    assert math.isfinite(cfg.rope_theta)
    assert cfg.rope_theta > 0
    if cfg.rotary_dim and said["model_type"] != "gptj":
        scaling = said.get("rope_parameters") or said.get("rope_scaling") or {}
        assert cfg.rope_theta == scaling.get("rope_theta", said.get("rope_theta", said.get("rotary_emb_base", 1e4)))
        if scaling.get("rope_type", scaling.get("type")) == "yarn":
            assert isinstance(cfg.rope_scaling, YarnScaling)
            assert all(math.isfinite(x) and x > 0 for x in cfg.rope_scaling[:-1])
            if cfg.rotary_dim % 2 == 0:  # else the model is refused as soon as it has leaves
                rope_cos_sin(torch.arange(9), cfg.rotary_dim, cfg.rope_theta, cfg.rope_scaling)
        if scaling.get("rope_type", scaling.get("type")) == "dynamic":
            assert isinstance(cfg.rope_scaling, DynamicScaling)
            assert cfg.rope_scaling.context == said["max_position_embeddings"] <= cfg.n_ctx
        if scaling.get("rope_type") == "llama3":
            assert cfg.rope_scaling is not None
            assert cfg.rope_scaling == tuple(scaling[name] for name in hf_config.LLAMA_3)
            assert all(math.isfinite(x) and x > 0 for x in cfg.rope_scaling)
        if cfg.rope_scaling is None:
            assert scaling.get("rope_type", scaling.get("type", "default")) == "default"
    if said["model_type"] == "llama":
        assert ("q" in cfg.biases.split()) is bool(said.get("attention_bias"))
        assert ("gate" in cfg.biases.split()) is bool(said.get("mlp_bias"))


@pytest.mark.parametrize("kind", CONFIGS)
def test_spoiled_configs(kind: str, tmp_path: Path):
    path, value = tmp_path / "config.json", CONFIGS[kind]
    path.write_text(json.dumps(value))
    cfg = models._config(models._open(tmp_path))
    check_config(cfg, value)
    params = fgpt.init(cfg, fgpt.key(0))
    fgpt.save(params, tmp_path)

    def check(text: str) -> None:
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        if cfg := outcome("configs", tmp_path, lambda: models._config(models._open(tmp_path))):
            check_config(cfg, json.loads(text))
        options: Any
        for options in ({}, {"quantize": "int8"}):
            if params := outcome(AGAIN, tmp_path, lambda options=options: fgpt.load(str(tmp_path), **options)):
                assert params.cfg == cfg

    for text in DEEP:
        check(text)
    for name, x in value.items():
        if type(x) is int:
            for size in (10**9, 10**12, 2**63, 10**400):
                check(json.dumps(value | {name: size}))
    each(60, mutated(value), check)
    enough("configs", len(CONFIGS))


# ----------------------------------------------------------------------------------------------------------- tokenizers


def check_tokenizer(tokenizer: Tokenizer, vocab: int) -> None:
    """Asserts that what is there can be used."""
    assert tokenizer.n_vocab > 0
    assert 0 <= tokenizer.eos < vocab
    assert all(0 <= token < vocab for token in tokenizer.eos_token_ids)
    with guarded():
        try:
            tokens = tokenizer.encode("Once upon a time, 12 é\n")
        except InputError:
            return
    assert all(0 <= token < min(tokenizer.n_vocab, vocab) for token in tokens)
    assert isinstance(tokenizer.decode(tokens), str)


def charsmap(data: bytes) -> dict[str, Any]:
    return {"normalizer": {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(data).decode()}}


def twice(rule: dict[str, Any], times: int) -> dict[str, Any]:
    return {"normalizer": {"type": "Sequence", "normalizers": [rule] * times}}


PANICS: dict[str, dict[str, Any]] = {
    "an allocation of gigabytes": charsmap(b"\xff" * 4),
    "a charsmap of nothing": charsmap(b""),
    "a charsmap that is cut": charsmap(b"\x03\0\0\0abc"),
    "a charsmap that points outside": charsmap(b"\x08\0\0\0" + b"\x00\x04\xff\xff" * 2 + b"abc\0"),
    "a text that doubles again and again": twice({"type": "ByteLevel"}, 60),
    "a letter that doubles": twice({"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}, 60),
    "nothing is replaced": twice({"type": "Replace", "pattern": {"String": ""}, "content": "x"}, 1),
    "pieces of no length": {"pre_tokenizer": {"type": "FixedLength", "length": 0}},
    "a second text that is none": {
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"Sequence": {"id": "B", "type_id": 0}}],
            "pair": [],
            "special_tokens": {},
        }
    },
    "a token that the template has not": {
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "x", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [],
            "special_tokens": {},
        }
    },
    "a prefix longer than its tokens": {"model": {"continuing_subword_prefix": "####"}},
    "a prefix that cuts a character": {
        "model": {
            "vocab": {"a": 0, "ab": 1, "é": 2, "aé": 3},
            "merges": [["a", "é"]],
            "continuing_subword_prefix": "x",
        }
    },
    "a decoder that strips more than is there": {"decoder": {"type": "Strip", "content": "é", "start": 3, "stop": 3}},
    "brackets without end": {
        "pre_tokenizer": {
            "type": "Split",
            "pattern": {"Regex": "(" * 20000 + "a" + ")" * 20000},
            "behavior": "Isolated",
            "invert": False,
        }
    },
}


@pytest.mark.parametrize("name", PANICS)
def test_tokenizer_files_that_panic_or_abort(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(huggingface, "_checker", Child("validation_worker.py", 2))
    whole = json.loads(train_tokenizer().to_str())
    model = whole["model"] | PANICS[name].get("model", {})
    (tmp_path / "tokenizer.json").write_text(json.dumps(whole | PANICS[name] | {"model": model}))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|im_end|>"}')
    assert outcome("panics", tmp_path, lambda: of_folder(tmp_path, 2000)) is None
    (tmp_path / "tokenizer.json").write_text(json.dumps(whole))
    check_tokenizer(of_folder(tmp_path, 2000), 2000)  # and the next is read


def test_a_panic_while_reading_a_text(tmp_path: Path):
    """Where a file is well, a text may still be too much for the library."""

    class PanicException(BaseException): ...

    def panic() -> None:
        raise PanicException("index out of\nbounds")

    with pytest.raises(InputError, match=r"^t: index out of bounds$"):
        library_errors.call("t", panic)
    with pytest.raises(KeyboardInterrupt):
        library_errors.call("t", lambda: (_ for _ in ()).throw(KeyboardInterrupt()))


def test_spoiled_merges_and_special_tokens(tmp_path: Path):
    made = train_tokenizer()
    made.model.save(str(tmp_path))
    files = {
        "merges.txt": (tmp_path / "merges.txt").read_text(encoding="utf-8"),
        "added_tokens.json": '{"<tool>": 500, "<x>": 501}',
        "special_tokens_map.json": '{"eos_token": {"content": "<|im_end|>"}, "bos_token": "<|im_start|>"}',
        "config.json": '{"model_type": "gpt2"}',
        "tokenizer_config.json": '{"add_bos_token": true, "extra_special_tokens": ["<x>"]}',
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    check_tokenizer(of_folder(tmp_path, 600), 600)
    odd = ['{"added_tokens_decoder": 1}', '{"added_tokens_decoder": {"x": {}}}', '{"added_tokens_decoder": {"1": "a"}}']
    odd += ['{"<tool>": -1}', '{"<tool>": "1"}', "[]", "{", "a b c\n", "zzzz y\n", "a\n", '{"eos_token": 3}']
    odd += ['{"add_bos_token": true, "bos_token": "a:b c", "eos_token": "<|im_end|>"}', '{"eos_token": {"lstrip": 3}}']
    for name, text in files.items():
        for corrupt in [*odd, *cuts(text.encode(), 6), *flips(text.encode(), 6)]:
            (tmp_path / name).write_bytes(corrupt if isinstance(corrupt, bytes) else corrupt.encode())
            if found := outcome("merges", tmp_path, lambda: of_folder(tmp_path, 600)):
                check_tokenizer(found, 600)
        (tmp_path / name).write_text(text, encoding="utf-8")
    assert 0 < LOADED["merges"] < TRIED["merges"]


def test_spoiled_tokenizer_json(tmp_path: Path):
    vocab = 2000
    made = json.loads(train_tokenizer().to_str())
    configs = {
        "tokenizer.json": made,
        "tokenizer_config.json": {
            "eos_token": "<|im_end|>",
            "bos_token": {"content": "<|im_start|>", "special": True},
            "chat_template": [{"name": "default", "template": "{{ messages[0].content }}"}],
        },
        "generation_config.json": {"eos_token_id": [2, 1]},
        "config.json": {"model_type": "llama", "eos_token_id": 1},
    }
    for name, value in configs.items():
        (tmp_path / name).write_text(json.dumps(value))
    check_tokenizer(of_folder(tmp_path, vocab), vocab)

    for name, value in configs.items():
        path = tmp_path / name

        def check(data: str | bytes, path: Path = path) -> None:
            path.write_bytes(data if isinstance(data, bytes) else data.encode("utf-8", "surrogatepass"))
            if found := outcome("tokenizers", tmp_path, lambda: of_folder(tmp_path, vocab)):
                check_tokenizer(found, vocab)

        for text in DEEP:
            check(text)
        whole = json.dumps(value).encode()
        parts = [p for p in places(value) if "vocab" not in p[:2] and "merges" not in p[:2]]
        if name == "tokenizer.json":
            parts += [("model", "vocab"), ("model", "merges"), ("model", "merges", 0), ("model", "merges", 0, 0)]
            parts += [("model", "vocab", token) for token in list(value["model"]["vocab"])[:3]] * 3
            for corrupt in (*cuts(whole, 10), *flips(whole, 15)):
                check(corrupt)
        each(45 if name == "tokenizer.json" else 20, mutated(value, tuple(parts)), check)
        path.write_bytes(whole)
    enough("tokenizers", 3)


@pytest.mark.parametrize("name", ["vocab.json", "ranks.tiktoken"])
def test_spoiled_vocabularies(name: str, tmp_path: Path):
    nano = fgpt.tokenizer("nano")
    ranks = nano.files()["ranks.tiktoken"]  # pyright: ignore[reportAttributeAccessIssue]
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    path, vocab = tmp_path / name, nano.n_vocab + 5
    first = ranks.splitlines()[0].split()[0]
    if name == "vocab.json":
        from base64 import b64decode

        from fgpt.tokenizers.tiktoken_bpe import BYTE_OF_CHAR

        char = {byte: c for c, byte in BYTE_OF_CHAR.items()}
        value = {"".join(char[b] for b in b64decode(line.split()[0])): i for i, line in enumerate(ranks.splitlines())}
        whole = json.dumps(value)
    else:
        value, whole = None, ranks

    def check(data: bytes) -> None:
        path.write_bytes(data)
        if found := outcome("tokenizers", tmp_path, lambda: of_folder(tmp_path, vocab)):
            check_tokenizer(found, vocab)
            if name == "vocab.json":
                said = {k: v for k, v in json.loads(data).items() if k != "<|endoftext|>"}
                assert found.n_vocab == len(said) + 1
                assert all(type(rank) is int for rank in said.values())

    check(whole.encode())
    for corrupt in (*cuts(whole.encode(), 12), *flips(whole.encode(), 20)):
        check(corrupt)
    if value is not None:
        for text in DEEP:
            check(text.encode("utf-8", "surrogatepass"))
        few = tuple((token,) for token in list(value)[:5])
        each(15, mutated(value, ((), *few)), lambda text: check(text.encode("utf-8", "surrogatepass")))
        for odd in (1.0, True, "1", None, [], -1, 10**400):
            check(json.dumps(value | {list(value)[1]: odd}).encode())
    else:
        for line in (
            "= 1",
            f"{first} -1",
            f"{first} 1e9",
            f"{first} {10**400}",
            f"{first} {'9' * 5000}",
            f"{first}",
            "a",
        ):
            check(f"{whole}{line}\n".encode())
    enough("tokenizers", 3)


@pytest.mark.parametrize(
    "data", [b"\xff\xfe", b"{{ ''.__class__ }}", b"{% for", "{{ '\ud800' }}".encode("utf-8", "surrogatepass"), b"\0"]
)
def test_a_template_in_a_file_of_its_own(data: bytes, tmp_path: Path):
    (tmp_path / "tokenizer.json").write_text(train_tokenizer().to_str())
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|im_end|>"}')
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "chat_template.jinja").write_bytes(data)
    if found := outcome("tokenizers", tmp_path, lambda: of_folder(tmp_path, 2000)):
        with suppress(InputError):
            assert isinstance(found.apply_chat_template([{"role": "user", "content": "Hi"}]), list)


# ------------------------------------------------------------------------------------------------------------- datasets

RECORDS: list[dict[str, Any]] = [
    {"instruction": "Add 2 and 3.", "input": "2, 3", "output": "5"},
    {"instruction": "Say \"hello\", then 'bye'", "input": "", "output": "hello;\nbye"},
    {"instruction": "Zähle", "input": "a\tb", "output": "1"},
]
TALKS: list[dict[str, Any]] = [
    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]},
    {"conversations": ["Hi", "Ho"]},
    {
        "pre_text": ["a"],
        "post_text": ["b"],
        "table": [["x", "1"]],
        "qa": {"question": "?", "answer": "1", "exe_ans": 1},
    },
]
LABELLED: list[dict[str, Any]] = [{"text": "good; really", "label": "pos"}, {"text": "bad", "label": 0}]


def rows_said(found: Any, given: list[Any]) -> None:
    """Asserts that rows are those that plain records make."""
    assert len(found) == len(given)
    for row, record in zip(found, given):
        if (
            isinstance(record, dict)
            and {"instruction", "output"} <= record.keys()
            and not isinstance(row.output, Tensor)
        ):
            assert row.instruction == str(record["instruction"])
            assert row.output == str(record["output"])
            assert row.input == ("" if record.get("input") is None else str(record["input"]))


def labels_said(found: Any, given: list[Any]) -> None:
    assert len(found) == len(given)
    for row, record in zip(found, given):
        assert (row.text, row.label) == (str(record["text"]).strip(), str(record["label"]).strip())


def written(records: list[dict[str, Any]], end: str) -> bytes:
    if end in (".csv", ".tsv"):
        out = io.StringIO(newline="")
        dialect: dict[str, Any] = (
            {"delimiter": "\t", "quoting": csv.QUOTE_NONE, "escapechar": "\\"} if end == ".tsv" else {}
        )
        rows = (
            [{k: re.sub(r"[\n\t\"]", " ", str(x)) for k, x in r.items()} for r in records] if end == ".tsv" else records
        )
        writer = csv.DictWriter(out, list(records[0]), **dialect)
        writer.writeheader()
        writer.writerows(rows)
        return out.getvalue().encode()
    if end == ".parquet":
        import pyarrow as pa

        out = io.BytesIO()
        pq.write_table(pa.Table.from_pylist([{k: str(x) for k, x in r.items()} for r in records]), out)
        return out.getvalue()
    if end == ".txt":
        return "".join(f"{r['text']};{r['label']}\n" for r in records).encode()
    return ("\n".join(map(json.dumps, records)) if end == ".jsonl" else json.dumps(records)).encode()


def records_said(path: Path) -> list[Any]:
    """The records of a file by a reader that is not ours."""
    if path.suffix == ".parquet":
        return pq.read_table(path).to_pylist()
    text = path.read_bytes().decode("utf-8-sig")
    if path.suffix == ".json":
        return json.loads(text)
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in re.split(r"\r\n|\r|\n", text) if line.strip()]
    if path.suffix == ".txt":
        lines = [line for line in re.split(r"\r\n|\r|\n", text) if line.strip()]
        return [dict(zip(("text", "label"), line.rsplit(";", 1))) for line in lines]
    options: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if path.suffix == ".tsv" else {}
    return list(csv.DictReader(io.StringIO(text, newline=""), **options))


@pytest.mark.parametrize("end", [".json", ".jsonl", ".csv", ".tsv", ".parquet", ".txt"])
@pytest.mark.parametrize("what", ["rows", "labels"])
def test_spoiled_datasets(what: str, end: str, tmp_path: Path):
    if (what, end) == ("rows", ".txt"):
        pytest.skip("rows of text are in no .txt")
    read, agreed = (
        (instruction_datasets.load_rows, rows_said)
        if what == "rows"
        else (classification_datasets.load_labeled_texts, labels_said)
    )
    records: Any = RECORDS if what == "rows" else LABELLED
    path = tmp_path / f"data{end}"
    data = written(records, end)

    def check(corrupt: bytes) -> None:
        path.write_bytes(corrupt)
        if found := outcome("datasets", path, lambda: read(str(path))):
            agreed(found, records_said(path))

    check(data)
    assert read(str(path))
    for corrupt in (*cuts(data, 8), *flips(data, 20)):
        check(corrupt)
    if end in (".json", ".jsonl"):
        for text in DEEP:
            check(text.encode("utf-8", "surrogatepass"))

        def text_of(text: str) -> bytes:
            one = text if end == ".json" else text.replace("\n", " ")
            return one.encode("utf-8", "surrogatepass")

        value = [*records, *TALKS] if what == "rows" else records
        each(30, mutated(value if end == ".json" else value[-1]), lambda text: check(text_of(text)))
    else:
        for corrupt in (data + b"\0", data + b"a,b,c,d,e\n", data + b'"open', data + b"\xff", data * 3, b"\n\n", b"\0"):
            check(corrupt)
        check(data + b'"' + b"x" * 200_000 + b'"\n')
    enough("datasets", 11)


# ------------------------------------------------------------------------------------------------ what has been mended

CONFIGURED: dict[str, tuple[str, dict[str, Any], str]] = {
    "layers without end": ("gpt2", {"n_layer": 10**6}, "expected at most 1024 layers, got 1000000"),
    "a giant table": (
        "gpt2",
        {"vocab_size": 10**12},
        "above 0 for vocab_size, up to 16777216; got vocab_size=1",
    ),
    "giant heads": ("llama", {"head_dim": 2**23, "num_attention_heads": 4}, "4 heads of 8388608 are too many"),
    "inner text": ("gpt2", {"n_inner": "40"}, "above 0 for n_inner, up to 16777216; got n_inner='40'"),
    "a list for a type": ("gpt2", {"model_type": ["gpt2"]}, r"model_type is \['gpt2'\], expected one of gpt2"),
    "a list for an activation": ("gpt2", {"activation_function": []}, r"activation_function=\[\] is not supported"),
    "text for false": ("llama", {"attention_bias": "false"}, "expected true or false for attention_bias, got 'false'"),
    "a null for a flag": ("llama", {"tie_word_embeddings": None}, "true or false for tie_word_embeddings, got None"),
    "text for eps": ("gpt2", {"layer_norm_epsilon": "1e-5"}, "from 0 to 1e15 for layer_norm_epsilon, got '1e-5'"),
    "no number for eps": ("llama", {"rms_norm_eps": math.nan}, "from 0 to 1e15 for rms_norm_eps, got nan"),
    "an endless theta": ("llama", {"rope_theta": math.inf}, "from 0 to 1e15 for rope_theta, got inf"),
    "theta of 0": ("llama", {"rope_theta": 0}, "a number above 0 for rope_theta, got 0"),
    "a giant theta": ("llama", {"rope_theta": 10**400}, "from 0 to 1e15 for rope_theta, got 1000000"),
    "factors that are one": (
        "llama",
        {"rope_scaling": STRETCHED | {"low_freq_factor": 4}},
        "expected low_freq_factor below high_freq_factor",
    ),
    "rope that is a list": ("neox", {"rope_parameters": [1]}, r"rope_scaling=\[1\] is not supported"),
    "rotary of nothing": (
        "neox",
        {"rope_parameters": {"partial_rotary_factor": math.nan}},
        "from 0 to 1e15 for partial_rotary_factor, got nan",
    ),
    "a list of lists of types": ("llama", {"layer_types": [[]]}, "layer_types other than 'full_attention'"),
    "a number for types": ("llama", {"layer_types": 3}, "layer_types other than 'full_attention'"),
}


@pytest.mark.parametrize("name", CONFIGURED)
def test_configs_that_were_misread(name: str, tmp_path: Path):
    kind, change, expected = CONFIGURED[name]
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS[kind] | change))
    with pytest.raises(InputError, match=expected) as caught:
        models._config(models._open(tmp_path))
    assert str(tmp_path) in str(caught.value)


def test_json_within_json_without_end(tmp_path: Path):
    deep = "[" * 100_000
    for name, read in (
        ("config.json", lambda: fgpt.load(str(tmp_path))),
        ("adapter_config.json", lambda: load_peft(tmp_path, tiny())),
        ("data.json", lambda: instruction_datasets.load_rows(tmp_path / "data.json")),
        ("data.jsonl", lambda: instruction_datasets.load_rows(tmp_path / "data.jsonl")),
    ):
        (tmp_path / name).write_text(deep)
        with pytest.raises(InputError, match=name), guarded():
            read()
    for name in ("data.json", "data.jsonl"):
        (tmp_path / name).write_text(f"[{'9' * 5000}]")
        with pytest.raises(InputError, match="cannot be read: Exceeds the limit"):
            instruction_datasets.load_rows(tmp_path / name)


ADAPTED: dict[str, tuple[str, dict[str, Any], str]] = {
    "a pattern without end": ("lora", {"alpha_pattern": {r"(\w+\.?)+x": 1, "(a|a?)*.": 2}}, ""),
    "another rank": ("lora", {"r": 4, "rank_pattern": {}}, "has a lora_A of rank 2; adapter_config.json says 4"),
    "text for false": ("lora", {"use_rslora": "false"}, "expected true or false for use_rslora, got 'false'"),
    "no number": ("lora", {"lora_alpha": math.nan, "alpha_pattern": {}}, "expected a number for lora_alpha, got nan"),
    "a giant": ("lora", {"lora_alpha": 10**400, "alpha_pattern": {}}, "expected a number for lora_alpha, got 1000"),
    "true": ("lora", {"lora_alpha": True, "alpha_pattern": {}}, "expected a number for lora_alpha, got True"),
}


@pytest.mark.parametrize("name", ADAPTED)
def test_adapter_configs_that_were_misread(name: str, tmp_path: Path):
    kind, change, expected = ADAPTED[name]
    params = tiny(n_layer=1, **LLAMA)
    fgpt.save_peft(MADE[kind](params), params, tmp_path, "base")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | change))
    if not expected:
        with guarded():
            assert load_peft(tmp_path, params)
        return
    with pytest.raises(InputError, match=expected):
        load_peft(tmp_path, params)


def test_adapters_by_two_names(tmp_path: Path):
    """Of two tensors for one place, none is the right one."""
    params = tiny(n_layer=1, **LLAMA)
    fgpt.save_peft(MADE["lora"](params), params, tmp_path, "base")
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if "q_proj.lora_A" in name)
    save_file(tensors | {name.replace("lora_A", "lora_A.default"): 2 * tensors[name]}, path)
    with pytest.raises(InputError, match="is there by another name too"):
        load_peft(tmp_path, params)
    again = {x.replace("model.model.", "model."): 2 * y for x, y in tensors.items() if "q_proj" in x}
    assert not again.keys() & tensors.keys()
    save_file(tensors | again, path)
    with pytest.raises(InputError, match="two adapters are on one layer"):
        load_peft(tmp_path, params)
    save_file(tensors | {name: tensors[name].int()}, path)
    with pytest.raises(InputError, match="expected a floating dtype, got int32"):
        load_peft(tmp_path, params)


def test_what_a_stack_held_is_not_lost(tmp_path: Path):
    """Metadata that name no part of a norm would drop it; those of ranks without end would be an overflow."""
    params = tiny(n_layer=1)
    path = tmp_path / "adapter_model.safetensors"
    fgpt.save_peft(fgpt.trainable_leaves(params, "ln_f.w"), params, tmp_path, "base")
    for held, expected in (({}, "expected an object of objects"), ({"x": []}, "names 'x' of transformer.ln_f")):
        save_file(load_file(path), path, {"fgpt_held": json.dumps({"transformer.ln_f": held})})
        with pytest.raises(InputError, match=expected):
            load_peft(tmp_path, params)
    fgpt.save_peft(fgpt.lora(params, fgpt.key(0), 2, target=r".*\.q"), params, tmp_path, "base")
    for rank in (math.inf, -1, 10**400):
        save_file(load_file(path), path, {"fgpt_held": json.dumps({"transformer.h.0.attn.c_attn": {"q": [rank, 4]}})})
        with pytest.raises(InputError, match="stacked q"):
            load_peft(tmp_path, params)
    for parts in ({"q": [1, 4, False]}, {"": [1, 4, False]}):  # A has two rows that are not zero
        save_file(load_file(path), path, {"fgpt_held": json.dumps({"transformer.h.0.attn.c_attn": parts})})
        with pytest.raises(InputError, match="stacked parts have ranks 1 in all, but A has 2 rows that are not zero"):
            load_peft(tmp_path, params)


@pytest.mark.parametrize(
    ("place", "value", "expected"),
    [
        ("alpha", 10**400, "alpha: expected float"),
        ("alpha", math.nan, "a finite alpha"),
        ("dropout", 1.0, "a dropout from 0 to less than 1"),
        ("dropout", -1, "a dropout from 0 to less than 1"),
    ],
)
def test_trees_whose_numbers_are_none(place: str, value: Any, expected: str, tmp_path: Path):
    params, path = tiny(n_layer=1), tmp_path / "a.safetensors"
    fgpt.save_adapters(fgpt.lora(params, fgpt.key(0), 2, target="blocks.0.attn.q"), path)
    with safe_open(path, framework="pt") as file:
        structure = json.loads(file.metadata()["structure"])
    structure["dict"]["blocks.0.attn.q"]["LoRA"][place] = value
    save_file(load_file(path), path, {"format": "fgpt", "structure": json.dumps(structure)})
    with pytest.raises(InputError, match=expected):
        fgpt.load_adapters(path, params)


def test_a_lora_of_rank_0(tmp_path: Path):
    params, path = tiny(n_layer=1), tmp_path / "a.safetensors"
    serialization.write_tree(path, {"blocks.0.attn.q": fgpt.LoRA(torch.zeros(0, 16), torch.zeros(16, 0), 1.0)})
    with pytest.raises(InputError, match="expected a rank above 0"):
        fgpt.load_adapters(path, params)


def test_a_tensor_by_two_names(whole: Path):
    """With a prefix and without: the one that came last was taken."""
    path = whole / "model.safetensors"
    tensors = load_file(path)
    save_file(tensors | {"wte.weight": 2 * tensors["transformer.wte.weight"]}, path)
    with pytest.raises(InputError, match=r"transformer\.wte\.weight is there without transformer\. too"):
        fgpt.load(str(whole))


@pytest.mark.parametrize("name", ["a\nb", "\x1b[2J", "x" * 501])
def test_names_that_no_line_can_show(name: str, whole: Path):
    path = whole / "model.safetensors"
    save_file(load_file(path) | {name: torch.zeros(1)}, path)
    with pytest.raises(InputError, match="expected up to 500 printable characters") as caught:
        fgpt.load(str(whole))
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("rank", [1.0, True, "1", None])
def test_ranks_of_a_vocabulary_are_whole_numbers(rank: Any, tmp_path: Path):
    from fgpt.tokenizers.tiktoken_bpe import BYTE_OF_CHAR, from_vocab

    vocab = {char: i for i, char in enumerate(BYTE_OF_CHAR)}
    (tmp_path / "vocab.json").write_text(json.dumps(vocab | {list(vocab)[1]: rank}))
    with pytest.raises(InputError, match="expected every rank from 0 on once"):
        from_vocab(tmp_path / "vocab.json")


def test_codes_that_are_taken_for_scales(tmp_path: Path):
    """A state that tells of no nested scales, over those that are: codes are no scales."""
    params = tiny(**LLAMA | {"n_layer": 1, "d_model": 64, "d_mlp": 64, "rotary_dim": 32})
    fgpt.save(params, tmp_path)
    tensors = as_bitsandbytes(params)
    name = next(name for name in tensors if "quant_state" in name)
    state = json.loads(bytes(tensors[name].tolist()))
    plain = {key: x for key, x in state.items() if "nested" not in key}
    save_file(tensors | {name: packed(json.dumps(plain))}, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=r"absmax: expected float32, as its state has no nested scales, got uint8"):
        fgpt.load(str(tmp_path))


def test_a_key_of_a_tree_that_no_line_can_show(tmp_path: Path):
    save_file(
        {"a": torch.zeros(1)}, tmp_path / "a", {"format": "fgpt", "structure": '{"dict": {"\\u001b[2J": "tensor"}}'}
    )
    with pytest.raises(InputError, match="a key of the tree is") as caught:
        serialization.read_tree(tmp_path / "a")
    assert str(caught.value).isprintable()


def test_a_column_that_is_there_twice(tmp_path: Path):
    (tmp_path / "a.csv").write_text("instruction,output,output\na,b,c\n")
    with pytest.raises(InputError, match="two columns are called 'output'"):
        instruction_datasets.load_rows(tmp_path / "a.csv")


def test_over_a_thousand_files():
    """As many as each test above makes sure of."""
    assert sum(COUNTS.values()) >= 1000
