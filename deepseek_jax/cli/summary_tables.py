"""The tables of ``deepseek-jax summary``, made for 80 columns."""

from functools import singledispatch

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from deepseek_jax.analysis.counts import Counts, counts
from deepseek_jax.analysis.forms import parameters
from deepseek_jax.analysis.published.costs import COSTS, Cost
from deepseek_jax.analysis.published.figure import CONTEXT, Figure, outcome
from deepseek_jax.analysis.published.table import of_release, release_of
from deepseek_jax.cli.tables import Output, show
from deepseek_jax.configs.schema import GQA, MLA, Compressed, ModelConfig


def print_summary(cfg: ModelConfig, c: Counts, console: Console | None = None) -> None:
    """Prints every table of a model to ``console`` (default: standard output)."""
    console = console or Output(highlight=False)
    tables = [_parameters(cfg, c), _mtp(cfg, c) if cfg.mtp_depth else None, _cache(cfg, c), _flops(c)]
    release = release_of(cfg)
    if figures := of_release(release):
        tables.append(published_table(figures))
    if release in COSTS:
        # Published FLOPs hold at one length, whatever length the other tables are for.
        tables.append(_cost(counts(cfg, CONTEXT), COSTS[release]))
    console.print(Text(_title(cfg), style="bold"))
    for table in filter(None, tables):
        console.print()
        show(console, table)


def _title(cfg: ModelConfig) -> str:
    parts = [f"{cfg.name}: {cfg.n_layers} layers of width {cfg.dim}", heads(cfg.attention)]
    if cfg.moe is not None:
        parts.append(f"{cfg.moe.n_shared} shared + {cfg.moe.n_experts} routed experts, top {cfg.moe.top_k}")
    return "; ".join(parts)


@singledispatch
def heads(a) -> str:
    """A form of attention in a few words."""
    raise TypeError(f"there are no words for {type(a).__name__}.")


@heads.register
def _(a: MLA) -> str:
    queries = "no query compression" if a.q_rank is None else f"query rank {a.q_rank}"
    chosen = ""
    if a.indexer is not None:
        indexer = a.indexer
        chosen = f", {indexer.index_top_k} keys chosen by {indexer.index_heads} heads of {indexer.index_dim}"
    return f"{a.n_heads} heads, latent {a.kv_rank} + {a.rope_dim}, {queries}{chosen}"


@heads.register
def _(a: GQA) -> str:
    kind = "multi-head" if a.n_kv_heads == a.n_heads else f"{a.n_kv_heads} key heads"
    return f"{a.n_heads} heads of {a.head_dim}, {kind}{', with biases' if a.bias else ''}"


@heads.register
def _(a: Compressed) -> str:
    chosen = a.indexer
    kinds = ", ".join(f"{sum(ratio == m for ratio in a.ratios)} x {m or 'none'}" for m in dict.fromkeys(a.ratios))
    return (
        f"{a.n_heads} heads of {a.head_dim} on one key, query rank {a.q_rank}, {a.window} recent tokens; entries of so "
        f"many tokens: {kinds}; {chosen.index_top_k} of the {a.sparse_ratio}s chosen by {chosen.index_heads} heads of "
        f"{chosen.index_dim}"
    )


def new_table(title: str, *columns: tuple[str, str]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for name, justify in columns:
        table.add_column(name, justify=justify, no_wrap=justify == "right")
    return table


def _parameters(cfg: ModelConfig, c: Counts) -> Table:
    table = new_table("Parameters", ("component", "left"), ("made of", "left"), ("count", "right"))
    made_of = {
        "embedding": f"{cfg.vocab_size:,} x {cfg.dim:,}",
        "attention": f"{cfg.n_layers} x {c.attention_per_layer:,}",
        "dense_ffn": f"{cfg.n_dense_layers} x {3 * cfg.dim * cfg.ffn_dim:,}",
        "norms": f"{2 * cfg.n_layers + 1} x {cfg.dim:,}",
        "head": "tied to the embedding" if cfg.tie_embeddings else f"{cfg.dim:,} x {cfg.vocab_size:,}",
    }
    if c.components["attention"] != cfg.n_layers * c.attention_per_layer:
        made_of["attention"] = f"{cfg.n_layers} layers, up to {c.attention_per_layer:,}"
    if cfg.moe is not None:
        made_of["routed_experts"] = f"{cfg.n_moe_layers} x {cfg.moe.n_experts} x {c.expert:,}"
        shared = 3 * cfg.dim * cfg.moe.shared_width // max(1, cfg.moe.n_shared)
        made_of["shared_experts"] = f"{cfg.n_moe_layers} x {cfg.moe.n_shared} x {shared:,}"
        made_of["router"] = f"{cfg.n_moe_layers} x {cfg.moe.n_experts} x {cfg.dim:,}"
    if cfg.residual is not None:
        sublayer = parameters(cfg.residual, cfg.dim)
        made_of["hyper_connections"] = f"{2 * cfg.n_layers} x {sublayer:,}, and what collapses"
    for name, count in c.components.items():
        if count or name == "head":
            table.add_row(name.replace("_", " "), made_of[name], f"{count:,}")
    table.add_section()
    table.add_row("total", "without router biases and MTP", f"{c.total:,}", style="bold")
    table.add_row("activated", "by one token, input embedding left out", f"{c.activated_no_embedding:,}")
    table.add_row("activated", "input embedding and head included", f"{c.activated:,}")
    if c.router_bias:
        routers = c.router_bias // cfg.moe.n_experts
        table.add_row("router biases", f"{routers} x {cfg.moe.n_experts}, state", f"{c.router_bias:,}")
    if c.hash_tables:
        table.add_row(
            "hash tables", f"{cfg.moe.n_hash} x {cfg.vocab_size:,} x {cfg.moe.top_k}, state", f"{c.hash_tables:,}"
        )
    return table


def _mtp(cfg: ModelConfig, c: Counts) -> Table:
    table = new_table(f"MTP, depth {cfg.mtp_depth}", ("component", "left"), ("made of", "left"), ("count", "right"))
    projection = c.mtp_components["projection"]
    table.add_row("layer", "attention, experts, router, norms", f"{c.mtp - projection:,}")
    table.add_row("projection", f"{2 * cfg.dim:,} x {cfg.dim:,}", f"{projection:,}")
    table.add_section()
    table.add_row("total", "embedding and head are the model's own", f"{c.mtp:,}", style="bold")
    copies = "with its copies of embedding and head" if c.mtp_stored > c.mtp else "without copies of them"
    table.add_row("as stored", copies, f"{c.mtp_stored:,}")
    table.add_row("router biases", "state", f"{c.mtp_router_bias:,}")
    table.add_row("whole checkpoint", "all weights and biases, no FP8 scales", f"{c.stored:,}")
    return table


def _form(a) -> str:
    if isinstance(a, Compressed):
        return "recent tokens and entries"
    return "MLA" if isinstance(a, MLA) else f"GQA, {a.n_kv_heads} key heads"


def _cache(cfg: ModelConfig, c: Counts) -> Table:
    table = new_table(
        "Cache, bfloat16",
        ("attention", "left"),
        ("bytes a token", "right"),
        (f"{c.context:,} tokens", "right"),
        ("to this", "right"),
    )
    form = _form(cfg.attention)
    rows = [
        (f"{form} ({c.kv_values_per_token_layer} values a token and layer)", c.kv_bytes_per_token),
        ("GQA, 8 key heads", c.kv_bytes_per_token_gqa8),
        (f"MHA, {cfg.attention.n_heads} key heads", c.kv_bytes_per_token_mha),
    ]
    for name, size in rows:
        whole = c.kv_bytes if size == c.kv_bytes_per_token else size * c.context
        table.add_row(name, f"{size:,}", f"{whole / 2**20:,.1f} MiB", f"{size / c.kv_bytes_per_token:.2f}x")
    if c.kv_bytes_per_token_mtp:
        extra = c.kv_bytes_per_token_mtp
        mebibytes = f"{extra * c.context / 2**20:,.1f} MiB"
        table.add_row("more for MTP drafts", f"{extra:,}", mebibytes, f"{extra / c.kv_bytes_per_token:.2f}x")
    return table


def _flops(c: Counts) -> Table:
    table = new_table(
        f"GFLOPs a token at {c.context:,} tokens", ("what", "left"), ("formula", "left"), ("GFLOPs", "right")
    )
    for name, formula, value in (
        ("training", "6 N + causal attention", c.flops_per_token),
        ("training, MTP too", "the same for the MTP modules", c.flops_per_token + c.flops_per_token_mtp),
        ("prefill", "a third of training", c.forward_flops_per_token),
        ("decode", "2 N + attention over the cache (MLA: absorbed)", c.decode_flops_per_token),
    ):
        if name != "training, MTP too" or c.flops_per_token_mtp:
            table.add_row(name, formula, _giga(value))
    table.caption = "N: activated parameters, input embedding left out"
    table.caption_justify = "left"
    return table


def _giga(value: int) -> str:
    return f"{value / 1e9:,.2f}" if value >= 1e9 else f"{value / 1e9:.6f}"


def published_table(figures: tuple[Figure, ...]) -> Table:
    table = new_table("Beside what is published", ("figure", "left"), ("ours", "right"), ("published", "right"))
    table.add_column("source")
    for figure in figures:
        table.add_row(figure.name, outcome(figure).text, figure.published_text, figure.source)
    return table


def _cost(c: Counts, cost: Cost) -> Table:
    table = new_table(
        f"Training, as published: {cost.n_gpus:,} {cost.gpu}, {cost.tokens / 1e12:.1f}T tokens",
        ("stage", "left"),
        (f"{cost.gpu} hours", "right"),
        (f"at ${cost.price} an hour", "right"),
        ("source", "left"),
    )
    for stage in cost.stages:
        table.add_row(stage.name, f"{stage.gpu_hours:,}", f"${stage.gpu_hours * cost.price:,}", cost.source)
    table.add_section()
    table.add_row("total", f"{cost.gpu_hours:,}", f"${cost.dollars:,}", cost.source, style="bold")
    rate, share = cost.flops_per_second(c.flops_per_token), cost.utilization(c.flops_per_token)
    table.caption = (
        f"Research and ablations before it are not included. Pre-training took {cost.days:.1f} days; "
        f"at {_giga(c.flops_per_token)} GFLOPs a token each GPU did {rate / 1e12:.1f} TFLOPs a second, "
        f"{share:.1%} of {cost.peak_flops / 1e12:.0f} (2505.09343, table 4, measured 38.94%)."
    )
    table.caption_justify = "left"
    return table
