"""Chat templates: a checkpoint's own Jinja program that turns messages into text.

A template is code from whoever made the checkpoint, so it runs in Jinja's immutable sandbox and sees
plain data only. The environment is the one templates are written for, that of PyTorch transformers.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path

import jinja2
import jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment

from deepseek_jax.small_files import read_text

# Names a message's chain of thought goes by; templates read the first.
REASONING = ("reasoning_content", "thinking", "reasoning")


class TokenizerError(ValueError):
    """A checkpoint's tokenizer files are missing or do not make a tokenizer, or its template fails."""


class ChatTemplate:
    """A compiled template; ``variables`` (bos_token, eos_token, ...) are there in every rendering.

    Raises:
        TokenizerError: the source is not a Jinja template.
    """

    def __init__(self, source: str, variables: Mapping[str, str]):
        try:
            self._template = _environment().from_string(source)
        except (jinja2.TemplateError, RecursionError) as error:
            raise TokenizerError(f"The checkpoint's chat template is not valid Jinja: {error}") from error
        self._variables = dict(variables)

    def render(self, messages: Sequence[Mapping], **variables) -> str:
        """The text of ``messages``.

        Raises:
            ValueError: there are no messages, or one is not made of plain data.
            TokenizerError: the template refuses them, or fails.
        """
        if not messages:
            raise ValueError("A chat needs at least one message.")
        for message in messages:
            if not isinstance(message, Mapping):
                raise ValueError(f"A chat message is a mapping with a role and a content, not {message!r}.")
        known = _plain({"tools": None, "documents": None, **self._variables, **variables})
        messages = [_message(m) for m in messages]
        try:
            return self._template.render(messages=messages, **known)
        except jinja2.TemplateError as error:
            raise TokenizerError(f"The checkpoint's chat template refuses this chat: {error}") from error
        except Exception as error:  # the template is a program, and may fail in any way
            raise TokenizerError(
                f"The checkpoint's chat template fails on this chat: {type(error).__name__}: {error}"
            ) from error


def read_template(folder: Path, config: Mapping) -> str | None:
    """The template's source: ``chat_template.jinja``, else ``chat_template`` of tokenizer_config.json.

    Of several named templates, the one called ``default``.

    Raises:
        TokenizerError: several templates and none of them the default, or no template where one should be.
    """
    file = folder / "chat_template.jinja"
    if file.exists():
        try:
            return read_text(file)
        except ValueError as error:
            raise TokenizerError(str(error)) from None
    template, where = config.get("chat_template"), f"{folder / 'tokenizer_config.json'}: chat_template"
    if template is None or isinstance(template, str):
        return template
    entries = template if isinstance(template, list) else []
    texts = [(entry.get("name"), entry.get("template")) if isinstance(entry, dict) else (None,) for entry in entries]
    if not texts or not all(isinstance(text, str) for pair in texts for text in pair):
        raise TokenizerError(f"{where} must be text, or a list of objects with name and template, both text.")
    named = dict(texts)
    if "default" not in named:
        raise TokenizerError(f"{where} has the templates {sorted(named)}, none the default.")
    return named["default"]


class _Generation(jinja2.ext.Extension):
    """Lets ``{% generation %}`` blocks, which mark the assistant's tokens for training, pass as they are."""

    tags = frozenset({"generation"})

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body).set_lineno(line)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


def _to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    # Jinja's own filter escapes HTML and sorts keys.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message):
    raise jinja2.TemplateError(message)


def _message(message: Mapping) -> dict:
    """A message without its empty (None) entries, its reasoning under the name that templates read."""
    message = _plain({key: value for key, value in message.items() if value is not None})
    given = [message[name] for name in REASONING if name in message]
    if given:
        message["reasoning_content"] = given[0]
        message.setdefault("thinking", given[0])
    return message


def _plain(value):
    """A copy out of plain data: a template is never handed an object with methods of its own."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    raise ValueError(f"A chat holds text, numbers, lists and mappings, not a {type(value).__name__}.")
