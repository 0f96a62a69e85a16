"""llguidance's grammar of calls in DSML, as V3.2 and V4 write them, made of the tools' schemas.

A parameter of text stands as it is, all else as JSON. Text that is bound by more than its type, such as a pattern,
is written as JSON too: the markup allows it, and what reads calls takes it for the same text. Parameters come in the
order in which the schema names them; where it names some, no others come.
"""

import json
from collections.abc import Mapping, Sequence

from deepseek_jax.serving.errors import bad

TOKEN = "｜DSML｜"
# Say something about a value, and bind nothing.
ABOUT = {"title", "description", "default", "examples", "example", "deprecated", "readOnly", "writeOnly", "$comment"}
DEFINITIONS = ("$defs", "definitions")
UNDERSTOOD = {*ABOUT, *DEFINITIONS, "type", "properties", "required", "additionalProperties", "$schema", "$id"}
TYPES = ("string", "number", "integer", "boolean", "null", "array", "object")


def dsml_grammar(functions: Sequence[Mapping], block: str, once: bool, special: int | None) -> str:
    """Of calls of ``functions``, one where ``once``; ``block``: the name of what is around them; ``special``: the id of
    DSML's mark where the tokenizer has it as a special token, which no text holds.

    Raises `ApiError` for parameters that have what is not understood.
    """
    mark = _quoted(TOKEN) if special is None else f"<[{special}]>"
    rules = [f'start: "\\n\\n"? "<" {mark} "{block}>\\n" call{"" if once else "+"} "</" {mark} "{block}>"']
    rules += [f"call: {' | '.join(f'call{i}' for i in range(len(functions)))}"]
    for i, function in enumerate(functions):
        own = _parameters(function, mark, f"p{i}")
        head = _quoted(f'invoke name="{function["name"]}">\n')
        rules += [f'call{i}: "<" {mark} {head} {own[0]} "</" {mark} "invoke>\\n"', *own[1:]]
    rules.append(f'close: "</" {mark} "parameter>\\n"')
    if special is None:
        rules.append(f"text[suffix={_quoted(f'</{TOKEN}parameter>')}]: /(?s:.*)/")
        rules.append('said: text "\\n"')
    else:
        # Text may hold "</": what follows says whether it is the end.
        rules += ["said: (TEXT | LESS | SLASH)* SLASH " + mark + ' "parameter>\\n"']
        rules += ["TEXT: /[^<]+/", 'LESS: "<"', 'SLASH: "</"']
    return "\n".join([*rules, 'NAME: /[^"<>\\n]+/', ""])


def _parameters(function: Mapping, mark: str, name: str) -> list[str]:
    """What stands inside a call, and the rules that it is made of."""
    schema = function.get("parameters") or {}
    unknown = sorted(set(schema) - UNDERSTOOD)
    if unknown or schema.get("type", "object") != "object":
        what = unknown[0] if unknown else "type"
        message = f"the parameters of {function['name']} have {what!r}, which no required call can follow in DSML."
        raise bad("tools", message, "unsupported_parameter")
    known = {key: schema[key] for key in DEFINITIONS if key in schema}
    properties, required = schema.get("properties") or {}, schema.get("required") or ()
    properties = {**properties, **{key: {} for key in required if key not in properties}}
    properties = {key: of for key, of in properties.items() if of is not False}
    if not properties:  # any, or none
        of = schema.get("additionalProperties", {})
        if of is False or "properties" in schema:
            return ['"\\n"?']
        head = f'"<" {mark} "parameter name=\\"" NAME "\\" string="'
        return [f'({name}+ | "\\n"?)', *_parameter(name, head, of, known)]
    rules, body = [], []
    for k, (key, of) in enumerate(properties.items()):
        one = f"{name}_{k}"
        head = f'"<" {mark} {_quoted(f"parameter name={chr(34)}{key}{chr(34)} string=")}'
        rules += _parameter(one, head, of, known)
        body.append(one if key in required else f"{one}?")
    inside = " ".join(body)
    return [inside if set(required) & set(properties) else f'({inside} | "\\n")', *rules]


def _parameter(name: str, head: str, schema, known: Mapping) -> list[str]:
    rules, ways = [], []
    for k, (is_text, value) in enumerate(_ways({} if schema is True else schema)):
        if not is_text:
            rules.append(f"{name}v{k}: %json {json.dumps({**value, **known})}")
            ways.append(f'"\\"false\\">" {name}v{k} close')
        elif value is None:
            ways.append('"\\"true\\">" said')
        else:
            ways.append(f"{_quoted(chr(34) + 'true' + chr(34) + '>' + value)} close")
    return [f"{name}: {head} ({' | '.join(ways)})", *rules]


def _ways(schema: Mapping) -> list[tuple[bool, str | Mapping | None]]:
    """How a value may be written: text, any (None) or one, and JSON by a schema."""
    bound = set(schema) - ABOUT
    if len(bound) == 1 and bound <= {"anyOf", "oneOf"}:
        (name,) = bound
        alternatives = [{} if one is True else one for one in schema[name] if one is not False]
        return [way for one in alternatives for way in _ways(one)]
    if (bound <= {"type", "enum"} and "enum" in bound) or (bound <= {"type", "const"} and "const" in bound):
        values = schema.get("enum", [schema.get("const")])
        texts = [(True, value) for value in values if isinstance(value, str)]
        others = [value for value in values if not isinstance(value, str)]
        return texts + ([(False, {"enum": others})] if others else [])
    types = schema.get("type", list(TYPES))
    types = [types] if isinstance(types, str) else types
    if bound <= {"type"} and "string" in types:
        others = [kind for kind in types if kind != "string"]
        return [(True, None)] + ([(False, {"type": others})] if others else [])
    return [(False, schema)]


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
