"""The files of a folder that make its tokenizer, and its chat templates out of them.

::

    tokenizer.json or tiktoken.model, tokenizer_config.json
    chat_template.jinja, additional_chat_templates/NAME.jinja     as transformers writes templates today
    chat_template of tokenizer_config.json                        as it did before: a text, or a list of named ones
    chat_template.json, processor_config.json                     of a processor for images and text
"""

import shutil
from collections.abc import Mapping
from pathlib import Path

from deepseek_jax.small_files import SMALL, read_json, read_text
from deepseek_jax.text.chat import DEFAULT, TokenizerError

FAST, RANKS = "tokenizer.json", "tiktoken.model"
FILES = (
    FAST,
    RANKS,
    "tokenization_*.py",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "processor_config.json",
    "additional_chat_templates/*.jinja",
)


def has_tokenizer(folder: Path) -> bool:
    """Whether ``load_tokenizer`` finds a tokenizer there."""
    return any((folder / name).exists() for name in (FAST, RANKS))


def tokenizer_files(folder: Path) -> list[Path]:
    """The files that make a folder's tokenizer, relative to it."""
    found = (file for pattern in FILES for file in sorted(folder.glob(pattern)) if file.is_file())
    return [file.relative_to(folder) for file in found]


def tokenizer_folder(tokenizer) -> Path:
    """The folder of a tokenizer, which is given by it or as what was loaded from it.

    Raises:
        TokenizerError: there is none.
    """
    folder = getattr(tokenizer, "folder", None) if hasattr(tokenizer, "backend") else Path(tokenizer)
    if folder is None:
        raise TokenizerError(
            "this tokenizer was made in memory: write it (text.bpe.save_tokenizer), and name its folder."
        )
    if not has_tokenizer(folder):
        raise TokenizerError(f"{folder} has no {FAST} and no {RANKS}.")
    return folder


def copy_tokenizer(source: Path, destination: Path) -> None:
    """Copies a folder's tokenizer with its templates, byte for byte."""
    for name in tokenizer_files(source):
        (destination / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, destination / name)


def read_config(file: Path) -> dict:
    """The object in a file of JSON; an empty one where there is no file.

    Raises:
        TokenizerError: the file is not JSON, holds something else, or is not read (`small_files`).
    """
    if not file.exists():
        return {}
    try:
        return read_json(file)
    except ValueError as error:
        raise TokenizerError(str(error)) from None


def read_whole(file: Path, most: int = SMALL) -> str:
    """A file's text. Raises TokenizerError where it is not UTF-8 or not read (`small_files`)."""
    try:
        return read_text(file, most)
    except ValueError as error:
        raise TokenizerError(str(error)) from None


def read_templates(folder: Path, config: Mapping) -> dict[str, str]:
    """The sources of a folder's chat templates by name, none where it has no template.

    Templates in files of their own take the place of those in ``config``, its tokenizer_config.json; these that of
    a processor's.

    Raises:
        TokenizerError: an entry or a file that is not a template's text.
    """
    file = folder / "chat_template.jinja"
    named = {file.stem: read_whole(file) for file in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
    if file.exists():
        return named | {DEFAULT: read_whole(file)}
    written = _entry(config, folder / "tokenizer_config.json")
    for name in ("chat_template.json", "processor_config.json"):
        written = written or _entry(read_config(folder / name), folder / name)
    if named and DEFAULT in written:
        return {DEFAULT: written[DEFAULT]} | named
    return named or written


def _entry(config: Mapping, file: Path) -> dict[str, str]:
    """The templates under ``chat_template``: a text, which is the default, or objects with name and template."""
    template = config.get("chat_template")
    if template is None:
        return {}
    if isinstance(template, str):
        return {DEFAULT: template}
    entries = template if isinstance(template, list) else []
    texts = [(entry.get("name"), entry.get("template")) if isinstance(entry, dict) else (None,) for entry in entries]
    if not texts or not all(isinstance(text, str) for pair in texts for text in pair):
        raise TokenizerError(
            f"{file}: chat_template must be text, or a list of objects with name and template, both text."
        )
    named = dict(texts)
    if len(named) < len(texts):
        raise TokenizerError(f"{file}: chat_template names a template twice, of {sorted(name for name, _ in texts)}.")
    return named
