"""Classification metrics: accuracy, macro-F1 and the confusion matrix."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypedDict

from fgpt.cli.figures import escape_mathtext, save_png


class Scores(TypedDict):
    accuracy: float
    macro_f1: float
    """Mean over the classes among the true or predicted labels of 2 · precision · recall / (precision + recall)."""
    f1: list[float]
    confusion: list[list[int]]
    """Rows are true classes, columns predicted classes."""


def scores(truth: Sequence[int], predicted: Sequence[int], classes: int) -> Scores:
    """The scores of one predicted class for each true one, both as integers below `classes`."""
    metrics, labels = _sklearn_metrics(), range(classes)
    return {
        "accuracy": float(metrics.accuracy_score(truth, predicted)),
        "macro_f1": float(metrics.f1_score(truth, predicted, average="macro", zero_division=0)),
        "f1": metrics.f1_score(truth, predicted, labels=labels, average=None, zero_division=0).tolist(),
        "confusion": metrics.confusion_matrix(truth, predicted, labels=labels).tolist(),
    }


def _sklearn_metrics() -> Any:
    from sklearn import metrics  # here, because importing it takes seconds

    return metrics


def majority(train: Sequence[int], truth: Sequence[int], classes: int) -> Scores:
    """Scores of the majority-class baseline: always the class most frequent in training, the first of several."""
    majority_class = max(range(classes), key=list(train).count)
    return scores(truth, [majority_class] * len(truth), classes)


def plot_confusion(scores: Scores, names: Sequence[str], picture: Path, title: str) -> None:
    """Draw the confusion matrix: counts, colored by their share of the true class."""
    import matplotlib

    matplotlib.use("Agg")  # no display is needed
    import matplotlib.pyplot as plt

    counts, n, names = scores["confusion"], len(names), [escape_mathtext(name) for name in names]
    shares = [[count / max(1, sum(row)) for count in row] for row in counts]
    size = 2.2 + 0.85 * n
    figure, axes = plt.subplots(figsize=(size + 0.6, size), constrained_layout=True)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for i, row in enumerate(counts):
        for j, count in enumerate(row):
            axes.text(
                j, i, f"{count:,}\n{100 * shares[i][j]:.0f} %" if count else "0", ha="center", va="center", fontsize=9,
                color="white" if shares[i][j] > 0.55 else "#1d2733" if count else "#b0b9c4",
            )  # fmt: skip
    axes.set_xticks(range(n), names, rotation=35, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(n), [f"{name} ({sum(row):,})" for name, row in zip(names, counts, strict=True)])
    axes.set(xlabel="predicted label", ylabel="true label")
    axes.set_title(
        f"{escape_mathtext(title)}: confusion matrix\n"
        f"accuracy {scores['accuracy']:.3f}, macro-F1 {scores['macro_f1']:.3f}",
        fontsize=11,
    )
    axes.set_xticks([i + 0.5 for i in range(n - 1)], minor=True)
    axes.set_yticks([i + 0.5 for i in range(n - 1)], minor=True)
    axes.grid(which="minor", color="white", linewidth=2)
    axes.tick_params(which="both", length=0)
    axes.spines[:].set_visible(False)
    save_png(figure, picture, 130)
