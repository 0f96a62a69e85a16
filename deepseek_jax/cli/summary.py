"""``deepseek-jax summary``: exact figures of a model, from its config, checked against its own tree."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from deepseek_jax.cli.files import check_destination, write_json
from deepseek_jax.small_files import read_json

if TYPE_CHECKING:
    from deepseek_jax.configs.schema import ModelConfig


@dataclass(frozen=True)
class Summary:
    """Exact parameter, cache, FLOP and cost figures of a model; no weights are needed."""

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """A release such as deepseek-v3, a config.json, or a checkpoint folder."""
    context: int = 4096
    """Length in tokens at which FLOPs and the cache are given."""
    json: Annotated[Path | None, tyro.conf.arg(metavar="PATH")] = None
    """Also write the figures to this file; "-" is the standard output."""

    def run(self) -> int:
        from deepseek_jax.analysis.counts import counts
        from deepseek_jax.analysis.published.costs import COSTS
        from deepseek_jax.analysis.published.table import release_of
        from deepseek_jax.analysis.shapes import disagreements
        from deepseek_jax.cli.summary_tables import print_summary

        check_destination(self.json)
        cfg = find_config(self.model)
        figures = counts(cfg, self.context)
        wrong = disagreements(cfg, figures)
        if wrong:
            raise ValueError(f"the counts and the model's own shapes disagree: {'; '.join(wrong)}.")
        print_summary(cfg, figures)
        print("\nChecked against the model's own shapes (jax.eval_shape): all components agree.")
        if self.json is not None:
            cost = COSTS.get(release_of(cfg))
            record = {
                "config": asdict(cfg),
                "counts": figures.as_dict(),
                "cost": cost and {**asdict(cost), "gpu_hours": cost.gpu_hours, "dollars": cost.dollars},
            }
            write_json(self.json, record)
        return 0


def find_config(model: str) -> "ModelConfig":
    """The config of a release's name, a config.json or a checkpoint folder.

    Raises ConfigError for a name that is neither and for a config that cannot be built, ValueError for a folder without
    one and a file that is not JSON or no regular file, OSError for one that cannot be read.
    """
    from deepseek_jax.configs.hf import config_from_json
    from deepseek_jax.configs.zoo import zoo
    from deepseek_jax.convert.folders import why_no_checkpoint

    path = Path(model)
    if model in zoo() or not path.exists():
        return zoo(model)
    file = path / "config.json" if path.is_dir() else path
    if (not file.exists() or file.suffix in (".gguf", ".safetensors")) and (why := why_no_checkpoint(path)) is not None:
        raise ValueError(why)
    return config_from_json(read_json(file), name=file.resolve().parent.name)
