"""The public `Context`: a mesh, a layout by name, and what the model asks of them."""

from dataclasses import dataclass

from deepseek_jax.configs.checks import check_types
from deepseek_jax.core import context
from deepseek_jax.core.ops import ONE_DEVICE, Operations
from deepseek_jax.parallel.operations import MeshOperations
from deepseek_jax.parallel.rounds import expert_parts
from deepseek_jax.parallel.rules import find_layout
from deepseek_jax.parallel.sequence import whole_rows


@dataclass(frozen=True)
class Context(context.Context):
    __doc__ = context.Context.__doc__

    def __post_init__(self):
        check_types(self, ValueError)
        if self.mesh is not None:
            object.__setattr__(self, "layout", find_layout(self.layout, self.mesh))
            if self.experts == "auto" and self.platform in ("cpu", "tpu"):
                object.__setattr__(self, "experts", "blocks" if self.platform == "cpu" else "ragged")
        super().__post_init__()
        if self.mesh is not None and self.experts == "dense" and expert_parts(self) > 1:
            raise ValueError('Context(experts="dense"): the oracle needs all experts on a device; choose another form.')
        for name in self.native:
            if self.platform not in (None, "cpu"):
                raise ValueError(
                    f'Context({name}="native"): it is for CPUs, and the mesh is of {self.platform}; choose "auto".'
                )

    @property
    def ops(self) -> Operations:
        return ONE_DEVICE if self.mesh is None else MeshOperations(self)

    def whole_rows(self) -> "Context":
        return whole_rows(self)
