"""What a GPU does with fgpt: numbers against this machine's CPU, ceilings, and times by part.

One call on a bare machine, inside a time limit. Each section stands alone and ends in lines that begin with its name.
Random weights: nothing is downloaded. It needs torch and what `import fgpt` needs; bitsandbytes for quantized bases,
transformers and peft for the comparison.
"""
