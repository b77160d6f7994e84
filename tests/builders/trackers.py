"""A run and its figures, read back from event files."""

from dataclasses import replace
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fgpt import recipes

TRACKED_RUN = replace(recipes.find("lora-nano"), tracker=None)


def metric_lines(first: int, last: int, loss: float) -> list[dict[str, float]]:
    return [{"step": i, "loss": loss + i, "lr": 0.5 / i, "tokens": 100 * i} for i in range(first, last + 1)]


def tensorboard_events(folder: Path) -> dict[str, list[tuple[int, float]]]:
    found = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    found.Reload()
    return {tag: [(x.step, x.value) for x in found.Scalars(tag)] for tag in found.Tags()["scalars"]}
