"""Training objectives beyond the next token: preferences, rewards, distillation, reinforcement.

Each is a pure function of the params and a batch, (Σ loss, count), which `fgpt.make_step` takes as its loss; and of
plain tensors of log-probabilities, which is the paper's equation. The reference policy is the same params without the
adapter: its log-probabilities are computed once, by `sequence_logprobs`, and lie in the batch.
"""
