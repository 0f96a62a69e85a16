"""How fast text becomes batches: tokenising once, then rows from the token files, beside what a step takes in.

Two sources: the standard library, and JSON lines of many short documents cut from it, as text from the web is. Each is
tokenised with a vocabulary of 2048 learned from the library; then batches are drawn for a few seconds with 0, 1 and 2
workers, without and with sample masks, FIM at 0.1. ``longest_wait`` is the slowest batch, which begins an epoch: its
documents are ordered and packed anew. Writes results.json.

    python experiments/bench_data/run.py          # 3 to 6 minutes on 2 cores
    python experiments/bench_data/run.py --smoke  # the short documents alone, few of them, in seconds
"""

import argparse
import json
import tempfile
import time
from dataclasses import replace
from itertools import islice
from pathlib import Path

import deepseek_jax as dsj
from deepseek_jax.analysis.provenance import provenance
from deepseek_jax.data.config import DataConfig
from deepseek_jax.data.pipeline import Data, load_data, training_texts
from deepseek_jax.text.bpe import save_tokenizer, train_tokenizer
from deepseek_jax.text.tokenizer import load_tokenizer

HERE = Path(__file__).parent
SHAPES = ((4, 512), (8, 4096))  # rows, tokens a row: tiny-v3's default batch, and rows of V3's length
SHORT = 1500  # characters of a short document


def write_lines(path: Path, documents: int, texts: list[str]) -> None:
    """JSON lines: pieces of the library's text, each with a number in front so that no two are the same."""
    texts = "".join(texts)
    with path.open("w", encoding="utf-8") as file:
        for i in range(documents):
            at = i * SHORT % (len(texts) - SHORT)
            file.write(json.dumps({"text": f"# {i}\n{texts[at : at + SHORT]}"}) + "\n")


def measure(data: Data, rows: int, length: int, seconds: float) -> dict:
    """Tokens a second of batches drawn one after the other, from the first on, and the longest wait for one."""
    batches = data.batches(length=length, rows=rows, seed=0)
    began = last = time.perf_counter()
    waits, tokens = [], 0
    while last - began < seconds:
        tokens += next(batches)["tokens"].size
        now = time.perf_counter()
        waits.append(now - last)
        last = now
    epochs = sum(source["epochs"] for source in batches.drawn().values())
    batches.close()
    return {
        "tokens_per_second": round(tokens / (last - began)),
        "longest_wait_s": round(max(waits), 4),
        "epochs": round(epochs, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--documents", type=int, default=200_000, help="short documents in the JSON lines")
    parser.add_argument("--seconds", type=float, default=3.0, help="of drawing for each figure")
    parser.add_argument("--smoke", action="store_true", help="short documents alone, 200 of them; results go to --out")
    parser.add_argument("--out", type=Path, help="file for the results; by default results.json beside this file")
    arguments = parser.parse_args()
    smoke = arguments.smoke
    documents, seconds = (200, 0.05) if smoke else (arguments.documents, arguments.seconds)
    sources = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        texts = list(islice(training_texts(DataConfig()), 5 if smoke else None))
        vocabulary = 300 if smoke else 2048
        save_tokenizer(train_tokenizer(texts, vocabulary), folder / "tok", version=dsj.__version__)
        tokenizer = load_tokenizer(folder / "tok")
        write_lines(folder / "short.jsonl", documents, texts)
        for name in ("stdlib", str(folder / "short.jsonl"))[smoke:]:
            config = DataConfig(data=(name,))
            began = time.perf_counter()
            data = load_data(config, tokenizer, folder / "tokens")
            took = time.perf_counter() - began
            manifest = data.files[0].manifest
            began = time.perf_counter()
            load_data(config, tokenizer, folder / "tokens")
            entry = {
                "source": data.labels[0],
                "documents": manifest["train"]["documents"],
                "tokens": manifest["tokens"],
                "tokenised_tokens_per_second": round(manifest["tokens"] / took),
                "reopened_s": round(time.perf_counter() - began, 4),
                "batches": [],
            }
            for masks in (False, True):
                for workers in (0, 1, 2):
                    for rows, length in SHAPES:
                        changed = replace(data, config=replace(config, workers=workers, sample_masks=masks))
                        found = measure(changed, rows, length, seconds)
                        setting = {"rows": rows, "length": length, "workers": workers, "sample_masks": masks}
                        entry["batches"].append(setting | found)
                        print(data.labels[0], setting, found)
            sources.append(entry)
    out = arguments.out or (None if smoke else HERE / "results.json")
    if out is not None:
        out.write_text(json.dumps(provenance() | {"sources": sources}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
