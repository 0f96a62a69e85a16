"""All published figures in one table, which `deepseek-jax report numbers` prints and the tests hold."""

from deepseek_jax.analysis.published import (
    cache,
    computation,
    costs,
    formulas,
    janus,
    parameters,
    serving,
    traffic,
    training,
)
from deepseek_jax.analysis.published.figure import Figure
from deepseek_jax.configs.multimodal import JanusConfig
from deepseek_jax.configs.schema import ModelConfig
from deepseek_jax.configs.zoo import zoo

SECTIONS: dict[str, tuple[Figure, ...]] = {
    "Parameters": parameters.FIGURES,
    "Janus-Pro": janus.FIGURES,
    "Key-value cache": cache.FIGURES,
    "Computation": computation.FIGURES,
    "Memory traffic of streams": traffic.FIGURES,
    "Training steps": training.FIGURES,
    "Cost of training": costs.FIGURES,
    "Serving": serving.FIGURES,
    "Formulas": formulas.FIGURES,
}
FIGURES = {figure.id: figure for section in SECTIONS.values() for figure in section}


def of_release(release: str | None) -> tuple[Figure, ...]:
    """The figures that are published of a release, for its summary."""
    return tuple(figure for figure in FIGURES.values() if release in figure.releases)


def release_of(cfg: ModelConfig | JanusConfig) -> str | None:
    """The release that a config is, None for an ablation or any other model of the same name."""
    return cfg.name if cfg.name in zoo() and cfg == zoo(cfg.name) else None
