"""What PEFT has no place for is refused, and files that say something else."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
from builders import tiny
from builders.peft_adapters import (
    ATTN,
    PEFT_CONFIGS,
    dora,
    lora,
    peft_gpt2,
)

import fgpt

# ------------------------------------------------------------------------------------------------ every format, theirs


LORA: dict[str, Any] = {"r": 4, "lora_alpha": 6, "fan_in_fan_out": True}


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    "make",
    [
        lambda p: lora(p, target=ATTN) | fgpt.trainable_leaves(p, r".*\.o\.b"),
        lambda p: lora(p, target=ATTN) | dora(p, target=r".*\.up"),
        lambda p: fgpt.trainable_leaves(p, r".*\.q\.b"),
        lambda p: dora(p, target="wte"),
        lambda p: lora(p, target=ATTN) | lora(p, dropout=0.1, target=r".*\.up"),
        lambda p: lora(p, target=r".*\.q") | lora(p, dropout=0.1, target=r".*\.v"),
        lambda p: fgpt.ia3(p, r".*\.o", r".*\.o"),
        lambda p: fgpt.ia3(p, None, r".*\.k"),
        lambda p: {},
    ],
)
def test_what_peft_cannot_hold_is_refused(make: Callable[[fgpt.GPT], fgpt.Adapters], tmp_path: Path):
    params = tiny()
    with pytest.raises(fgpt.InputError, match=r"save_adapters\(adapters, path\)"):
        fgpt.save_peft(make(params), params, tmp_path / "adapter", "base")
    assert not (tmp_path / "adapter").exists()


def test_an_adapter_of_a_changed_base_is_refused(tmp_path: Path):
    """PiSSA takes its first product out of the base: without that, W + sBA is another model."""
    config = peft.LoraConfig(**LORA, target_modules=["c_fc"], init_lora_weights="pissa")
    peft_gpt2(config).save_pretrained(tmp_path / "adapter")
    with pytest.raises(fgpt.InputError, match="init_lora_weights 'pissa' belongs to a base that was changed"):
        fgpt.load_peft(tmp_path / "adapter", tiny())


@pytest.mark.parametrize(
    ("kind", "change", "expected"),
    [
        ("dora", {"use_dora": False}, "needs lora_A and lora_B: .* got .*lora_magnitude_vector"),
        ("dora", {"alora_invocation_tokens": [1, 2]}, r"alora_invocation_tokens is \[1, 2\]"),
        ("dora", {"lora_dropout": 1.0}, "expected lora_dropout from 0 to less than 1, got 1.0"),
        ("dora", {"lora_alpha": None}, "expected a number for lora_alpha, got None"),
        ("dora", {"alpha_pattern": {"(": 2}}, "not a regular expression"),
        ("dora", {"alpha_pattern": [2]}, "expected an object for alpha_pattern"),
        ("dora", {"peft_type": "IA3"}, "lora_A.weight is none of peft_type 'IA3'"),
        ("ia3", {"peft_type": "VERA"}, "expected peft_type 'LORA', 'IA3', 'LN_TUNING', 'TRAINABLE_TOKENS', got 'VERA'"),
    ],
)
def test_a_file_that_says_something_else_is_refused(kind: str, change: dict[str, Any], expected: str, tmp_path: Path):
    peft_gpt2(PEFT_CONFIGS[kind]).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | change))
    with pytest.raises(fgpt.InputError, match=expected) as caught:
        fgpt.load_peft(tmp_path, fgpt.fuse_qkv(tiny()))
    assert "\n" not in str(caught.value)


def test_tuning_of_a_matrix_is_no_norm(tmp_path: Path):
    """attn.c_proj is square, and transposed: read as it is, it would fit, and be another model."""
    peft_gpt2(peft.LNTuningConfig(target_modules=["attn.c_proj"])).save_pretrained(tmp_path)
    with pytest.raises(fgpt.InputError, match=r"attn\.c_proj is no norm"):
        fgpt.load_peft(tmp_path, tiny())
