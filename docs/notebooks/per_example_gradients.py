# %% [markdown]
# # LoRA and its per-example gradients
#
# Which of your examples pull hardest? A loss is a function of the adapters, so the gradient of each example is one
# transform away. This page runs on a CPU in seconds.

# %%
# In a fresh environment, such as Colab, first: %pip install fgpt
import torch
from torch.func import grad, vmap

import fgpt
from fgpt.data import packing
from fgpt.data.prompt_templates import InstructionRow, encode, template
from fgpt.transforms.per_example import gradient_noise_scale, per_example_norms

# %% [markdown]
# A base, a tokenizer, and seven rows, one of which is wrong:

# %%
params, tokenizer = fgpt.load("nano"), fgpt.tokenizer("nano")
names = ["Tim", "Sue", "Ben", "Mia", "Tom", "Lily"]
rows = [InstructionRow(f"Greet {name}.", output=f"Hello, {name}!") for name in names]
rows.append(InstructionRow("Greet Max.", output="purple elevator seventeen"))
examples = [encode(row, template("plain"), tokenizer) for row in rows]
batch = packing.collate([examples])

# %% [markdown]
# A LoRA, trained for a few steps:


# %%
def response_loss(adapters, params, batch, seed):
    return fgpt.nll(fgpt.adapt(params, adapters, rng=seed), batch)


optimizer = fgpt.adamw(3e-3)
step = fgpt.make_step(response_loss, optimizer, max_norm=1.0)
state = fgpt.init_state(fgpt.lora(params, fgpt.key(0), rank=4), optimizer)
for i in range(15):
    state, metrics = step(state, params, [batch], fgpt.fold_in(fgpt.key(1), i))
print(f"loss {float(metrics.loss):.2f}, {fgpt.num_trainable(state.trainable):,} trained elements")

# %% [markdown]
# The gradient of each example. They have different lengths, so each is a batch of one row:


# %%
def example_loss(adapters, example):
    total, weight = fgpt.nll(fgpt.adapt(params, adapters), example)
    return total / weight


singles = [packing.collate([[example]]) for example in examples]
norms = per_example_norms(example_loss, state.trainable, singles)
for row, norm in sorted(zip(rows, norms.tolist(), strict=True), key=lambda pair: -pair[1]):
    print(f"{norm:6.2f}  {row.output}")

# %%
assert int(norms.argmax()) == len(rows) - 1  # the wrong row pulls hardest

# %% [markdown]
# From the same gradients: the batch size from which on a larger one saves less than it costs.

# %%
noise = gradient_noise_scale(example_loss, state.trainable, singles)
print(noise)

# %% [markdown]
# For rows of one length, `vmap(grad(..))` of torch is all there is:

# %%
texts = ["Once upon a time, there was a fox.", "One day, a little girl went out."]
tokens = torch.tensor([tokenizer.encode(text)[:8] for text in texts])


def text_loss(adapters, row):
    text = fgpt.Batch(row[:-1], row[1:], torch.ones(len(row) - 1))
    return fgpt.loss(fgpt.adapt(params, adapters), text)


each = vmap(grad(text_loss), in_dims=(None, 0))(state.trainable, tokens)
alone = grad(text_loss)(state.trainable, tokens[1])
path = "blocks.0.attn.q"
assert torch.allclose(each[path].b[1], alone[path].b, atol=1e-5)
