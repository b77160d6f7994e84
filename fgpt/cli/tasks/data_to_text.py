"""Data-to-text generation, from its recipe to scores against several references."""

from dataclasses import dataclass
from pathlib import Path
from typing import cast

from fgpt.cli import run_dir
from fgpt.cli.evaluation.data_to_text import (
    load_references,
    reference_metrics,
    require_metrics,
    save_texts,
    with_decoding,
    write_texts,
)
from fgpt.cli.evaluation.options import RunEvaluationOptions
from fgpt.cli.evaluation.shared_evaluation import check_shared_evaluation
from fgpt.cli.evaluation.tables import Metrics
from fgpt.cli.tasks.instruction_tuning import InstructionTask
from fgpt.cli.training.build import load_base
from fgpt.cli.training.tokenizer import load_tokenizer
from fgpt.data.classification_datasets import Columns
from fgpt.errors import InputError
from fgpt.recipes import DataToTextRecipe, InstructionRecipe


@dataclass(frozen=True, eq=False)
class DataToTextTask(InstructionTask):
    """Tune a base to write texts from data. Its texts are scored by an evaluation, as a beam search takes a while."""

    @classmethod
    def build(cls, recipe: InstructionRecipe) -> InstructionTask:
        """Raises InputError for bad input, that of the test set too."""
        assert isinstance(recipe, DataToTextRecipe)
        if recipe.test is not None:
            load_references(recipe.test, recipe)
        return super().build(recipe)

    @staticmethod
    def evaluate(recipe: InstructionRecipe, folder: Path, options: RunEvaluationOptions) -> dict[str, Metrics]:
        recipe = with_decoding(cast(DataToTextRecipe, recipe), options)
        if (options.columns, options.labels, options.num_generations) != (Columns(), (), None):
            raise InputError(f"{folder} writes texts from data: leave out --columns, --labels and --num-generations")
        source = options.test or recipe.test
        if source is None:
            raise InputError(f"{recipe.name} has nothing to score: give --test FILE, inputs and their references")
        require_metrics()
        test = load_references(source, recipe, options.limit)
        params, tokenizer = run_dir.load_tuned(folder, load_base(recipe)), load_tokenizer(recipe).tokenizer
        check_shared_evaluation(options, params, {"test rows": str(test)})
        texts = write_texts(params, tokenizer, recipe, test.rows, options.batch_size)
        if options.outputs is not None:
            save_texts(texts, options.outputs)
        return {"test": reference_metrics(recipe, test, texts)}
