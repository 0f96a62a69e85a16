"""Tokenizers published as ranks, ``tiktoken.model``: those of Moonlight and Kimi-K2.

The file holds a token a line, its bytes in base64 and its rank, which is its id. Text is cut into pieces by a pattern.
A piece that is a token is that one, and of any other the bytes are merged: of all neighbours that make a token together
those with the lowest rank, the leftmost first, until none are left. Control tokens have the ids behind the ranks.

As merges of a byte-level BPE this is exact: a token that was merged has seen the merges of its own bytes alone, so that
one pair of parts makes it wherever it stands, and of its other pairs, which are listed too, none ever meets.

Pattern and reserved ids stand in the release's own code, ``tokenization_*.py``. It is read, and never run.
"""

import ast
import base64
import binascii
from dataclasses import dataclass
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers

from deepseek_jax.notes import cut, shown
from deepseek_jax.small_files import LARGE
from deepseek_jax.text.chat import TokenizerError
from deepseek_jax.text.files import RANKS, read_config, read_whole

# Moonlight's and Kimi-K2's: Han apart; words with one mark before and a contraction behind, up to a change from small
# to capital letters; digits by three; marks with the line ends behind; white space.
_START, _END = r"[^\r\n\p{L}\p{N}]?", r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_UPPER, _LOWER = (rf"[\p{{{c}}}\p{{Lm}}\p{{Lo}}\p{{M}}&&[^\p{{Han}}]]" for c in (r"Lu}\p{Lt", "Ll"))
PATTERN = (
    rf"[\p{{Han}}]+|{_START}{_UPPER}*{_LOWER}+{_END}|{_START}{_UPPER}+{_LOWER}*{_END}"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
RESERVED = 256
MOST_RESERVED = 2**16
BEYOND = 2  # ids that the releases' code names on top of the reserved ones


@dataclass(frozen=True)
class Code:
    """What a release's code states: how text is cut, how many ids are reserved for control tokens, and whether the
    objects of ``tools`` are sorted by their keys before a template sees them."""

    pattern: str = PATTERN
    reserved: int = RESERVED
    sorts_tools: bool = False


def read_code(folder: Path) -> Code:
    """What a folder's ``tokenization_*.py`` states; that of Kimi-K2 where there is none.

    Raises:
        TokenizerError: the code is no Python, or states its pattern in another form than a text or a join of texts.
    """
    found = []
    for file in sorted(folder.glob("tokenization_*.py")):
        try:
            tree = ast.parse(read_whole(file))
            pattern, reserved = (
                _assigned(tree, "pat_str", None),
                _assigned(tree, "num_reserved_special_tokens", RESERVED),
            )
            if not isinstance(pattern, str | None) or type(reserved) is not int or not 0 <= reserved <= MOST_RESERVED:
                raise ValueError(f"pat_str is {shown(pattern)}, num_reserved_special_tokens {shown(reserved)}")
        except (SyntaxError, ValueError, TypeError, RecursionError) as error:
            said = cut(error)
            raise TokenizerError(f"{file} does not state a pattern in a form that is read here: {said}.") from error
        if pattern is not None:
            calls = {node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and hasattr(node.func, "id")}
            found.append(Code(pattern, reserved, "deep_sort_dict" in calls))
    if len(set(found)) > 1:
        raise TokenizerError(f"{folder} has several tokenization_*.py that state different patterns: keep one.")
    return found[0] if found else Code()


def read(folder: Path, config: dict, code: Code) -> tokenizers.Tokenizer:
    """The tokenizer of ``tiktoken.model`` with the control tokens of ``config``, its tokenizer_config.json.

    Reserved ids without a name there are called ``<|reserved_token_ID|>``, as the release's code does; of the two that
    the code has beyond those reserved, for which Kimi-K2 has no rows, only what config.json's vocab_size has. A piece
    may be of any length: the release's code cuts runs of 25,000 characters without a change between text and white
    space.

    Raises:
        TokenizerError: lines that are no ranks, ranks or control tokens with gaps or twice, or a byte without a token.
    """
    file = folder / RANKS
    ranks = _ranks(file)
    alphabet = byte_alphabet()
    words = {rank: "".join(alphabet[byte] for byte in token) for token, rank in ranks.items()}
    vocab = {words[rank]: rank for rank in range(len(words))}
    merges = [
        (word[:at], word[at:])
        for word in vocab
        for at in range(1, len(word))
        if word[:at] in vocab and word[at:] in vocab
    ]
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=True))
    try:
        split = pre_tokenizers.Split(Regex(code.pattern), behavior="isolated")
    except Exception as error:  # the library raises bare Exception
        said = cut(error)
        raise TokenizerError(f"{folder}: the pattern {shown(code.pattern)} cannot be compiled: {said}.") from error
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    backend.decoder = decoders.ByteLevel()
    control = _control(folder, config, len(vocab), code.reserved)
    for i, token in control.items():
        if token.content in vocab:
            raise TokenizerError(
                f"{file} has a token {shown(token.content)} that tokenizer_config.json names as id {i}."
            )
    backend.add_tokens(list(control.values()))
    if any(backend.token_to_id(token.content) != i for i, token in control.items()):
        raise TokenizerError(f"{folder / 'tokenizer_config.json'}: added_tokens_decoder names a token twice.")
    return backend


def _ranks(file: Path) -> dict[bytes, int]:
    ranks = {}
    for number, line in enumerate(read_whole(file, LARGE).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise TokenizerError(f"{file}: line {number} is not a token in base64 and its rank: {error}") from error
    if missing := [byte for byte in range(256) if bytes([byte]) not in ranks]:
        raise TokenizerError(f"{file} has no token for the byte {missing[0]:#04x} ({len(missing)} such bytes).")
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise TokenizerError(f"{file}: the ranks of its {len(ranks)} tokens are not 0 to {len(ranks) - 1}, each once.")
    return ranks


def _control(folder: Path, config: dict, first: int, reserved: int) -> dict[int, AddedToken]:
    """The control tokens by id, without gaps from ``first`` on."""
    file, most = folder / "tokenizer_config.json", first + reserved + BEYOND
    rows = read_config(folder / "config.json").get("vocab_size")
    stop = min(most, rows) if isinstance(rows, int) else first + reserved
    named = {}
    for key, entry in (config.get("added_tokens_decoder") or {}).items():
        content = entry.get("content") if isinstance(entry, dict) else None
        if not str(key).isdecimal() or not isinstance(content, str) or not content:
            raise TokenizerError(
                f"{file}: added_tokens_decoder must give ids objects with content, not {shown({key: entry})}."
            )
        named[int(key)] = AddedToken(content, special=bool(entry.get("special", True)), normalized=False)
    if outside := [i for i in named if not first <= i < most]:
        raise TokenizerError(
            f"{file} names {named[outside[0]].content!r} as id {outside[0]}, outside {first} to {most - 1}: behind the "
            f"{first} ranks of {RANKS} come {reserved} reserved ids and {BEYOND}."
        )
    stop = max([first, stop, *(i + 1 for i in named)])
    empty = (AddedToken(f"<|reserved_token_{i}|>", special=True, normalized=False) for i in range(first, stop))
    return dict(zip(range(first, stop), empty, strict=True)) | named


def byte_alphabet() -> list[str]:
    """The character that stands for each byte in a byte-level vocabulary: printable ones themselves, others moved."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    moved = iter(range(0x100, 0x200))
    return [chr(byte) if byte in plain else chr(next(moved)) for byte in range(256)]


def _assigned(tree: ast.Module, name: str, default):
    """What the code assigns to ``name``, in a class or outside."""
    for node in ast.walk(tree):
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        named = any(isinstance(target, ast.Name) and target.id == name for target in targets)
        if named and getattr(node, "value", None) is not None:
            return _literal(node.value)
    return default


def _literal(node: ast.expr):
    """A constant, or a text's join of a list of them."""
    match node:
        case ast.Call(func=ast.Attribute(value=ast.Constant(str(between)), attr="join"), args=[parts]):
            return between.join(ast.literal_eval(parts))
    return ast.literal_eval(node)
