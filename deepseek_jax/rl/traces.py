"""A task's solutions as files: chats and texts to fine-tune or train on, and a tokenizer for models this small.

Loads no JAX.
"""

import json
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors

from deepseek_jax.convert.files import new_folder
from deepseek_jax.rl.rewards import TAGS
from deepseek_jax.rl.tasks import Exercise, Problem
from deepseek_jax.runs.run_folder import write_whole
from deepseek_jax.text.bpe import BOS, SPECIAL_TOKENS, save_tokenizer
from deepseek_jax.version import __version__

CHATS, TOKENIZER = "traces.jsonl", "tokenizer"


def write_traces(task: Exercise, folder: Path) -> None:
    """Into ``folder``, which must not exist or be empty: ``traces.jsonl``, the task's training texts, ``documents`` of
    them, each a line with "messages" for ``train --sft`` and the whole "text" for ``train --data``; and ``tokenizer``,
    with a token for every byte and every tag and no others: answers are written a character at a time. Whole or not at
    all.

    Raises FileExistsError where something is there.
    """
    with new_folder(folder) as new:
        save_tokenizer(byte_tokenizer(), new / TOKENIZER, version=__version__)
        write_whole(new / CHATS, "".join(record(problem, problem.solution) for problem in task.training_items()))


def record(problem: Problem, solution: str) -> str:
    """A line of ``traces.jsonl``."""
    said = [{"role": "user", "content": problem.prompt}, {"role": "assistant", "content": solution}]
    return json.dumps({"messages": said, "text": problem.prompt + solution}) + "\n"


def byte_tokenizer() -> Tokenizer:
    """Ids: the special tokens of `text.bpe`, the 256 bytes, the four tags. Tags are tokens like any other, so that they
    are read as such in training text too."""
    pieces = [*SPECIAL_TOKENS, *sorted(pre_tokenizers.ByteLevel.alphabet()), *TAGS]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    # There are no merges: a piece is a token where it is known as a whole, or else its bytes are.
    words = Tokenizer(models.BPE(vocab, [], ignore_merges=True))
    words.add_special_tokens(list(SPECIAL_TOKENS))
    words.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex("|".join(TAGS)), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    words.decoder = decoders.ByteLevel()
    words.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, 0)]
    )
    return words
