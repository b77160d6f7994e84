"""Learning rates of their own for some leaves: LoRA+ is PEFT's, other patterns are torch's parameter groups."""

from typing import Any

import pytest
import torch
from builders import close, same
from builders.peft_adapters import peft_of
from peft.optimizers import create_loraplus_optimizer

import fgpt
from fgpt.tree import tree_map
