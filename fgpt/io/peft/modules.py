"""The hub's modules and our layers by name: what an adapter of PEFT's may be on, or a weight of its files be of."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from fgpt import families
from fgpt.errors import InputError
from fgpt.families.mapping import TensorMapping, is_head
from fgpt.model import Config, Embedding, Linear, Norm, RMSNorm, abstract_params
from fgpt.tree import walk

PREFIX = "base_model.model."
HEAD, OLD_HEAD = "lm_head", "embed_out"  # of a GPT-NeoX before transformers 5.14, and of its files
SCORE = "score"
"""A classifier's head, in every family."""

LEAVES = {"weight": "w", "bias": "b"}
"""The hub's names of a module's tensors, and ours."""


@dataclass(frozen=True)
class Module:
    """A linear layer, an embedding or a norm of the hub's, and where it is in our tree."""

    name: str
    path: str
    parts: tuple[str, ...]
    """q, k and v if the module is all three, and `path` the layer of a fused base; else `path` alone."""
    norm: bool
    embedding: bool
    transposed: bool
    heads: int
    """If above 0, its rows are those of q, k and v interleaved, head by head."""

    def tensor_mapping(self, ending: str) -> TensorMapping:
        """Its weight or bias, and the leaves of ours that it holds."""
        paths = tuple(f"{part}.{LEAVES[ending]}" for part in self.parts)
        return TensorMapping(f"{self.name}.{ending}", paths, self.transposed and ending == "weight", self.heads)


def modules_of(cfg: Config, classes: bool = False) -> list[Module]:
    """The modules of a model, with the head of a classifier if `classes`.

    Raises InputError if no family has it.
    """
    try:
        family = families.family_of(cfg)
    except InputError:
        says = "PEFT's files name layers as a family of the hub's does, and this model is of none"
        raise InputError(f"{says}: save_adapters(adapters, path) keeps its adapters") from None
    nodes, modules = dict(walk(abstract_params(cfg))), []
    for s in family.tensor_mappings(cfg):
        parts = tuple(path.removesuffix(".w") for path in s.paths)
        if is_head(s.name) or not isinstance(node := nodes[parts[0]], Linear | Embedding | Norm | RMSNorm):
            continue  # a bias, which goes with its weight, or the head, which every model has
        name, norm = family.prefix + s.name.removesuffix(".weight"), isinstance(node, Norm | RMSNorm)
        path = parts[0] if len(parts) == 1 else f"{parts[0][:-1]}qkv"
        modules.append(Module(name, path, parts, norm, isinstance(node, Embedding), s.transposed, s.heads))
    return [*modules, Module(SCORE if classes else HEAD, "head", ("head",), False, False, False, 0)]


def by_name(known: Iterable[Module]) -> dict[str, Module]:
    """The modules by all that a file may call them: of a model without its head, they have no prefix."""
    return {name: m for m in known for name in (m.name, m.name.partition(".")[2] or OLD_HEAD)}


def targets(chosen: Iterable[Module], known: Iterable[Module]) -> list[str]:
    """The shortest names that select just `chosen`: that of a layer if all modules that it selects are among them."""
    names, selectors = {m.name for m in chosen}, set()
    rest = [f".{m.name}" for m in known if m.name not in names]
    for name in names:
        layer = re.sub(r"^(\w+\.)?(\w+\.\d+\.)?", "", name)
        selectors.add(name if any(x.endswith(f".{layer}") for x in rest) else layer)
    return sorted(selectors)
