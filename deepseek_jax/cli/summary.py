"""``deepseek-jax summary``: exact figures of a model, from its config, checked against its own tree."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from deepseek_jax.cli.files import check_destination, write_json
from deepseek_jax.small_files import read_json

if TYPE_CHECKING:
    from deepseek_jax.configs.multimodal import JanusConfig
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
        from deepseek_jax.cli.summary_janus import print_janus
        from deepseek_jax.cli.summary_tables import print_summary
        from deepseek_jax.configs.multimodal import JanusConfig
        from deepseek_jax.multimodal import counted

        check_destination(self.json)
        cfg = find_any(self.model)
        figures = counts(cfg, self.context)
        if isinstance(cfg, JanusConfig):
            wrong, show = counted.disagreements(cfg, figures), print_janus
        else:
            wrong, show = disagreements(cfg, figures), print_summary
        if wrong:
            raise ValueError(f"the counts and the model's own shapes disagree: {'; '.join(wrong)}.")
        show(cfg, figures)
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
    """`find_any` of a language model. Raises ConfigError for a Janus as well."""
    from deepseek_jax.configs.checks import ConfigError
    from deepseek_jax.configs.schema import ModelConfig

    cfg = find_any(model)
    if not isinstance(cfg, ModelConfig):
        raise ConfigError(f"{model} is a Janus; this command takes language models.")
    return cfg


def find_any(model: str) -> "ModelConfig | JanusConfig":
    """The config of a release's name, a config.json or a checkpoint folder.

    Raises ConfigError for a name that is neither and for a config that cannot be built, ValueError for a folder without
    one and a file that is not JSON or no regular file, OSError for one that cannot be read.
    """
    from deepseek_jax.configs.hf import config_from_json
    from deepseek_jax.configs.published.janus import is_janus, janus_from_json
    from deepseek_jax.configs.zoo import zoo
    from deepseek_jax.convert.folders import why_no_checkpoint

    path = Path(model)
    if model in zoo() or not path.exists():
        return zoo(model)
    file = path / "config.json" if path.is_dir() else path
    if (not file.exists() or file.suffix in (".gguf", ".safetensors")) and (why := why_no_checkpoint(path)) is not None:
        raise ValueError(why)
    data, name = read_json(file), file.resolve().parent.name
    return janus_from_json(data, name) if is_janus(data) else config_from_json(data, name=name)
