"""Chat templates render what transformers renders from the same folder, in a sandbox."""

import inspect
import json
import textwrap
from datetime import datetime

import pytest

from deepseek_jax.text import bpe
from deepseek_jax.text.chat import TokenizerError, read_template
from deepseek_jax.text.tokenizer import load_tokenizer

# In the manner of the reasoning models: earlier thoughts are dropped, tools are written out as JSON, and the
# answer opens a thought unless told not to. Indented and broken over lines, so that block trimming shows.
REASONING_TEMPLATE = """{%- set ns = namespace(system='', first=true) -%}
{%- for message in messages if message['role'] == 'system' -%}
    {%- set ns.system = ns.system + message['content'] -%}
{%- endfor -%}
{{ bos_token }}{{ ns.system }}
{% if tools is defined and tools is not none %}
## Tools
    {% for tool in tools %}
{{ loop.index }}. {{ tool | tojson(indent=2) }}
    {% endfor %}
{% endif %}
{%- for message in messages %}
    {%- if message.role == 'system' %}{% continue %}{% endif %}
    {%- if message.role == 'user' %}
        {{- '<｜User｜>' + message.content }}
    {%- elif message.role == 'assistant' %}
        {%- set content = message.content %}
        {%- if '</think>' in content %}
            {%- set content = content.split('</think>')[-1] %}
        {%- endif %}
        {%- if message.reasoning_content is defined and loop.last %}
            {{- '<think>' + message.reasoning_content + '</think>' }}
        {%- endif %}
        {%- if message.tool_calls is defined %}{{ message.tool_calls | tojson }}{% endif %}
        {{- '<｜Assistant｜>' }}{% generation %}{{ content ~ eos_token }}{% endgeneration %}
    {%- else %}
        {{- raise_exception('no such role: ' + message.role) }}
    {%- endif %}
{%- endfor %}
{% if add_generation_prompt %}
<｜Assistant｜>{{ '<think>\\n' if thinking | default(true) else '</think>' }}
{%- endif %}
"""
USER = {"role": "user", "content": "Is 1 < 2 & 3 > 2?\n  你好 "}
CHATS = {
    "user": [USER],
    "system": [{"role": "system", "content": "Be brief."}, USER],
    "thought": [USER, {"role": "assistant", "content": "<think>\nhm\n</think>\n\nYes."}, USER],
    "reasoning": [USER, {"role": "assistant", "content": "Yes.", "reasoning": "1 < 2", "tool_calls": None}],
}
TOOLS = [{"type": "function", "function": {"name": "größe", "parameters": {"b": 1, "a": "<x>"}}}]


def make(folder, template=None):
    bpe.save_tokenizer(bpe.train_tokenizer([inspect.getsource(textwrap)], 300), folder, version="0")
    if template is not None:
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    return folder


@pytest.fixture(scope="module", params=["ours", "reasoning"])
def pair(request, tmp_path_factory):
    from transformers import AutoTokenizer

    folder = make(tmp_path_factory.mktemp("chat"), REASONING_TEMPLATE if request.param == "reasoning" else None)
    return load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("variables", [{}, {"tools": TOOLS}, {"thinking": False}], ids=str)
@pytest.mark.parametrize("prompt", [True, False])
@pytest.mark.parametrize("chat", CHATS)
def test_rendering_equals_that_of_transformers(pair, chat, prompt, variables):
    ours, reference = pair
    messages = CHATS[chat]
    expected = reference.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt, **variables)
    assert ours.render(messages, prompt, **variables) == expected
    ids = reference.apply_chat_template(
        messages, tokenize=True, return_dict=False, add_generation_prompt=prompt, **variables
    )
    assert ours.chat(messages, prompt, **variables) == ids


def test_bos_stands_once(pair):
    assert pair[0].chat([USER]).count(0) == 1


def test_thoughts_are_handled(tmp_path):
    ours = load_tokenizer(make(tmp_path, REASONING_TEMPLATE))
    assert ours.render(CHATS["thought"]).endswith("<｜Assistant｜><think>\n")
    assert "hm" not in ours.render(CHATS["thought"])
    assert "<think>1 < 2</think>" in ours.render(CHATS["reasoning"], False)


def test_date_is_todays(tmp_path):
    ours = load_tokenizer(make(tmp_path, "{{ strftime_now('%Y') }}"))
    assert ours.render([USER]) == datetime.now().strftime("%Y")


def test_default_of_several_named_templates(tmp_path):
    named = [{"name": "tool_use", "template": "a"}, {"name": "default", "template": "b"}]
    assert read_template(tmp_path, {"chat_template": named}) == "b"
    with pytest.raises(ValueError, match="none the default"):
        read_template(tmp_path, {"chat_template": named[:1]})


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([{"role": "judge", "content": "x"}], "Unknown role: judge"),
        ([{"role": "user"}], "refuses this chat"),
        (["hello"], "mapping with a role"),
        ([], "at least one message"),
        ([{"role": "user", "content": object()}], "not a object"),
    ],
)
def test_bad_chats_are_refused(tmp_path, messages, said):
    with pytest.raises(ValueError, match=said):
        load_tokenizer(make(tmp_path)).render(messages)


@pytest.mark.parametrize(
    "attack",
    [
        "{{ messages.__class__.__mro__[1].__subclasses__() }}",
        "{{ raise_exception.__globals__['jinja2'] }}",
        "{{ messages.append(1) }}",
    ],
)
def test_template_is_sandboxed(tmp_path, attack):
    with pytest.raises(ValueError, match="refuses this chat"):
        load_tokenizer(make(tmp_path, attack)).render([USER])


@pytest.mark.parametrize(
    "template",
    [
        7,
        {"default": "a"},
        [],
        ["a"],
        [{"name": "default"}],
        [{"name": "default", "template": 7}],
        [{"name": ["default"], "template": "a"}],
    ],
    ids=str,
)
def test_a_template_of_another_form_is_refused(tmp_path, template):
    folder = make(tmp_path)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": template}))
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    with pytest.raises(TokenizerError, match=r"tokenizer_config\.json: chat_template must be text, or a list"):
        load_tokenizer(folder)


@pytest.mark.parametrize(
    ("template", "error"),
    [
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ 'x' + 1 }}", "TypeError"),
        ("{{ '%d' | format('x') }}", "TypeError"),
        ("{{ '{a}'.format() }}", "KeyError"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
    ],
)
def test_a_template_that_fails_is_one_clear_error(tmp_path, template, error):
    with pytest.raises(TokenizerError, match=rf"fails on this chat: .*{error}"):
        load_tokenizer(make(tmp_path, template)).render([USER])


def test_a_template_that_is_not_text_is_refused(tmp_path):
    folder = make(tmp_path)
    (folder / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(TokenizerError, match=r"chat_template\.jinja is not UTF-8"):
        load_tokenizer(folder)


def test_template_that_is_not_jinja_is_refused(tmp_path):
    with pytest.raises(ValueError, match="not valid Jinja"):
        load_tokenizer(make(tmp_path, "{% for %}"))


def test_a_checkpoint_without_template_says_so(tmp_path):
    folder = make(tmp_path)
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(ValueError, match="no chat template"):
        load_tokenizer(folder).render([USER])
