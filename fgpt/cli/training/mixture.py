"""The mixture that a fine-tuning recipe asks for, and its figures by source."""

from collections.abc import Sequence

from fgpt.cli.console import console
from fgpt.cli.training.examples import source_weights
from fgpt.data.examples import Example, example_lengths
from fgpt.data.mixtures import Mixture, MixtureSource, mix
from fgpt.recipes import InstructionRecipe


def mix_sources(recipe: InstructionRecipe, examples: Sequence[Sequence[Example]]) -> Mixture:
    """The mixture of a recipe's sources, of which a line each is printed if there are several.

    Args:
        recipe: The recipe, whose sources have weights or not.
        examples: The examples of each source.

    Raises InputError as `mix` does.
    """
    sources = []
    for (name, weight), its_examples in zip(source_weights(recipe.data), examples, strict=True):
        tokens = int(example_lengths(its_examples).sum())
        sources.append(MixtureSource(name, weight, len(its_examples), tokens))
    mixture = mix(sources, recipe.mixture)
    if len(sources) > 1:
        for line in describe_mixture(sources, mixture):
            console.print(line, markup=False, soft_wrap=True)
    return mixture


def describe_mixture(sources: Sequence[MixtureSource], mixture: Mixture) -> list[str]:
    r"""A line for each source: its examples and tokens, and their share of an epoch.

    >>> sources = [MixtureSource("a", 3.0, 10, 50), MixtureSource("b", 1.0, 10, 150)]
    >>> print(*describe_mixture(sources, mix(sources)), sep="\n")
    a: 10 examples of 50 tokens; an epoch draws 15 (75.0 %), about 75 tokens (50.0 %)
    b: 10 examples of 150 tokens; an epoch draws 5 (25.0 %), about 75 tokens (50.0 %)
    """
    tokens = [source.tokens * count / max(1, source.size) for source, count in zip(sources, mixture.counts)]
    lines = []
    for source, count, drawn_tokens in zip(sources, mixture.counts, tokens):
        part, token_part = count / sum(mixture.counts), drawn_tokens / sum(tokens)
        if source.weight is None:
            lines.append(f"{source.name}: {count:,} examples, {source.tokens:,} tokens ({token_part:.1%})")
        else:
            lines.append(
                f"{source.name}: {source.size:,} examples of {source.tokens:,} tokens; an epoch draws {count:,} "
                f"({part:.1%}), about {drawn_tokens:,.0f} tokens ({token_part:.1%})"
            )
    return [line.replace("%", " %") for line in lines]
