"""What a path is that was given for a checkpoint and is none, in a sentence, with the way out. Loads no JAX."""

from pathlib import Path

from deepseek_jax.configs.zoo import meant, zoo
from deepseek_jax.notes import cut
from deepseek_jax.small_files import read_json

GIVE = "give a folder with config.json and safetensors files"
PICKLES = (".bin", ".pt", ".pth", ".ckpt")


def why_no_checkpoint(path: Path) -> str | None:
    """The sentence; None for a folder that has a config.json and is none of the kinds known here."""
    if path.is_file():
        return f"{path} is {_file(path)}"
    if not path.is_dir():
        return f"{path} {_absent(path)}"
    if (path / "run.json").is_file():
        return f"{path} is a training run: {_run(path)}."
    if (path / "adapter_config.json").is_file():
        return f"{path} is {_adapter(path)}"
    if (path / "config.json").exists():
        return None
    entries = sorted(entry.name for entry in path.iterdir() if not entry.name.startswith("."))
    if not entries:
        return f"{path} is an empty folder; {GIVE}."
    if (path.parent / "run.json").is_file() and path.name == "checkpoints":
        return f"{path} holds the checkpoints of a training run: {_run(path.parent)}."
    if snapshots := sorted(path.glob("snapshots/*/config.json")):
        return f"{path} is a folder of Hugging Face's cache: give {snapshots[-1].parent}."
    if any(name.endswith(".gguf") for name in entries):
        return f"{path} holds GGUF files, llama.cpp's format, which is not read here; {GIVE}."
    if any(name.endswith(PICKLES) for name in entries) and not any(name.endswith(".safetensors") for name in entries):
        return f"{path} holds PyTorch's pickled weights, but no config.json; {GIVE}."
    if inside := [name for name in entries if (path / name / "config.json").is_file()]:
        return f"{path} has no config.json, but folders in it have: give one of them, such as {path / inside[0]}."
    return f"{path} has no config.json; {GIVE}."


def _file(path: Path) -> str:
    with path.open("rb") as file:
        start = file.read(4)
    if start == b"GGUF" or path.suffix == ".gguf":
        return f"a GGUF file, llama.cpp's format, which is not read here; {GIVE}."
    if path.suffix == ".safetensors":
        whole = "the folder it lies in" if (path.parent / "config.json").is_file() else "a folder"
        return f"one file of weights; give {whole}, with config.json beside all its safetensors files: {path.parent}."
    if path.suffix in PICKLES:
        return "a file of PyTorch's pickled weights; give a folder that has config.json beside pytorch_model*.bin."
    if path.name == "config.json":
        return f"a config without weights; give its folder, {path.parent}, where the safetensors files lie beside it."
    return f"a file, not a checkpoint; {GIVE}."


def _absent(path: Path) -> str:
    """For a name that `zoo` knows, or nearly: the name is a model's, but weights are files."""
    near = [str(path)] if str(path) in zoo() else meant(str(path))
    if not near:
        return f"is not a folder; {GIVE}."
    name = near[0]
    if name.startswith("tiny"):
        return f"is not a folder; {name} is the name of an architecture, and {GIVE}, such as checkpoints/tiny-v3."
    return (
        f"is not a folder; {name} is the name of a release, whose weights have to be on the disk: "
        "hf download ORGANISATION/NAME --local-dir FOLDER, then give that folder."
    )


def _run(path: Path) -> str:
    """Where a run's models are."""
    found = []
    if (path / "checkpoint" / "config.json").is_file():
        found.append(f"its model is in {path / 'checkpoint'}")
    steps = [p.name for p in (path / "checkpoints").glob("*") if p.name.isdecimal()] if path.is_dir() else []
    if steps:
        found.append(f"its newest checkpoint is in {path / 'checkpoints' / max(steps, key=int)}")
    else:
        found.append("it has no checkpoint yet" if not found else "its checkpoints are gone")
    return ", ".join(found)


def _adapter(path: Path) -> str:
    try:
        base = read_json(path / "adapter_config.json").get("base_model_name_or_path")
    except (ValueError, OSError) as error:
        return f"an adapter (LoRA) whose adapter_config.json cannot be read: {error}"
    of = f" to {cut(base)}" if isinstance(base, str) and base else ""
    return (
        f"an adapter (LoRA){of}, not a whole model: generate and score take it as --adapter {path} beside "
        f"its base, and deepseek-jax convert BASE DST --adapter {path} writes the two as one model."
    )
