"""The options ``--cfg.*`` of a command: a config's fields, with the values that a model of the zoo or a folder has."""

from dataclasses import fields, replace

from deepseek_jax.configs.schema import ModelConfig, Yarn

PREFIX = "--cfg."


def default_config(model: str, arguments: list[str]) -> ModelConfig | None:
    """What ``--cfg.*`` options default to: the config that ``model`` names, None where it names none.

    With an option of YaRN and a model that has none, it has one that changes nothing, factor 1: its fields are options
    then. Raises ConfigError, ValueError or OSError where ``arguments`` have such options and there is no config.
    """
    from deepseek_jax.cli.summary import find_config

    given = [word for word in arguments if word.startswith(PREFIX)]
    try:
        cfg = find_config(model)
    except (ValueError, OSError):
        # The command itself says what is wrong, unless its parser would know none of these options.
        if given:
            raise
        return None
    rope = cfg.attention.rope
    if rope.yarn is None and any(word.startswith(f"{PREFIX}attention.rope.yarn.") for word in given):
        rope = replace(rope, yarn=Yarn(1.0, cfg.max_length))
    return replace(cfg, attention=replace(cfg.attention, rope=rope))


def changed_fields(cfg: ModelConfig | None, base: ModelConfig) -> dict:
    """The fields in which ``cfg`` differs from ``base``, whole: for `dataclasses.replace`."""
    if cfg is None:
        return {}
    values = {f.name: getattr(cfg, f.name) for f in fields(ModelConfig)}
    return {name: value for name, value in values.items() if value != getattr(base, name)}
