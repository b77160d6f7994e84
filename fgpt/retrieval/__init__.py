"""Passages of your own documents for a prompt: texts and PDFs in chunks, their embeddings, and an index of both.

    files -> pages -> chunks -> embeddings -> index;      question -> passages -> the input of a row

Each step is a file: `pages`, `chunking`, `encoder` with its `embedder`, `index` with its `index_updates` and `ranking`,
and `passages`, the one way in which passages enter a prompt.
"""
