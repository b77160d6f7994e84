"""The tokenizer of a fine-tuning: its base's, with the new tokens of the recipe."""

from typing import NamedTuple

from fgpt.io import models
from fgpt.model import Config
from fgpt.recipes import FineTuningRecipe
from fgpt.tokenizers.tokenizer_files import Tokenizer
from fgpt.vocabulary import extend_tokenizer


class RecipeTokenizer(NamedTuple):
    """The config of a recipe's base, the tokenizer, and the ids of its new tokens."""

    config: Config
    tokenizer: Tokenizer
    new_ids: tuple[int, ...]


def load_tokenizer(recipe: FineTuningRecipe) -> RecipeTokenizer:
    """Raises InputError if there is no such base, its tokenizer does not fit, or a new token is none."""
    cfg, tokenizer = models.load_config_and_tokenizer(recipe.base)
    if not recipe.new_tokens:
        return RecipeTokenizer(cfg, tokenizer, ())
    return RecipeTokenizer(cfg, *extend_tokenizer(tokenizer, recipe.new_tokens, in_text=True))
