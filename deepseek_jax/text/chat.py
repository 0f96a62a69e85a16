"""Chat templates: a checkpoint's own Jinja program that turns messages into text.

A template is code from whoever made the checkpoint, so it runs in Jinja's immutable sandbox and sees
plain data only. The environment is the one templates are written for, that of PyTorch transformers.
"""

import json
from collections.abc import Mapping, Sequence, Set
from datetime import datetime

import jinja2
import jinja2.ext
import jinja2.meta
from jinja2.sandbox import ImmutableSandboxedEnvironment

from deepseek_jax.notes import cut, shown

# Names a message's chain of thought goes by; templates read the first.
REASONING = ("reasoning_content", "thinking", "reasoning")
# Names that transformers gives a meaning where a checkpoint has several templates.
DEFAULT, TOOL_USE = "default", "tool_use"


class TokenizerError(ValueError):
    """A checkpoint's tokenizer files are missing or do not make a tokenizer, or its template fails."""


class EffortError(TokenizerError):
    """A chat asks for an effort (``reasoning_effort``) that its format does not know."""


class ChatTemplate:
    """A checkpoint's templates, compiled; ``variables`` (bos_token, eos_token, ...) are there in every rendering.

    ``sources``: the template, or several by name. Of several, ``tool_use`` renders chats with tools, where there is
    one, and ``default`` all others, as in transformers. ``sorts_tools``: the entries of tools are sorted by name.

    Raises:
        TokenizerError: a source is not a Jinja template.
    """

    def __init__(self, sources: str | Mapping[str, str], variables: Mapping[str, str], sorts_tools: bool = False):
        named = {DEFAULT: sources} if isinstance(sources, str) else dict(sources)
        self._templates, self._read = {}, set()
        for name, source in named.items():
            try:
                parsed = _environment().parse(source)
                self._templates[name] = _environment().from_string(parsed)
                self._read |= jinja2.meta.find_undeclared_variables(parsed)
            except (jinja2.TemplateError, RecursionError) as error:
                which = "" if len(named) == 1 else f" {shown(name)}"
                raise TokenizerError(
                    f"The checkpoint's chat template{which} is not valid Jinja: {cut(error)}"
                ) from error
        self._variables, self._sorts_tools = dict(variables), sorts_tools

    def render(self, messages: Sequence[Mapping], *, chat_template: str | None = None, **variables) -> str:
        """The text of ``messages``; ``chat_template``: the name of one of several templates.

        An entry of a message that is null is not ``defined`` for the template and yet ``none``. Templates are written
        for either: transformers 4 handed null on, which V3's own asks for (``content is none`` is its branch for calls
        of tools without text), transformers 5 takes such entries out, so that V3's own template fails there.

        Raises:
            ValueError: there are no messages, or one is not made of plain data.
            TokenizerError: no template of that name or for such a chat; or it refuses the messages, or fails.
        """
        if not messages:
            raise ValueError("A chat needs at least one message.")
        for message in messages:
            if not isinstance(message, Mapping):
                raise ValueError(f"A chat message is a mapping with a role and a content, not {shown(message)}.")
        known = plain({"tools": None, "documents": None, **self._variables, **variables})
        if self._sorts_tools:
            known["tools"] = _sorted(known["tools"])
        messages = [read_message(m) for m in messages]
        template = self._choose(chat_template, known["tools"] is not None)
        try:
            return template.render(messages=messages, **known)
        except jinja2.TemplateError as error:
            raise TokenizerError(f"The checkpoint's chat template refuses this chat: {cut(error)}") from error
        except Exception as error:  # the template is a program, and may fail in any way
            raise TokenizerError(
                f"The checkpoint's chat template fails on this chat: {type(error).__name__}: {cut(error)}"
            ) from error

    def reads(self, name: str) -> bool:
        """Whether a template has a variable of that name, which `render` may be given."""
        return name in self._read

    def _choose(self, name: str | None, tools: bool) -> jinja2.Template:
        if name is None:
            name = TOOL_USE if tools and TOOL_USE in self._templates else DEFAULT
        if name not in self._templates:
            kind = "with" if tools else "without"
            raise TokenizerError(
                f"The checkpoint has no chat template {shown(name)}, for a chat {kind} tools, but "
                f"{', '.join(map(shown, sorted(self._templates)))}: name one of these with chat_template=."
            )
        return self._templates[name]


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
    environment.tests["none"] = lambda value: value is None or isinstance(value, _Null)
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


def _to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    # Jinja's own filter escapes HTML and sorts keys.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message):
    raise jinja2.TemplateError(message)


class _Null(jinja2.Undefined):
    """What a template finds under the name of an entry that is null: not defined, and none."""

    __slots__ = ()
    __hash__ = jinja2.Undefined.__hash__

    def __eq__(self, other) -> bool:
        return other is None or isinstance(other, _Null)


class _Message(dict):
    """A message for a template; ``nulls``: the entries of it that are null, and so are not among its keys."""

    def __init__(self, entries: dict, nulls: Set[str]):
        super().__init__(entries)
        self._nulls = nulls

    def __missing__(self, key):
        if key in self._nulls:
            return _Null(f"the message's {key!r} is null")
        raise KeyError(key)


def read_message(message: Mapping) -> dict:
    """A message's entries, its reasoning under the name that templates read; a call of tools may have no content."""
    entries = plain({key: value for key, value in message.items() if value is not None})
    nulls = {str(key) for key, value in message.items() if value is None}
    if "tool_calls" in entries and "content" not in entries:
        nulls.add("content")
    given = [entries[name] for name in REASONING if name in entries]
    if given:
        entries["reasoning_content"] = given[0]
        entries.setdefault("thinking", given[0])
    nulls -= set(entries)
    return _Message(entries, nulls) if nulls else entries


def plain(value):
    """A copy out of plain data: a template is never handed an object with methods of its own."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    raise ValueError(f"A chat holds text, numbers, lists and mappings, not a {type(value).__name__}.")


def _sorted(value):
    """Plain data with every object's entries in the order of their names."""
    if isinstance(value, dict):
        return {key: _sorted(item) for key, item in sorted(value.items())}
    return [_sorted(item) for item in value] if isinstance(value, list) else value
