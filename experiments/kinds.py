"""The three kinds of runs, and what lays each out and carries it out. Each is imported only when it is asked for."""

from pathlib import Path

from experiments import folder
from experiments.plan import Plan
from experiments.runs import AnyRun, Classify, Pretrain


def plan(run: AnyRun) -> Plan:
    """The run's training, laid out. Raises InputError for what bad input can spoil."""
    if isinstance(run, Pretrain):
        from experiments import pretrain

        return pretrain.plan(run)[0]
    if isinstance(run, Classify):
        from experiments import classify

        return classify.plan(run)[0]
    from experiments import train

    return train.plan(run)[0]


def carry_out(run: AnyRun, where: Path | None) -> Path:
    """Train, save, score: in a new folder, or in that of a run which is taken up again. Returns the folder.

    Raises InputError for a name that no folder can have, before anything is read.
    """
    folder.check_name(run.name)
    if isinstance(run, Pretrain):
        from experiments import pretrain

        return pretrain.pretrain(run, where)
    if isinstance(run, Classify):
        from experiments import classify

        return classify.classify(run, where)
    from experiments import train

    return train.train(run, where)
