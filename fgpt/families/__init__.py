"""One small file a family: its config both ways, and a table of names between Hugging Face's tensors and our leaves."""

from collections.abc import Mapping
from typing import Any

from fgpt.errors import InputError, short_repr
from fgpt.families.gpt2 import GPT2
from fgpt.families.gptj import GPTJ
from fgpt.families.llama import LLAMA
from fgpt.families.mapping import Family
from fgpt.families.neox import NEOX
from fgpt.model import Config

FAMILIES = (GPT2, GPTJ, NEOX, LLAMA)


def family_from_config(config: Mapping[str, Any]) -> Family:
    """The family of a hub's `config.json`. Raises InputError for an architecture that is none of ours."""
    known = {kind: family for family in FAMILIES for kind in family.model_types}
    if not isinstance(kind := config.get("model_type"), str) or kind not in known:
        raise InputError(
            f"model_type is {short_repr(kind)}, expected one of {', '.join(known)}; fgpt.from_module takes others"
        )
    return known[kind]


def family_of(cfg: Config) -> Family:
    """The family that a config of ours belongs to: the one that gives it back.

    Raises InputError if there is none.
    """
    for family in FAMILIES:
        try:
            if family.config_from_hf(family.config_to_hf(cfg)) == cfg:
                return family
        except InputError:
            continue
    raise InputError(f"no family has models of {cfg}")
