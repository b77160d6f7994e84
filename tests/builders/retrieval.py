"""Embedders of random weights in the layout of sentence-transformers, and files to index."""

import json
import string
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")


def bert_model(**changes: Any) -> transformers.BertModel:
    """A tiny BertModel of random weights, far from their initial zeros and ones."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    config = transformers.BertConfig(**{"vocab_size": 150, "max_position_embeddings": 128, **sizes, **changes})
    torch.manual_seed(0)
    model = transformers.BertModel(config).eval()
    with torch.no_grad():
        for x in model.parameters():
            x.add_(0.1 * torch.randn_like(x))
    return model


def character_tokenizer() -> Tokenizer:
    """BERT's tokenizer with a token for each letter, digit and mark."""
    letters = string.ascii_lowercase + string.digits
    tokens = [*SPECIAL, *letters, *(f"##{letter}" for letter in letters), *string.punctuation]
    vocab = {token: number for number, token in enumerate(tokens)}
    tokenizer: Any = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    ends = [("[CLS]", vocab["[CLS]"]), ("[SEP]", vocab["[SEP]"])]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    return tokenizer


def save_embedder(folder: Path, **changes: Any) -> Path:
    """The folder of a tiny embedder; texts of up to 126 letters are read."""
    bert_model(**changes).save_pretrained(folder)
    character_tokenizer().save(str(folder / "tokenizer.json"))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_mean_tokens": True}))
    return folder


def write_pdf(path: Path, *texts: str) -> Path:
    """A PDF with a page for each text, in ASCII."""
    fonts = b"<</Type/Font/Subtype/Type1/BaseFont/Helvetica>>"
    pages = [f"{4 + 2 * i} 0 R" for i in range(len(texts))]
    kids = f"<</Type/Pages/Kids[{' '.join(pages)}]/Count {len(texts)}>>".encode()
    objects = [b"<</Type/Catalog/Pages 2 0 R>>", kids, fonts]
    for i, text in enumerate(texts):
        stream = f"BT /F1 12 Tf 72 720 Td ({text}) Tj ET".encode()
        resources = f"/Resources<</Font<</F1 3 0 R>>>>/MediaBox[0 0 612 792]/Contents {5 + 2 * i} 0 R"
        objects.append(f"<</Type/Page/Parent 2 0 R{resources}>>".encode())
        objects.append(f"<</Length {len(stream)}>>\nstream\n".encode() + stream + b"\nendstream")
    content, offsets = b"%PDF-1.4\n", list[int]()
    for number, each in enumerate(objects, 1):
        offsets.append(len(content))
        content += f"{number} 0 obj\n".encode() + each + b"\nendobj\n"
    table = "".join(f"{offset:010} 00000 n \n" for offset in offsets)
    trailer = f"trailer<</Size {len(objects) + 1}/Root 1 0 R>>\nstartxref\n{len(content)}\n%%EOF\n"
    content += f"xref\n0 {len(objects) + 1}\n0000000000 65535 f \n{table}{trailer}".encode()
    path.write_bytes(content)
    return path
