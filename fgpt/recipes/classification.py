"""Runs that classify texts, or pairs of them: a head of classes, or a label as the next token."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal

from fgpt.data.classification_datasets import Columns
from fgpt.data.classification_prompts import PromptWording
from fgpt.ranges import BatchSize, NonNegativeInt, PositiveInt
from fgpt.recipes.tuning import Adapter, FineTuningRecipe, Length


@dataclass(frozen=True, kw_only=True)
class ClassificationRecipe(FineTuningRecipe):
    """Training on rows of a text, or two, and a label; the loss is on the label alone."""

    train: str
    """A hub source (emotion, rte, davidson), a .txt file of text;label lines, a json, jsonl, csv, tsv or parquet file,
    or a folder."""
    test: str | None = None
    """The rows that are scored, from such a source. None takes the test split of `train` where that is a hub source
    which has one; of others it keeps `heldout` rows out of training."""
    num_heldout: PositiveInt = 200
    columns: Columns = field(default_factory=Columns)
    """Which columns of a file hold text, second text and label."""
    labels: tuple[str, ...] = ()
    """The labels in their order, each as "label", or as "label=word" to call it by another word; none sorts them."""
    head: Literal["classes", "tokens"] = "classes"
    """classes: a new head, read at the end token. tokens: the label is the next token, after the wording's suffix."""
    prompt: PromptWording = field(default_factory=PromptWording)
    """What stands around each text."""
    num_fewshot: NonNegativeInt = 0
    """Of labels as tokens, score the base with so many training rows before each text as well; 0 does not."""
    tune_also: str | None = None
    """Regular expression of leaves that are tuned beside the adapter. A head of classes is tuned always."""
    max_seq_len: Length = 128
    """Tokens in a row, into which texts are packed, each seeing itself alone. A longer text loses its middle."""
    micro_batch_size: BatchSize = 4


def emotion_small() -> ClassificationRecipe:
    """Six emotions of short texts: LoRA (r 8, alpha 16, q k v o) and a new head on gpt2, data from the hub.

    just train emotion-small. 594,432 trained parameters: 589,824 of the LoRA, 4,608 of the head. Not measured yet: it
    needs the hub.
    """
    return ClassificationRecipe(name="emotion-small", base="gpt2", train="emotion", lr=1e-3)


def emotion_smollm2() -> ClassificationRecipe:
    """emotion-small on SmolLM2-135M-Instruct; local files: --train train.txt --test test.txt.

    just train emotion-smollm2. 925,056 trained parameters: 921,600 of the LoRA, 3,456 of the head. Accuracy 0.923,
    macro-F1 0.886 on the 2,000 test rows after two epochs of 16,000, the base in int8: 1,340 steps in 66 minutes on one
    busy thread of an AMD EPYC; 1.9 GB. One epoch over fp32 gave 0.911 and 0.859 in 53 minutes.
    """
    return replace(emotion_small(), name="emotion-smollm2", base="smollm2", quantize="int8", epochs=2)


def rte_small_lora() -> ClassificationRecipe:
    """Entailment of sentence pairs: LoRA (r 8, alpha 16, q k v o) and a new head on gpt2, data from the hub.

    just train rte-small-lora. 591,360 trained parameters: 589,824 of the LoRA (442,368 of them on q, k and v) and 1,536
    of the head. Not measured yet: it needs the hub. Local files: --train train.tsv --test dev.tsv.
    """
    return ClassificationRecipe(
        name="rte-small-lora",
        base="gpt2",
        train="rte",
        columns=Columns("sentence1", "sentence2"),
        labels=("entailment", "not_entailment"),
        epochs=5,
        max_seq_len=320,
    )


def rte_smollm2() -> ClassificationRecipe:
    """Entailment by the next token, yes or no: LoRA (r 8, alpha 16, q k v o) on SmolLM2-135M-Instruct in int8.

    just train rte-smollm2 --train train.tsv --test dev.tsv. 921,600 trained parameters. Accuracy 0.686, macro-F1 0.678
    on the 277 rows of the development set, 0.498 before, the commonest label 0.527: 350 steps in 63 minutes on one busy
    thread of an AMD EPYC; 3.4 GB. Of one seed.
    """
    return replace(
        rte_small_lora(),
        name="rte-smollm2",
        base="smollm2",
        labels=("entailment=yes", "not_entailment=no"),
        head="tokens",
        prompt=PromptWording(prefix="Passage:\n", suffix="\nTrue or not? Answer yes or no:"),
        quantize="int8",
        lr=1e-3,
        epochs=2,
    )


NORMS_AND_BIASES = r".*ln_.*|.*\.b"
EVERY_MATRIX = r"blocks\..*\.(q|k|v|o|gate|up|down)|wte|head"


def hate_gptj_lora() -> ClassificationRecipe:
    """Hate speech by the next token: LoRA (r 2, attention), norms and biases of GPT-J-6B in 8 bits.

    just train hate-gptj-lora. 2,696,416 trained parameters, moments in 8 bits; blocks are recomputed. The hub's data is
    of 24,783 rows, 5.8 % of them hate; a balanced file of label,text is given by --train and --test. Not measured yet:
    it needs the hub, and of the model a folder or a revision with safetensors, --base NAME@REVISION.
    """
    return ClassificationRecipe(
        name="hate-gptj-lora",
        base="EleutherAI/gpt-j-6b",
        train="davidson",
        labels=("hate", "offensive", "neutral"),
        head="tokens",
        prompt=PromptWording("Sort the text into one of these categories: {labels}.\n\n", "Text:\n", "\nCategory:"),
        adapter=Adapter(rank=2, alpha=4),
        tune_also=NORMS_AND_BIASES,
        quantize="blockwise8",
        remat=True,
        lr=1e-4,
        optimizer="adamw8bit",
        epochs=3,
        micro_batch_size=2,
        dtype="bfloat16",
    )


def hate_gptj_ln() -> ClassificationRecipe:
    """Hate speech by the next token: norms and biases of GPT-J-6B in 8 bits.

    just train hate-gptj-ln. 861,408 trained parameters; else as hate-gptj-lora.
    """
    return replace(
        hate_gptj_lora(), name="hate-gptj-ln", adapter=Adapter("ln", target=NORMS_AND_BIASES), tune_also=None
    )


def hate_gptj_all() -> ClassificationRecipe:
    """Hate speech by the next token: LoRA (r 2, every matrix, wte and head), norms and biases of GPT-J-6B in 8 bits.

    just train hate-gptj-all. 5,208,160 trained parameters; else as hate-gptj-lora.
    """
    return replace(hate_gptj_lora(), name="hate-gptj-all", adapter=Adapter(rank=2, alpha=4, target=EVERY_MATRIX))


def _smollm2(run: ClassificationRecipe) -> ClassificationRecipe:
    """A GPT-J run on a base that needs no 8 bits."""
    name = run.name.replace("gptj", "smollm2")
    return replace(run, name=name, base="smollm2", quantize=None, remat=False, dtype="float32")


def hate_smollm2_lora() -> ClassificationRecipe:
    """Hate speech by the next token: LoRA (r 2, attention) and norms of SmolLM2-135M-Instruct.

    just train hate-smollm2-lora --train train.csv --test val.csv, where these hold label,text. 265,536 trained
    parameters. On 200 rows, 0.390 before and with 6 shots: accuracy 0.770, 0.785 and 0.805 with seeds 0, 1 and 2 after
    three epochs, 650 steps in 22 to 36 minutes on one busy thread of an AMD EPYC, 1.6 GB; 0.765 after one. With GPT-J's
    rate of 1e-4 three gave 0.610: the rate is the better of these two, chosen on those rows.
    """
    return replace(_smollm2(hate_gptj_lora()), lr=2e-3)


def hate_smollm2_ln() -> ClassificationRecipe:
    """Hate speech by the next token: norms of SmolLM2-135M-Instruct.

    just train hate-smollm2-ln --train train.csv --test val.csv. 35,136 trained parameters. On 200 rows, 0.390 before:
    accuracy 0.825, 0.790 and 0.795 with seeds 0, 1 and 2 after three epochs of 1,000 messages: 650 steps in 25 to 34
    minutes on one busy thread of an AMD EPYC, 1.5 GB. The rate is the only one that was run to its end.
    """
    return replace(_smollm2(hate_gptj_ln()), lr=5e-3)


def hate_smollm2_all() -> ClassificationRecipe:
    """Hate speech by the next token: LoRA (r 2, every matrix and the embedding) and norms of SmolLM2-135M-Instruct.

    just train hate-smollm2-all --train train.csv --test val.csv. 745,152 trained parameters.
    """
    return _smollm2(hate_gptj_all())


RUNS: tuple[Callable[[], ClassificationRecipe], ...] = (
    emotion_small,
    emotion_smollm2,
    rte_small_lora,
    rte_smollm2,
    hate_gptj_ln,
    hate_gptj_lora,
    hate_gptj_all,
    hate_smollm2_ln,
    hate_smollm2_lora,
    hate_smollm2_all,
)
