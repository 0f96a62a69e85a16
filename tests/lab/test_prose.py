"""What of a text in Python is prose, by hand."""

from pathlib import Path

import numpy as np

from deepseek_jax.data.held_out import HeldOut
from deepseek_jax.lab.prose import by_kind, prose_bytes
from deepseek_jax.text.tokenizer import load_tokenizer

SOURCE = '''"""Doc \N{LATIN SMALL LETTER E WITH ACUTE}
two"""
x = "no"  # why \N{LATIN SMALL LETTER E WITH ACUTE}
class A:
    # c
    r"""d"""
    def f(self):
        "one" + "two"
        return ("s"
            "t")
'''


def prose(text: str) -> list[str]:
    """The stretches of it that are prose."""
    marked = zip(text.encode(), prose_bytes(text), strict=True)
    return bytes(byte if is_prose else 0 for byte, is_prose in marked).decode().replace("\0", " ").split("  ")


def test_comments_and_strings_that_stand_alone_are_prose():
    found = [stretch.strip() for stretch in prose(SOURCE) if stretch.strip()]
    assert found == ['"""Doc \xe9\ntwo"""', "# why \xe9", "# c", 'r"""d"""']


def test_what_follows_a_fault_is_code():
    assert prose_bytes("# a\nx = (\n").any()
    broken = "# a\nx = '''\n# b\n"
    assert bytes(np.frombuffer(broken.encode(), np.uint8)[prose_bytes(broken)]) == b"# a"
    assert not prose_bytes("").any()


def test_tokens_are_of_the_kind_of_their_first_byte():
    tokenizer = load_tokenizer(Path(__file__).parents[2] / "checkpoints" / "tiny-v3")
    documents = [tokenizer.encode(text) for text in ("# one\nx = 1\n", "def f():\n    '''two'''\n")]
    stream_n = np.asarray([id for document in documents for id in (*document, tokenizer.eos_id)], np.int32)
    text = by_kind(HeldOut.cut(stream_n, tokenizer.token_bytes(), length=8), tokenizer)
    assert text.domains == ("code", "prose")
    of_prose = tokenizer.backend.decode(stream_n[text.domain_n == 1].tolist(), skip_special_tokens=False)
    assert of_prose.replace("\n", "") == "# one'''two'''"
    assert set(stream_n[text.domain_n == 0].tolist()) >= {tokenizer.eos_id}
