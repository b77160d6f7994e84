"""Generation: sampling, the decoding loop, caches of fixed size, beam search, prompt lookup."""
