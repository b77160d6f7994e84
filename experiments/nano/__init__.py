"""How the embedded base's tokenizer and instructions were made."""
