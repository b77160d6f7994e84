"""Options of a tiny pretraining."""

TINY_SIZE = [
    "--tokenizer",
    "nano",
    "--vocab",
    "4100",
    "--n-layer",
    "1",
    "--n-head",
    "2",
    "--d-model",
    "32",
    "--max-seq-len",
    "64",
]
SHORT_PRETRAINING = [
    "--micro-batch-size",
    "2",
    "--grad-accumulation-steps",
    "3",
    "--steps",
    "16",
    "--warmup-steps",
    "4",
    "--lr",
    "1e-2",
    "--no-compile",
]


def output_of(name: str, times: int) -> str:
    return " ".join(f"Once there was a fox named {name}. {name} ran home to eat." for _ in range(times))
