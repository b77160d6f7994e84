"""Files: safetensors and JSON only, written whole or not at all."""
