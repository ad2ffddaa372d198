"""Chat templates of many families against transformers, token for token.

The templates are written anew, short, each with the habits of one family.
"""

import dataclasses
import random
import types

import jinja2
import pytest
import tokenizers
import transformers
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers.utils import chat_template_utils

from jaxpref.data import chat
from jaxpref.data.files import RowError, TextPair, read
from jaxpref.data.pairs import encode
from jaxpref.data.tokenizer import Tokenizer

SPECIAL = [
    "<s>", "</s>", "<unk>", "<|im_start|>", "<|im_end|>", "<|head|>", "<|tail|>", "<|eot|>",
    "<|turn>", "<turn|>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>", "<|sys_tok|>",
    "<|endoftext|>",
]  # fmt: skip
LOOP = "{% for m in messages %}"
CHATML = "<|im_start|>{{ m.role }}\n"

TEMPLATES = {
    "chatml": LOOP + CHATML + "{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "default_system": "{% if messages[0].role != 'system' %}"
    "<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}" + LOOP + CHATML +
    "{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{{ '<|im_start|>assistant\n' if add_generation_prompt else '' }}",
    "llama2": "{% set system = '' %}{% if messages[0].role == 'system' %}"
    "{% set system = '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n' %}"
    "{% set messages = messages[1:] %}{% endif %}" + LOOP +
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('user and assistant must take turns') }}{% endif %}"
    "{% if m.role == 'user' %}{{ bos_token }}[INST] {% if loop.first %}{{ system }}{% endif %}"
    "{{ m.content | trim }} [/INST]{% else %} {{ m.content | trim }} {{ eos_token }}{% endif %}"
    "{% endfor %}",
    "llama3": "{{ bos_token }}" + LOOP +
    "<|head|>{{ m.role }}<|tail|>\n\n{{ m.content | trim }}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}<|head|>assistant<|tail|>\n\n{% endif %}",
    "dated": "{{ bos_token }}<|head|>system<|tail|>\n\nToday: "
    "{{ strftime_now('%d %b %Y') if strftime_now is defined else 'unknown' }}<|eot|>" + LOOP +
    "<|head|>{{ m.role }}<|tail|>\n\n"
    "{% if m.tool_calls %}{% for call in m.tool_calls %}{{ call.function | tojson }}{% endfor %}"
    "{% else %}{{ m.content }}{% endif %}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}<|head|>assistant<|tail|>\n\n{% endif %}",
    "mistral": "{{ bos_token }}" + LOOP + "{% if m.role == 'user' %}[INST] {{ m.content }}[/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content }}{{ eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant!') }}{% endif %}{% endfor %}",
    "gemma": "{{ bos_token }}" + LOOP + "{% if m.role == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}"
    "<|turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<turn|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|turn>model\n{% endif %}",
    "gemma_parts": "{{ bos_token }}" + LOOP + "<|turn>{{ m.role }}\n"
    "{% if m.content is string %}{{ m.content | trim }}{% else %}{% for part in m.content %}"
    "{% if part.type == 'image' %}<img>{% elif part.type == 'text' %}{{ part.text | trim }}"
    "{% endif %}{% endfor %}{% endif %}<turn|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|turn>assistant\n{% endif %}",
    "qwen3": "{% if tools %}<|im_start|>system\n# Tools{% for tool in tools %}\n{{ tool | tojson }}"
    "{% endfor %}<|im_end|>\n{% endif %}" + LOOP + CHATML +
    "{% if m.role == 'assistant' and loop.last %}<think>\n"
    "{{ m.reasoning_content.strip('\n') if m.reasoning_content is string else '' }}\n</think>\n\n"
    "{% endif %}{{ m.content or '' }}{% for call in m.tool_calls or [] %}\n<call>\n"
    "{{ call.function | tojson }}\n</call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
    "{% endif %}",
    "phi3": LOOP + "<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}",
    "zephyr": LOOP + "\n{% if m['role'] == 'user' %}\n{{ '<|user|>\n' + m['content'] + eos_token }}"
    "\n{% elif m['role'] == 'system' %}\n{{ '<|system|>\n' + m['content'] + eos_token }}\n"
    "{% elif m['role'] == 'assistant' %}\n{{ '<|assistant|>\n'  + m['content'] + eos_token }}\n"
    "{% endif %}\n{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n"
    "{% endif %}\n{% endfor %}",
    "vicuna": LOOP + "{% if m.role == 'system' %}{{ m.content + ' ' }}{% elif m.role == 'user' %}"
    "{{ 'USER: ' + m.content + ' ' }}{% else %}{{ 'ASSISTANT: ' + m.content + eos_token }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}",
    "command": "{{ bos_token }}" + LOOP + "<|turn>{% if m.role == 'assistant' %}<|assistant|>"
    "{% elif m.role == 'user' %}<|user|>{% else %}<|sys_tok|>{% endif %}"
    "{{ (m.content or '').strip() }}<turn|>{% endfor %}"
    "{% if add_generation_prompt %}<|turn><|assistant|>{% endif %}",
    "deepseek": "{{ bos_token }}" + LOOP + "{% if m.role == 'user' %}User: {{ m.content }}\n\n"
    "{% elif m.role == 'assistant' %}Assistant: "
    "{{ (m.content or '').split('</think>')[-1] }}{{ eos_token }}"
    "{% else %}{{ m.content }}\n\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}Assistant: {% endif %}",
    "deepseek_think": "{{ bos_token }}" + LOOP + "{{ m.role }}: {{ m.content }}{{ eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}assistant: <think>\n{% endif %}",
    "falcon": LOOP + "{% if not loop.first %}\n{% endif %}"
    "{{ m.role | capitalize }}: {{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}\nAssistant:{% endif %}",
    "olmo": "{{ bos_token }}" + LOOP + "<|{{ m.role }}|>\n{{ m.content }}"
    "{% if m.role == 'assistant' and loop.last %}{{ eos_token }}{% else %}\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
}  # fmt: skip

TEXTS = [
    "Which bird swims?", "The penguin. ", " Yes\n", "No, never!\n\n", "héron 日本", "4 and 5",
    "a  b", "</think> so", "It said: {{ bird }}", "Not <|im_end|> here",
]  # fmt: skip


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    folder = tmp_path_factory.mktemp("templates")
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    options = {"special_tokens": SPECIAL, "initial_alphabet": alphabet, "show_progress": False}
    words = [*TEXTS, *TEMPLATES.values()]
    backend.train_from_iterator(words, trainers.BpeTrainer(vocab_size=600, **options))
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **special).save_pretrained(
        folder
    )
    return Tokenizer.from_folder(folder), transformers.AutoTokenizer.from_pretrained(folder)


TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
CALL = {"type": "function", "function": {"name": "look", "arguments": {"bird": "emu"}}}


def content(draw):
    text = draw.choice(TEXTS)
    if draw.random() < 0.15:
        return [{"type": "text", "text": text}, {"type": "text", "text": draw.choice(TEXTS)}]
    return text


def shape(draw):
    """A random conversation, two responses, and what else belongs to the prompt."""
    messages = []
    if draw.random() < 0.3:
        messages.append({"role": "system", "content": content(draw)})
    for turn in range(draw.randint(1, 3)):
        if turn:
            answer = {"role": "assistant", "content": content(draw)}
            if draw.random() < 0.3:
                answer |= {"content": None, "tool_calls": [CALL]}
            if draw.random() < 0.2:
                answer["reasoning"] = draw.choice(TEXTS)
            messages.append(answer)
            if answer.get("tool_calls"):
                messages.append({"role": "tool", "content": draw.choice(TEXTS), "name": None})
        messages.append({"role": "user", "content": content(draw)})
    if draw.random() < 0.2:
        messages.append({"role": "assistant", "content": content(draw)})
    chosen, rejected = draw.sample(TEXTS, 2)
    if messages[-1]["role"] == "user" and draw.random() < 0.15:
        chosen = {"role": "assistant", "content": chosen, "reasoning_content": "Hm."}
    elif messages[-1]["role"] == "user" and draw.random() < 0.15:
        chosen = {"role": "assistant", "tool_calls": [CALL]}
    tools = [TOOL] if draw.random() < 0.2 else None
    more = {"enable_thinking": draw.random() < 0.5} if draw.random() < 0.3 else None
    return TextPair(messages, chosen, rejected, tools=tools, template_kwargs=more)


def with_texts(messages):
    """As transformers shows them to a template that reads no lists: one text."""
    return [
        {**m, "content": "".join(part["text"] for part in m["content"])}
        if isinstance(m.get("content"), list)
        else m
        for m in messages
    ]


def longer(messages, response):
    """The conversation with the response, which continues a last message of the assistant."""
    if isinstance(response, dict):
        return [*messages, response]
    if messages[-1]["role"] != "assistant":
        return [*messages, {"role": "assistant", "content": response}]
    text = messages[-1]["content"]
    if isinstance(text, list):
        *parts, last = text
        text = [*parts, {**last, "text": last["text"] + response}]
    else:
        text += response
    return [*messages[:-1], {"role": "assistant", "content": text}]


def expected(theirs, template, row):
    """Their texts of the prompt and with each response; None where they refuse or begin otherwise.

    A template that cannot join None or call what is not there raises what Python raises.
    """
    options = {"tools": row.tools, "tokenize": False, **(row.template_kwargs or {})}
    messages = row.prompt if chat.reads(template) == "both" else with_texts(row.prompt)
    goes_on = messages[-1]["role"] == "assistant"
    opened = {"add_generation_prompt": not goes_on, "continue_final_message": goes_on}
    try:
        prompt = theirs.apply_chat_template(messages, **opened, **options)
        wholes = [longer(messages, response) for response in (row.chosen, row.rejected)]
        texts = [theirs.apply_chat_template(whole, **options) for whole in wholes]
    except (jinja2.TemplateError, TypeError, ValueError, AttributeError):
        return None
    return (prompt, *texts) if all(text.startswith(prompt) for text in texts) else None


def ids_of(theirs, prompt, *texts):
    """Their ids without the white space behind the last special token, and where they part."""
    short = [x.rstrip() if x.rstrip().endswith(tuple(SPECIAL)) else x for x in texts]
    before, *ids = theirs([prompt, *texts, *short], add_special_tokens=False)["input_ids"]
    for text, whole, cut in zip(texts, ids[:2], ids[2:], strict=True):
        assert whole[: len(cut)] == cut
        start = next((i for i, (a, b) in enumerate(zip(cut, before, strict=False)) if a != b),
                     min(len(cut), len(before)))  # fmt: skip
        closed = text.rstrip().endswith(tuple(SPECIAL))
        yield (cut if closed else [*cut, theirs.eos_token_id]), start, start == len(cut)


@pytest.mark.parametrize("name", TEMPLATES)
def test_conversations_have_the_ids_that_transformers_gives_them(both, name, monkeypatch):
    clock = types.SimpleNamespace(now=lambda: chat.DATE)
    monkeypatch.setattr(chat_template_utils, "datetime", clock)
    template, theirs = TEMPLATES[name], both[1]
    ours = dataclasses.replace(both[0], template=template)
    theirs.chat_template = template
    draw = random.Random(sum(map(ord, name)))
    rows = [shape(draw)._replace(place=f"shape {number}") for number in range(200)]
    found, counts = encode(rows, ours, end="eos", bad="drop")
    kept = {pair.index: pair for pair in found}
    for number, row in enumerate(rows):
        texts = expected(theirs, template, row)
        pairs = list(ids_of(theirs, *texts)) if texts else []
        refused = not pairs or pairs[0][0] == pairs[1][0] or pairs[0][2] or pairs[1][2]
        assert refused == (number not in kept)
        if not refused:
            assert [x.tolist() for x in kept[number].tokens] == [ids for ids, _, _ in pairs]
            assert kept[number].starts == tuple(start for _, start, _ in pairs)
    assert len(counts.faults) + len(kept) == 200
    assert not any("\n" in fault for fault in counts.faults)
    assert name == "deepseek_think" or len(kept) > 40


def test_a_prompt_that_opens_a_thought_is_refused_with_the_first_difference(both):
    ours = dataclasses.replace(both[0], template=TEMPLATES["deepseek_think"])
    row = TextPair([{"role": "user", "content": "a"}], "b", "c", "F, line 3")
    with pytest.raises(RowError) as caught:
        encode([row], ours, end=None)
    place = len("<s>user: a</s>assistant: ")
    assert f"at character {place}, '<think>\\n' and then 'b</s>'" in str(caught.value)


def test_columns_of_rows_reach_the_template_as_in_transformers(both):
    ours = dataclasses.replace(both[0], template=TEMPLATES["qwen3"])
    both[1].chat_template = TEMPLATES["qwen3"]
    user = {"role": "user", "content": "a"}
    columns = {"tools": [TOOL], "chat_template_kwargs": {"enable_thinking": False}}
    row = {"prompt": [user], "chosen": "b", "rejected": "c", "system": "d", **columns}
    (pair,), _ = encode(read([("here", row)]).rows, ours, end=None)
    messages = [{"role": "system", "content": "d"}, user]
    messages.append({"role": "assistant", "content": "b"})
    options = {"tools": [TOOL], "enable_thinking": False, "tokenize": False}
    text = both[1].apply_chat_template(messages, **options)
    assert "# Tools" in text
    assert pair.tokens[0].tolist() == both[1](text.rstrip(), add_special_tokens=False)["input_ids"]
