"""The files of a published folder: their split and index, what is copied, and writing a folder whole or not at all."""

import json
import math
import os
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np

SHARD_BYTES = 5_000_000_000
COPIED_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.*",
    "additional_chat_templates/*.jinja",
    "processor_config.json",
    "generation_config.json",
    "*.tiktoken",
    "*.model",
    "*.py",
    "LICENSE*",
)
Spec = tuple[np.dtype, tuple[int, ...]]


@contextmanager
def new_folder(path: str | Path):
    """A temporary folder beside ``path`` that takes its name at the end, and vanishes after an error.

    Raises FileExistsError when ``path`` is a file or a folder that is not empty.
    """
    # Through a link, so that the temporary folder lies on the disk that the result will lie on.
    path = Path(path).resolve()
    check_free(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".writing", dir=path.parent))
    try:
        folder.chmod(0o755)
        yield folder
        folder.replace(path)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def check_free(path: Path) -> None:
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise FileExistsError(f"{path} exists and is not an empty folder; choose another destination or remove it.")


def split_files(specs: dict[str, Spec], like: dict[str, str] | None = None) -> dict[str, list[str]]:
    """File name -> names of its tensors: the split of ``like`` (name -> file), else files of up to 5 GB in published
    order.

    """
    files: dict[str, list[str]] = {}
    if like is not None:
        for name in specs:
            files.setdefault(like[name], []).append(name)
        return dict(sorted(files.items()))
    groups, size = [[]], 0
    for name, spec in specs.items():
        if groups[-1] and size + nbytes(spec) > SHARD_BYTES:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += nbytes(spec)
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    return {f"model-{i:05d}-of-{len(groups):05d}.safetensors": names for i, names in enumerate(groups, start=1)}


def index_json(specs: dict[str, Spec], files: dict[str, list[str]]) -> dict:
    total = sum(nbytes(spec) for spec in specs.values())
    weight_map = dict(sorted((name, file) for file, names in files.items() for name in names))
    return {"metadata": {"total_size": total}, "weight_map": weight_map}


def nbytes(spec: Spec) -> int:
    return math.prod(spec[1]) * spec[0].itemsize


def copy_files(source: Path, destination: Path) -> None:
    """Copies the tokenizer, its templates, the generation config and the licence."""
    for pattern in COPIED_FILES:
        for file in sorted(source.glob(pattern)):
            if file.is_file():
                copy = destination / file.relative_to(source)
                copy.parent.mkdir(exist_ok=True)
                shutil.copyfile(file, copy)


def write_json(path: Path, data: dict) -> None:
    with path.open("w") as file:
        json.dump(data, file, indent=2)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
