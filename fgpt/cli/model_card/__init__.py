"""Model cards: README.md of a saved folder, with metadata for the Hugging Face Hub."""
