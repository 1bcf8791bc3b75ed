"""Chat templates: what they render, where the turns lie, and what is refused in one line."""

import datetime
import enum

import pytest

from attention_jax.tokenizers import ChatTemplate, Turn, turns_of
from tests.chat_templates import CONVERSATIONS, TEMPLATES, THINKING, TOOLS, message

TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
MADE = {name: ChatTemplate(source, **TOKENS) for name, source in TEMPLATES.items()}


def test_the_text_of_a_conversation():
    text = MADE["chatml"].render(CONVERSATIONS["two"], add_generation_prompt=True)
    assert text == (
        "<|im_start|>system\nYou are helpful.<|im_end|>\n<|im_start|>user\nHi there <|im_end|>\n"
        "<|im_start|>assistant\nHello.<|im_end|>\n<|im_start|>assistant\n"
    )
    assert MADE["headers"].render(CONVERSATIONS["one"]) == (
        "<s><|start_header_id|>user<|end_header_id|>\n\nHi there<|eot_id|>"
    )
    # The first newline behind a block and the spaces in front of one are left out.
    year = datetime.datetime.now().year
    text = MADE["dated"].render(CONVERSATIONS["two"])
    assert text == f"<s>Today: {year}\nUSER: Hi there \n\nA: Hello.</s>\n"
    text = MADE["thinking"].render(
        CONVERSATIONS["one"], tools=TOOLS, enable_thinking=False, add_generation_prompt=True
    )
    assert (
        '{"type": "function", "function": {"name": "add", "description": "<a> & é", "parameters": {}}}'
        in text
    )
    assert text.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("prompt", [False, True])
def test_turns_cover_the_text_and_hold_their_contents(name, conversation, prompt):
    template, messages = MADE[name], CONVERSATIONS[conversation]
    if name == "model turns" and conversation == "system":
        with pytest.raises(ValueError, match="^chat template: System role not supported$"):
            turns_of(template, messages)
        return
    text, turns = turns_of(template, messages, add_generation_prompt=prompt)
    assert text == template.render(messages, add_generation_prompt=prompt)
    assert [turn.start for turn in turns] + [len(text)] == [0] + [turn.end for turn in turns]
    own = [turn for turn in turns if turn.message is not None]
    assert [(turn.role, turn.message) for turn in own] == [(m["role"], i) for i, m in enumerate(messages)]
    for turn, given in zip(own, messages, strict=True):
        start, end = turn.content
        shown = given["content"]
        if (name, conversation, turn.message) == ("thinking", "thoughts", 1):
            shown = "4"
        assert text[start:end].strip() == shown.strip() and turn.start <= start <= end <= turn.end
    assert (turns[-1].role, turns[-1].message) == ("assistant", None) or not prompt or name == "instruct"


def roles_and_texts(name, messages, **options):
    text, turns = turns_of(MADE[name], messages, **options)
    return [(turn.role, text[turn.start : turn.end]) for turn in turns]


def test_where_turns_begin_and_end():
    user, answer, again = CONVERSATIONS["three"]
    assert roles_and_texts("headers", [user, answer, again], add_generation_prompt=True) == [
        (None, "<s>"),
        ("user", "<|start_header_id|>user<|end_header_id|>\n\nHi there<|eot_id|>"),
        ("assistant", "<|start_header_id|>assistant<|end_header_id|>\n\nHello.<|eot_id|>"),
        ("user", "<|start_header_id|>user<|end_header_id|>\n\nHi there<|eot_id|>"),
        ("assistant", "<|start_header_id|>assistant<|end_header_id|>\n\n"),
    ]
    # The template's own system prompt is no message.
    assert roles_and_texts("chatml", [user])[0] == (None, "<|im_start|>system\nYou are helpful.<|im_end|>\n")
    # A system message that is part of the user's, and turns whose reasoning falls away later.
    assert roles_and_texts("instruct", CONVERSATIONS["system"])[:3] == [
        (None, "<s>"),
        ("system", "[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\n"),
        ("user", "Hi there [/INST]"),
    ]
    assert roles_and_texts("thinking", CONVERSATIONS["thoughts"]) == [
        ("user", "<|im_start|>user\n2 + 2?<|im_end|>\n"),
        ("assistant", "<|im_start|>assistant\n4<|im_end|>\n"),
        ("user", "<|im_start|>user\nSure?<|im_end|>\n"),
    ]


def test_messages_without_text():
    call = {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"function": {"name": "add", "arguments": {}}}],
    }
    messages = [message("user", "1 + 1"), call, message("tool", "2"), message("assistant", "")]
    text, turns = turns_of(ChatTemplate(THINKING), messages)
    assert [turn.role for turn in turns] == ["user", "assistant", "tool", "assistant"]
    assert text[turns[1].start : turns[1].end].count("tool_call>") == 2 and turns[1].content is None
    assert turns[3].content == (turns[3].content[0],) * 2
    parts = ChatTemplate(
        "{% for m in messages %}{% for p in m.content %}[{{ p.text }}]{% endfor %};{% endfor %}"
    )
    text, [first, second] = turns_of(
        parts, [message("user", [{"type": "text", "text": "a"}]), message("user", [{"text": "b"}])]
    )
    assert text == "[a];[b];" and (first.content, second.start) == ((1, 2), 4)
    assert turns_of(ChatTemplate("{{ bos_token }}x", bos_token="<s>"), []) == (
        "<s>x",
        [Turn(None, None, 0, 4)],
    )


@pytest.mark.parametrize(
    ("source", "messages", "error"),
    [
        ("{% if %}", [], r"chat template, line 1: Expected an expression"),
        ("{{ x.y.z }}", [], "chat template: 'x' is undefined"),
        ("{{ ''.__class__.__mro__ }}", [], "chat template: access to attribute '__class__' of 'str'"),
        ("{{ messages.append(1) }}", [], "chat template: access to attribute 'append' of 'list'"),
        ("{% set n = namespace() %}{% set n._a = 1 %}", [], "a namespace has no attribute '_a'"),
        ("{% for i in range(10**9) %}{% endfor %}", [], "chat template: Range too big"),
        ("{{ raise_exception('no\n\nway') }}", [], "chat template: no way$"),
        ("{% include 'a' %}", [], "chat template: .*no loader"),
        ("{{ 1 / 0 }}", [], "chat template: division by zero"),
        ("x" * 2**21, [], "chat template: 2097152 characters are too many"),
        ("", "hi", "messages must be a list of dicts"),
        ("", ["hi"], "message 0: must be a dict with role and content, got str"),
        ("", [message("usr", "hi")], "message 0: role 'usr' is none of system, developer, user"),
        ("", [{"content": "hi"}], "message 0: role 'None' is none of"),
        ("", [message("user", "a"), message("assistant", 3)], "message 1: content must be text or a list"),
        ("", [{"role": "user"}], "message 0: it has no content"),
        ("", [message("user", [object()])], "reads text, numbers, lists and dicts, not object"),
    ],
)  # fmt: skip
def test_what_is_refused(source, messages, error):
    with pytest.raises(ValueError, match=error) as caught:
        ChatTemplate(source).render(messages)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 200


def test_a_template_sees_plain_values_and_no_callers_objects():
    class Role(enum.StrEnum):
        USER = "user"

    given = [message(Role.USER, "x")]
    assert ChatTemplate("{{ messages[0].role }}{{ messages[0].role.name }}").render(given) == "user"
    assert given == [message("user", "x")]
