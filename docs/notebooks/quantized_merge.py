# %% [markdown]
# # A quantized base, and merging
#
# A LoRA over a 4-bit base is QLoRA. Merging it has two answers, and this page measures both.

# %%
# In a fresh environment, such as Colab, first: %pip install fgpt
import torch

import fgpt
from fgpt.data import packing
from fgpt.data.prompt_templates import InstructionRow, encode, template

# %%
params, tokenizer = fgpt.load("nano"), fgpt.tokenizer("nano")
base = fgpt.quantize(params, "nf4")
names = ["Tim", "Sue", "Ben", "Mia"]
rows = [InstructionRow(f"Greet {name}.", output=f"Hello, {name}!") for name in names]
batch = packing.collate([[encode(row, template("plain"), tokenizer) for row in rows]])
print(type(base.blocks[0].mlp.up.w).__name__, base.blocks[0].mlp.up.w.shape)

# %% [markdown]
# The step is that of any base: nothing in it asks what the weights are.


# %%
def response_loss(adapters, params, batch, seed):
    return fgpt.nll(fgpt.adapt(params, adapters, rng=seed), batch)


optimizer = fgpt.adamw(6e-3)
step = fgpt.make_step(response_loss, optimizer, max_norm=1.0)
state = fgpt.init_state(fgpt.lora(base, fgpt.key(0), rank=8), optimizer)
for i in range(15):
    state, metrics = step(state, base, [batch], fgpt.fold_in(fgpt.key(1), i))
print(f"loss {float(metrics.loss):.3f}")

# %% [markdown]
# Merged onto the values that the adapter was trained on, and onto the full-precision base:

# %%
tuned = fgpt.adapt(base, state.trainable)
dequantized = fgpt.merge(tuned, base="dequantized")
original = fgpt.merge(tuned, base=params)
difference = fgpt.compare_outputs(tuned, dequantized, batch)
print("dequantized", difference)
print("original   ", fgpt.compare_outputs(tuned, original, batch))

# %% [markdown]
# The first is the trained model; the second is another one, nearer to what the base was before it was quantized.

# %%
tokens = batch.tokens
to_trained = (fgpt.apply(dequantized, tokens) - fgpt.apply(tuned, tokens)).abs().max()
to_other = (fgpt.apply(original, tokens) - fgpt.apply(tuned, tokens)).abs().max()
assert to_trained < 1e-2 < to_other
assert all(type(block.attn.q.w) is torch.Tensor for block in dequantized.blocks)
