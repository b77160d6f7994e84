# %% [markdown]
# # The spectrum of a Hessian
#
# The Hessian of the loss by a LoRA's elements is a matrix of thousands of rows. Its spectrum needs products alone.

# %%
# In a fresh environment, such as Colab, first: %pip install fgpt matplotlib
import matplotlib.pyplot as plt
import torch

import fgpt
from fgpt.transforms.curvature import hessian_operator
from fgpt.transforms.spectrum import spectral_density, top_eigenpairs
from fgpt.tree import ravel, tree_map

# %%
params, tokenizer = fgpt.load("nano"), fgpt.tokenizer("nano")
texts = ["Once upon a time, there was a fox.", "One day, a little girl went out."]
tokens = torch.tensor([tokenizer.encode(text)[:8] for text in texts])
batch = fgpt.Batch(tokens[:, :-1], tokens[:, 1:], torch.ones(2, 7))
fresh = fgpt.lora(params, fgpt.key(0), rank=2, target=r"blocks\.\d+\.attn\.(q|v)")
adapters = tree_map(lambda x: x + 0.01, fresh)  # away from B = 0, where most second derivatives vanish


def loss(adapters):
    return fgpt.loss(fgpt.adapt(params, adapters), batch)


# %% [markdown]
# The operator records the graph once; each product is a pass through it.

# %%
operator = hessian_operator(loss, adapters)
pairs = top_eigenpairs(operator, adapters, fgpt.key(0), k=3, num_steps=25)
print(fgpt.num_trainable(adapters), "elements; the largest eigenvalues:", [round(x, 3) for x in pairs[0].tolist()])

# %% [markdown]
# An eigenvector is a tree like the adapters. The definition holds:

# %%
values, vectors, _ = pairs
vector = tree_map(lambda x: x[0], vectors)
product, expected = ravel(operator(vector))[0], values[0] * ravel(vector)[0]
assert torch.allclose(product, expected, atol=1e-2 * float(values[0]))

# %% [markdown]
# The density of all eigenvalues, by stochastic Lanczos quadrature:

# %%
density = spectral_density(operator, adapters, fgpt.key(1), num_probes=2, num_steps=20)
low, high = float(density.values.min()), float(density.values.max())
points = torch.linspace(low - 0.1 * (high - low), high + 0.1 * (high - low), 400)
heights = density.at(points, width=0.01 * (high - low))

# %%
figure, axes = plt.subplots(figsize=(6, 3))
axes.semilogy(points, heights.clamp(min=1e-5))
axes.set(xlabel="eigenvalue", ylabel="density")
plt.show()

# %% [markdown]
# Most eigenvalues are near 0, and a few are large, on both sides: a LoRA's loss is not convex.
#
# ![Density of the eigenvalues, on a logarithmic scale: a high peak at 0, small ones apart](../pictures/spectrum.svg)
