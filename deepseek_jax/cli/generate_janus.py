"""``deepseek-jax generate`` of a Janus: prompts about pictures. Loads no JAX before it is asked to."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from deepseek_jax.cli.generate import Generate


def begin(command: "Generate", tokenizer, texts: list[str], ctx, settings: dict):
    """The prompts' ids, and the generation. A text is a user's message, in DeepSeek's format of a conversation.

    Raises ValueError for settings that a Janus does not have.
    """
    for option, given in (("--use-mtp", command.use_mtp), ("--adapter", command.adapter), ("--chat", command.chat)):
        if given:
            why = "it takes every prompt as a message anyway" if option == "--chat" else "a Janus has none here"
            raise ValueError(f"{option}: {command.ckpt} holds a Janus; {why}. Leave it out.")
    from deepseek_jax.multimodal.checkpoint import load_pretrained, read_config
    from deepseek_jax.multimodal.pictures import read_picture, shown
    from deepseek_jax.multimodal.prompts import PromptWriter
    from deepseek_jax.multimodal.understand import stream

    cfg = read_config(command.ckpt)
    images = [shown(read_picture(file), cfg.vision.image_size) for file in command.image]
    if command.prompt_ids:
        prompts = [list(command.prompt_ids)]
    else:
        writer = PromptWriter(tokenizer, cfg)
        prompts = [writer.about_pictures(text, len(images)) for text in texts]
    model = load_pretrained(command.ckpt, None if command.dtype == "stored" else command.dtype, ctx)
    settings = {name: value for name, value in settings.items() if name != "use_mtp"}
    return prompts, stream(model, prompts, [images] * len(prompts), ctx=ctx, **settings)
