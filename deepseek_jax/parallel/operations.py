"""What a model asks of its devices (`core.ops`), on a mesh.

What is left to the compiler here, by constraints, it does well; the rest is written out with its collectives.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import jax
from flax import nnx
from jax.sharding import PartitionSpec

from deepseek_jax.core.context import Context
from deepseek_jax.core.layout import BATCH, SEQUENCE, Axes, parts, spec
from deepseek_jax.core.lowrank import held
from deepseek_jax.core.ops import Operations, counted
from deepseek_jax.core.params import is_variable, map_variables
from deepseek_jax.core.quant import Quantized
from deepseek_jax.parallel import sequence
from deepseek_jax.parallel.collectives import gathered, to_rest
from deepseek_jax.parallel.embedding import lookup
from deepseek_jax.parallel.expert import dispatch, rests_in_use
from deepseek_jax.parallel.linear import product_at_rest
from deepseek_jax.parallel.quantized import product_of_parts
from deepseek_jax.parallel.shardings import activation_sharding, parameter_sharding, quantized_shardings, shardings

Tree = TypeVar("Tree")


@dataclass(frozen=True)
class MeshOperations(Operations):
    """On the mesh of a context. All but `top_k`, `count` and `fence` raise LayoutError where a size does not divide."""

    ctx: Context

    @property
    def splits_rows(self) -> bool:
        return sequence.sequence_parts(self.ctx) * self.ctx.folded > 1

    def product(self, equation: str, x: jax.Array, w, precision=None) -> jax.Array:
        if isinstance(w, nnx.Variable) and isinstance(w.get_value(), jax.Array):
            return product_at_rest(x, w.get_value(), equation, w.get_metadata()["axes"], self.ctx, precision)
        if self.apart(w):
            y = product_of_parts(x, w.get_value(), equation, w.get_metadata()["axes"], self.ctx, precision)
            if y is not None:
                return y
        return super().product(equation, x, self._in_use(w, x.dtype), precision)

    def apart(self, w) -> bool:
        return isinstance(w, nnx.Variable) and isinstance(w.get_value(), Quantized)

    def product_of_columns(self, equation: str, x: jax.Array, w, start: int, stop: int) -> jax.Array:
        if self.apart(w):
            axes = w.get_metadata()["axes"]
            y = product_of_parts(x, w.get_value(), equation, axes, self.ctx, columns=(start, stop))
            if y is not None:
                return y
        return super().product_of_columns(equation, x, w, start, stop)

    def lookup(self, table_VD, tokens_BT: jax.Array, dtype) -> jax.Array:
        return lookup(table_VD, tokens_BT, dtype, self.ctx)

    def weight(self, w, dtype) -> jax.Array:
        return super().weight(self._in_use(w, dtype), dtype)

    def _in_use(self, tree: Tree, dtype) -> Tree:
        """Parameters as in use, by constraints alone; matrices in ``dtype``.

        For weights that are not trained as they are: quantised ones, those with adapters, and decoding's.
        """

        def whole(path, variable):
            if not is_variable(variable):
                return variable
            value, axes = variable.get_value(), variable.get_metadata().get("axes")
            if axes is None or len(axes) < 2:
                return variable
            use = parameter_sharding(axes, value.shape, self.ctx, in_use=True)
            if isinstance(value, Quantized):
                use = quantized_shardings(value, use, "a quantised parameter")
                return variable.replace(jax.tree.map(jax.lax.with_sharding_constraint, value, use))
            # Cast first: a gather moves the bytes of the compute dtype.
            return variable.replace(jax.lax.with_sharding_constraint(value.astype(dtype), use))

        return map_variables(whole, tree)

    def experts(self, experts, x_BTD, index_BTK, weight_BTK, gate_up, down) -> tuple[jax.Array, jax.Array]:
        # The dispatcher gathers arrays itself, and takes quantised weights that rest as they are used; others are
        # rebuilt here.
        weights = [held(w) for w in (gate_up, down)]
        if not all(isinstance(w, jax.Array) or rests_in_use(w, self.ctx) for w in weights):
            weights = [self.weight(w, x_BTD.dtype) for w in (gate_up, down)]
        return dispatch(experts, x_BTD, index_BTK, weight_BTK, *weights, self.ctx)

    def nats(self, compute: Callable, hidden_BTD, head, target_BT, axes: Axes):
        rest, use = (parameter_sharding(axes, head.shape, self.ctx, in_use).spec for in_use in (False, True))
        token = spec((BATCH, SEQUENCE), target_BT.shape, self.ctx.layout.use, self.ctx.mesh, "a batch")
        over = tuple(axis for mine in parts(token) for axis in mine)
        local = partial(
            compute,
            vocabulary=parts(use)[axes.index("vocab")],
            over=over,
            in_use=partial(gathered, rest=rest, use=use, dtype=hidden_BTD.dtype),
            at_rest=partial(to_rest, use=use, rest=rest, over=over),
        )
        state = PartitionSpec(*token, None)
        out = (PartitionSpec(), state, rest) if compute.keywords["gradients"] else PartitionSpec()
        run = jax.shard_map(local, mesh=self.ctx.mesh, in_specs=(state, rest, token), out_specs=out, check_vma=False)
        return run(hidden_BTD, head, target_BT)

    def rows(self, attend: Callable, queries: Sequence[jax.Array], keys: Sequence[jax.Array], tokens, ctx) -> jax.Array:
        if sequence.sequence_parts(self.ctx) == 1:
            return super().rows(attend, queries, keys, tokens, ctx)
        return sequence.attend_rows(attend, queries, keys, tokens, ctx)

    def attend(self, attend: Callable, q_BT, k_BS, v_BS, tokens) -> jax.Array:
        if not (self.ctx.balanced and self.ctx.folded > 1):
            return super().attend(attend, q_BT, k_BS, v_BS, tokens)
        return sequence.attend_halves(attend, q_BT, k_BS, v_BS, tokens, self.ctx.folded)

    def heads(self, kernel: Callable, q_BTNK, k_BTGK, v_BTGV, segment_BT) -> jax.Array:
        heads = (BATCH, None, "heads", None)
        axes = (heads, *((heads if k_BTGK.shape[2] > 1 else (BATCH, None, None, None)),) * 2, (BATCH, None))
        arrays = [q_BTNK, k_BTGK, v_BTGV, segment_BT]
        specs = [
            PartitionSpec() if a is None else activation_sharding(names, a.shape, self.ctx).spec
            for names, a in zip(axes, arrays, strict=True)
        ]
        run = jax.shard_map(kernel, mesh=self.ctx.mesh, in_specs=tuple(specs), out_specs=specs[0], check_vma=False)
        return run(*arrays)

    def top_k(self, x_BT: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
        """Each device takes its own: left to the compiler, x would be gathered from all devices for it."""
        split = self._tokens(x_BT)
        take = lambda x: tuple(jax.lax.top_k(x, k))  # noqa: E731
        return jax.shard_map(take, mesh=self.ctx.mesh, in_specs=split, out_specs=(split, split), check_vma=False)(x_BT)

    def count(self, index_BTK: jax.Array, size: int) -> jax.Array:
        """Each device counts its own: left to the compiler, the numbers would be gathered from all devices for it."""
        split = self._tokens(index_BTK)
        over = tuple(axis for mine in parts(split)[:2] for axis in mine)
        count = lambda index: jax.lax.psum(counted(index, size), over)  # noqa: E731
        run = jax.shard_map(count, mesh=self.ctx.mesh, in_specs=split, out_specs=PartitionSpec(), check_vma=False)
        return run(index_BTK)

    def _tokens(self, x_BT: jax.Array) -> PartitionSpec:
        return activation_sharding((BATCH, SEQUENCE, *(None,) * (x_BT.ndim - 2)), x_BT.shape, self.ctx).spec

    def row_order(self, length: int, ctx):
        shared = sequence.sequence_parts(self.ctx)
        if shared == 1:
            return None, ctx
        return sequence.balanced_order(length, shared), replace(ctx, balanced=True)

    def constrain(self, x: jax.Array, axes: Axes) -> jax.Array:
        return sequence.constrain(x, axes, self.ctx)

    def fence(self, tree: Tree) -> Tree:
        """Else a compiler that looks for what may overlap keeps a large layer's activations for the gradients of its
        weights while it goes on with the backward pass of others."""
        return jax.lax.optimization_barrier(tree)

    def zeros(self, shape: tuple[int, ...], dtype, axes: Axes) -> jax.Array:
        return jax.numpy.zeros(shape, dtype, device=activation_sharding(axes, shape, self.ctx))

    def made(self, make: Callable[..., Tree], *arguments) -> Tree:
        """Every device makes its own shards."""
        places = shardings(jax.eval_shape(make, *arguments), self.ctx)
        return jax.jit(make, out_shardings=places)(*arguments)
