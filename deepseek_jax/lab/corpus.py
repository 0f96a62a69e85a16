"""The text of runs, tokenised once on a machine and read by all of them."""

import platform
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from deepseek_jax import kept
from deepseek_jax.data.pipeline import Data, load_data
from deepseek_jax.lab.study import Setup, described, digest
from deepseek_jax.runs.prepare import tokenizer_folder
from deepseek_jax.text.tokenizer import load_tokenizer

# A tokenizer's largest length is a note in its files; setups that differ in it alone share theirs.
LENGTH = 4096


@dataclass(frozen=True, eq=False)
class Corpus:
    """``hash``: of the tokens to train on and to measure, whatever file or Python they came from. ``folder``: where it
    lies, with room for what is made of it."""

    data: Data
    hash: str
    folder: Path

    def record(self) -> dict:
        """What a run's file says of it."""
        return {"hash": self.hash, "python": platform.python_version(), "train_tokens": self.data.train_tokens}


def corpus(setup: Setup, home: Path, report: Callable[[str], None] = lambda line: None) -> Corpus:
    """The tokens of a setup's text, made in ``home`` where they are not there yet.

    Raises ValueError and OSError as `load_data`.
    """
    recipe, text = setup.recipe, setup.text
    # The folder is one Python's: another has other text in its standard library.
    name = digest([platform.python_version(), described(replace(text, held_out_bytes=1)), setup.model.vocab_size])
    folder = home / f"{platform.python_version()}-{name}"
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "tokenizer").exists():
        report(f"training a tokenizer of {setup.model.vocab_size} tokens")
    tokenizer_folder(folder / "tokenizer", setup.model.vocab_size, text, LENGTH)
    text = replace(text, fim_rate=recipe.fim_rate, sample_masks=recipe.sample_masks)
    data = load_data(text, load_tokenizer(folder / "tokenizer"), folder / "tokens", report)
    tokens = digest([[label, file.identity] for label, file in zip(data.labels, data.files, strict=True)])
    return Corpus(data, tokens, folder)


def default_home() -> Path:
    """`kept.home`/corpora."""
    return kept.home() / "corpora"
