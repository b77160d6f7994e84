"""The hot path. Each file: what it computes, a plain-torch reference, the fast path, and what each transform does."""
