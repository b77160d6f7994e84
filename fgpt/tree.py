"""Params trees: nodes are frozen dataclasses, every leaf has a dotted path, an update copies only what it changes.

blocks.3.attn.q        a layer (a node)
blocks.3.attn.q.w      a leaf (a tensor)
"""

import dataclasses
import difflib
import itertools
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar, dataclass_transform

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils import _pytree as pytree

from fgpt.errors import InputError, short_repr
from fgpt.patterns import matching

T = TypeVar("T")

_FIELDS: dict[type, tuple[tuple[str, ...], tuple[str, ...]]] = {}
"""The names of the dynamic and of the static fields of every node class."""
_REGISTRIES: dict[str, Callable[[type], None]] = {}
"""What registers a node class with another library's trees, by its name: see `register_with_optree`."""


def static(**options: Any) -> Any:
    """A field of the tree's structure, not a child: hashable, never differentiated."""
    return dataclasses.field(metadata={"static": True}, **options)


@dataclass_transform(frozen_default=True, field_specifiers=(static, dataclasses.field))
def node(cls: type[T]) -> type[T]:
    """Make `cls` a frozen dataclass and a torch pytree whose children have key paths.

    A field that is None belongs to the structure, like static ones: torch's pytree treats None as a leaf, and
    torch.func.grad refuses leaves that are not tensors.

    >>> @node
    ... class Affine:
    ...     w: Tensor
    ...     b: Tensor | None = None
    >>> list(leaves(Affine(torch.ones(2))))
    ['w']

    A node shows the shapes of its tensors, and none of their elements:

    >>> Affine(torch.ones(2, 3))
    Affine(w=float32[2, 3])
    """
    cls = dataclasses.dataclass(frozen=True, eq=False, repr=False)(cls)  # eq would compare tensors elementwise
    cls.__repr__ = lambda self: describe(self)
    specs = dataclasses.fields(cls)  # pyright: ignore[reportArgumentType]
    statics = tuple(f.name for f in specs if f.metadata.get("static"))
    dynamics = tuple(f.name for f in specs if not f.metadata.get("static"))

    def flatten(x: Any) -> tuple[list[Any], tuple[Any, ...]]:
        fields = vars(x)
        present = tuple([name for name in dynamics if fields[name] is not None])
        return [fields[name] for name in present], (present, tuple([fields[name] for name in statics]))

    def flatten_with_keys(x: Any) -> tuple[list[Any], tuple[Any, ...]]:
        values, context = flatten(x)
        return [(pytree.GetAttrKey(name), value) for name, value in zip(context[0], values, strict=True)], context

    def unflatten(values: Iterable[Any], context: tuple[Any, ...]) -> T:
        # Without __init__, whose types a checker would check: torch.func puts axes and stacked tensors into trees too.
        present, static_values = context
        x = object.__new__(cls)
        for name in dynamics:  # field by field: torch 2.11 compiles no update of vars(x)
            object.__setattr__(x, name, None)
        for name, value in zip(present, values):
            object.__setattr__(x, name, value)
        for name, value in zip(statics, static_values):
            object.__setattr__(x, name, value)
        return x

    _FIELDS[cls] = dynamics, statics
    pytree.register_pytree_node(
        cls,
        flatten,
        unflatten,
        flatten_with_keys_fn=flatten_with_keys,
        serialized_type_name=f"{cls.__module__}.{cls.__qualname__}",
    )
    for register in _REGISTRIES.values():
        register(cls)
    return cls


LINE_WIDTH = 100
"""Characters of a description's line, above which each field has one of its own."""


def describe(tree: Any, indent: str = "") -> str:
    """A tree as text: of a tensor its dtype and shape, of equal neighbors in a list one and their number.

    Args:
        tree: Any tree, such as params or adapters.
        indent: What each line but the first begins with.

    >>> print(describe({"layers": [torch.zeros(2, 3), torch.ones(2, 3)], "scale": 1.0}))
    {layers: [2 x float32[2, 3]], scale: 1.0}
    """
    if isinstance(tree, Tensor):
        place = "" if tree.device.type == "cpu" else f" on {tree.device}"
        return f"{str(tree.dtype).removeprefix('torch.')}{list(tree.shape)}{place}"
    inner = indent + "  "
    if type(tree) in _FIELDS:
        fields = [(f.name, getattr(tree, f.name)) for f in dataclasses.fields(tree)]
        parts = [f"{name}={describe(value, inner)}" for name, value in fields if value is not None]
        begin, end = f"{type(tree).__name__}(", ")"
    elif isinstance(tree, Mapping):
        parts = [f"{key}: {describe(value, inner)}" for key, value in tree.items()]
        begin, end = "{", "}"
    elif isinstance(tree, list | tuple) and tree:
        parts = []
        for text, equal in itertools.groupby(describe(x, inner) for x in tree):
            count = len([*equal])
            parts += [f"{count} x {text}"] if count > 1 and "[" in text else [text] * count  # numbers stay apart
        begin, end = ("[", "]") if isinstance(tree, list) else ("(", ")")
    else:
        return repr(tree)
    line = f"{begin}{', '.join(parts)}{end}"
    if len(indent) + len(line) <= LINE_WIDTH and "\n" not in line:
        return line
    return "\n".join([begin, *[f"{inner}{part}," for part in parts], f"{indent}{end}"])


def children(tree: Any) -> list[tuple[str, Any]]:
    """The named children of a node, tuple, list or dict; nothing for a leaf."""
    if isinstance(tree, Tensor):
        return []
    if type(tree) in _FIELDS:
        fields = vars(tree)
        return [(name, fields[name]) for name in _FIELDS[type(tree)][0] if fields[name] is not None]
    if isinstance(tree, Mapping):
        return [(str(k), v) for k, v in tree.items()]
    if isinstance(tree, tuple | list):
        return [(str(i), v) for i, v in enumerate(tree)]
    return []


def walk(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every (path, subtree) below `tree`, parents first, leaves included.

    Below the keys of a dict of paths, such as adapters, a path continues after a slash: `blocks.0.attn.q/b` is the B of
    an adapter, `blocks.0.attn.q.b` a trainable bias.
    """
    separator = _separator(tree)
    for name, child in children(tree):
        child_path = f"{path}{name}"
        yield child_path, child
        yield from walk(child, f"{child_path}{separator}")


def get_at(tree: Any, path: str) -> Any:
    """The subtree at `path`; None if there is none. It descends to it, where `walk` visits the whole tree.

    >>> get_at({"layers": [torch.ones(1)]}, "layers.0")
    tensor([1.])
    """
    head, _, rest = path.partition(_separator(tree))
    if type(tree) in _FIELDS:
        child = vars(tree)[head] if head in _FIELDS[type(tree)][0] else None
    elif isinstance(tree, tuple | list):
        child = tree[int(head)] if head.isdecimal() and int(head) < len(tree) else None
    else:
        child = dict(children(tree)).get(head)
    return get_at(child, rest) if rest and child is not None else child


def _separator(tree: Any) -> str:
    """Between the name of a child of `tree` and the names below it."""
    return "/" if isinstance(tree, Mapping) and any("." in str(key) for key in tree) else "."


def leaves(tree: Any) -> dict[str, Tensor]:
    """The tensors of `tree` by path, in pytree order.

    >>> list(leaves({"w": torch.ones(2), "layers": [torch.ones(1)]}))
    ['w', 'layers.0']
    """
    return {path: x for path, x in walk(tree) if isinstance(x, Tensor)}


def replace_at(tree: T, new: Mapping[str, Any]) -> T:
    """`tree` with the subtrees at the given paths replaced. Untouched subtrees are shared, not copied.

    Raises InputError for a path that is not in the tree.
    """
    if "" in new:
        return new[""]
    by_child: dict[str, dict[str, Any]] = {}
    separator = _separator(tree)
    for path, value in new.items():
        head, _, rest = path.partition(separator)
        by_child.setdefault(head, {})[rest] = value
    old = dict(children(tree))
    for head in by_child.keys() - old.keys():
        raise InputError(f"no '{head}' here: expected one of {', '.join(old) or 'nothing (this is a leaf)'}")
    changed: dict[str, Any] = {head: replace_at(old[head], rest) for head, rest in by_child.items()}
    if isinstance(tree, dict):
        return {**tree, **changed}  # pyright: ignore[reportReturnType]
    if isinstance(tree, tuple | list):
        return type(tree)(changed.get(str(i), v) for i, v in enumerate(tree))  # pyright: ignore
    return dataclasses.replace(tree, **changed)  # pyright: ignore[reportArgumentType, reportCallIssue]


def matches(pattern: str, path: str) -> bool:
    """Whether `pattern` matches `path` in full. Raises InputError as `matching` does."""
    return bool(matching(pattern, [path]))


def select(paths: Iterable[str], pattern: str) -> list[str]:
    """The paths that `pattern` matches in full.

    Raises InputError if it matches none, as a selector that silently selects nothing trains nothing; and as `matching`
    does.
    """
    paths = list(paths)
    selected = matching(pattern, paths)
    if not selected:
        plain = pattern.replace("\\", "").replace("d+", "0").replace(".*", "")
        near = difflib.get_close_matches(plain, paths, n=4, cutoff=0.1) or paths[:4]
        raise InputError(f"selector {short_repr(pattern)} matches no path; nearest are {', '.join(near) or '(none)'}")
    return selected


def device(tree: Any) -> torch.device:
    """The device of the leaves of `tree`."""
    return next(iter(leaves(tree).values())).device


def num_elements(tree: Any) -> int:
    """The number of elements in the leaves of `tree`."""
    return sum(x.numel() for x in leaves(tree).values())


def nbytes(tree: Any) -> int:
    """Bytes of memory of the leaves of `tree`, with storage that they share counted once."""
    sizes = {x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in leaves(tree).values()}
    return sum(sizes.values())


def astype(tree: T, dtype: torch.dtype) -> T:
    """`tree` with its floating-point leaves in `dtype`, except the scales of quantized weights: floats next to or
    below integer codes stay as they are.
    """
    quantized: list[str] = []
    for path, x in [("", tree), *walk(tree)]:
        if any(isinstance(child, Tensor) and not child.is_floating_point() for _, child in children(x)):
            quantized.append(path)

    def is_scale(path: str) -> bool:
        return any(not parent or path.startswith((f"{parent}.", f"{parent}/")) for parent in quantized)

    new: dict[str, Tensor] = {}
    for path, x in leaves(tree).items():
        if x.is_floating_point() and not is_scale(path):
            new[path] = x.to(dtype)
    return replace_at(tree, new)


def tree_map(fn: Callable[..., Any], tree: T, *rest: Any) -> T:
    """`fn` over the leaves of one or more trees of equal structure. A leaf of `tree` may stand for a whole subtree in
    the others.

    Torch's own function takes three times as long, because it first describes every node by an object: on a small model
    a tenth of a training step, which maps over its trees ten times.

    Raises ValueError if the structures differ.
    """
    if isinstance(tree, Tensor):
        return fn(tree, *rest)
    kind: Any = type(tree)
    if kind not in _FIELDS and kind not in (dict, list, tuple):  # not a tensor, or another library's container
        return pytree.tree_map(fn, tree, *rest)
    for other in rest:
        if not _same_structure(tree, other):
            forms = " and ".join(str(pytree.tree_structure(x)) for x in (tree, other))
            raise ValueError(f"expected trees of one structure, got {forms}")
    if kind is dict:
        return {key: tree_map(fn, x, *[other[key] for other in rest]) for key, x in tree.items()}  # pyright: ignore
    if kind not in _FIELDS:
        return kind([tree_map(fn, *xs) for xs in zip(tree, *rest, strict=True)])  # pyright: ignore
    fields, others = vars(tree), [vars(other) for other in rest]
    result: Any = object.__new__(kind)
    new, (dynamics, statics) = vars(result), _FIELDS[kind]
    for name in dynamics:
        x = fields[name]
        new[name] = None if x is None else tree_map(fn, x, *[other[name] for other in others])
    for name in statics:
        new[name] = fields[name]
    return result


def _same_structure(tree: Any, other: Any) -> bool:
    """Whether two containers have the same kind, names and static fields. A dict may be of another of torch's kinds."""
    if type(tree) is dict and type(other) in (OrderedDict, defaultdict):
        return tree.keys() == other.keys()
    if type(tree) is not type(other):
        return False
    if type(tree) not in _FIELDS:
        return tree.keys() == other.keys() if isinstance(tree, dict) else len(tree) == len(other)
    x, y, (dynamics, statics) = vars(tree), vars(other), _FIELDS[type(tree)]
    same_absent = [x[name] is None for name in dynamics] == [y[name] is None for name in dynamics]
    return same_absent and [x[name] for name in statics] == [y[name] for name in statics]


def tree_leaves(tree: Any) -> list[Any]:
    """The leaves of `tree`, in pytree order."""
    result: list[Any] = []
    tree_map(result.append, tree)
    return result


def unflatten_like(tree: T, new: Iterable[Any]) -> T:
    """`tree` with the leaves `new`, in pytree order."""
    iterator = iter(new)
    return tree_map(lambda _: next(iterator), tree)


def ravel(tree: T) -> tuple[Float[Tensor, " n"], Callable[[Float[Tensor, " n"]], T]]:
    """`tree` as one vector, and the function that makes such trees of such vectors: `unravel(vector)` equals `tree`.
    Both pass every transform of torch.func.

    Leaves of several dtypes are promoted to one that has the range and digits of all, as torch.cat does, and `unravel`
    rounds each part to the dtype of its leaf. Of bf16 and fp32 the vector is in fp32.

    Args:
        tree: A tree of floating-point tensors, such as adapters, in pytree order.

    Raises:
        InputError: for a leaf that is no floating-point tensor; and from `unravel`, for a vector of another length.

    Source: jax.flatten_util.ravel_pytree.

    >>> vector, unravel = ravel({"a": torch.tensor([[1.0, 2.0]]), "b": torch.tensor(3.0)})
    >>> vector
    tensor([1., 2., 3.])
    >>> unravel(2 * vector)
    {'a': tensor([[2., 4.]]), 'b': tensor(6.)}
    """
    tensors = tree_leaves(tree)
    dtype = tensors[0].dtype if tensors and isinstance(tensors[0], Tensor) else torch.float32
    for x in tensors:
        if not isinstance(x, Tensor) or not x.is_floating_point():
            kind = str(x.dtype).removeprefix("torch.") if isinstance(x, Tensor) else type(x).__name__
            raise InputError(f"ravel expects a tree of floating-point tensors, got a leaf of {kind}")
        dtype = torch.promote_types(dtype, x.dtype)
    sizes = [x.numel() for x in tensors]
    vector = torch.cat([x.reshape(-1).to(dtype) for x in tensors]) if tensors else torch.zeros(0)

    def unravel(vector: Float[Tensor, " n"]) -> T:
        if vector.shape != (sum(sizes),):
            raise InputError(f"unravel expects a vector of {sum(sizes)} elements, got shape {list(vector.shape)}")
        parts = vector.split(sizes)
        return unflatten_like(tree, [part.view_as(x).to(x.dtype) for part, x in zip(parts, tensors, strict=True)])

    return vector, unravel


def register_with_optree() -> None:
    """Make nodes trees to optree, as they are to torch: those that there are, and those that are defined later.

    TorchOpt, posteriors and opake go through trees with optree, to which a dataclass is a leaf. Nodes are registered in
    its global namespace, which those libraries use. A second call changes nothing.

    Raises:
        ModuleNotFoundError: if optree is not installed. fgpt itself never imports it.

    >>> import fgpt, optree
    >>> fgpt.register_with_optree()
    >>> update = fgpt.LoRA(torch.ones(1, 2), torch.zeros(2, 1), alpha=1.0)
    >>> optree.tree_paths({"layer": update})
    [('layer', 'a'), ('layer', 'b')]
    """
    if "optree" in _REGISTRIES:
        return
    import optree
    from optree import registry

    def register(cls: type) -> None:
        torch_node = pytree.SUPPORTED_NODES[cls]

        def flatten(x: Any) -> tuple[list[Any], Any, tuple[str, ...]]:
            values, context = torch_node.flatten_fn(x)
            return values, context, context[0]

        def unflatten(context: Any, values: Iterable[Any]) -> Any:
            return torch_node.unflatten_fn(values, context)

        everywhere = registry.__GLOBAL_NAMESPACE
        optree.register_pytree_node(cls, flatten, unflatten, path_entry_type=optree.GetAttrEntry, namespace=everywhere)

    for cls in _FIELDS:
        register(cls)
    _REGISTRIES["optree"] = register
