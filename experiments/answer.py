"""One answer from a trained run."""

from experiments import folder
from experiments.train import base_of
from fgpt.data.templates import Row, encode_prompt, template
from fgpt.errors import InputError
from fgpt.generate import generate
from fgpt.io import hub
from fgpt.rng import key


def answer(name: str, instruction: str, given: str, most: int, temperature: float, seed: int) -> None:
    """Print the answer of run `name` to an instruction, in the template it was trained with.

    Raises InputError for an unknown run, or an empty or overlong prompt.
    """
    if not instruction.strip():
        raise InputError("the prompt is empty: say what to write")
    out = folder.find(name)
    run = folder.read_run(out)
    base = base_of(run)
    tokenizer = hub.tokenizer(run.base)
    prompt = encode_prompt(Row(instruction, given, ""), template(run.template), tokenizer)
    tuned = folder.load_tuned(out, base)
    [got] = generate(tuned, [prompt], tokenizer.eos, most, temperature, key(seed) if temperature else None)
    print(tokenizer.decode(got.tokens).strip())
