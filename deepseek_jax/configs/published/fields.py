"""The fields of a published config.json: their names, and typed access that speaks in the file's own words."""

import difflib
import re
import sys
from collections.abc import Collection
from typing import Any

from deepseek_jax.configs.checks import ConfigError
from deepseek_jax.notes import LONGEST, note, shown

# Our field -> that of the file; no name of ours stands for two fields.
MODEL = {
    "vocab_size": "vocab_size",
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "ffn_dim": "intermediate_size",
    "norm_eps": "rms_norm_eps",
    "max_length": "max_position_embeddings",
    "tie_embeddings": "tie_word_embeddings",
    "init_std": "initializer_range",
    "model_type": "model_type",
    "bos_id": "bos_token_id",
    "eos_ids": "eos_token_id",
}
# Of models with experts, and with MTP modules.
DEPTHS = {"n_dense_layers": "first_k_dense_replace", "mtp_depth": "num_nextn_predict_layers"}
MLA = {
    "n_heads": "num_attention_heads",
    "q_rank": "q_lora_rank",
    "kv_rank": "kv_lora_rank",
    "nope_dim": "qk_nope_head_dim",
    "rope_dim": "qk_rope_head_dim",
    "v_dim": "v_head_dim",
}
INDEXER = {"index_heads": "index_n_heads", "index_dim": "index_head_dim", "index_top_k": "index_topk"}
GQA = {"n_heads": "num_attention_heads", "n_kv_heads": "num_key_value_heads", "head_dim": "head_dim"}
MOE = {
    "n_experts": "n_routed_experts",
    "n_shared": "n_shared_experts",
    "top_k": "num_experts_per_tok",
    "expert_dim": "moe_intermediate_size",
    "n_groups": "n_group",
    "top_groups": "topk_group",
    "normalize": "norm_topk_prob",
    "scale": "routed_scaling_factor",
    "score": "scoring_func",
    "group_score": "topk_method",
}
# Of V4's attention, experts and residual.
COMPRESSED = {
    "n_heads": "num_attention_heads",
    "head_dim": "head_dim",
    "rope_dim": "qk_rope_head_dim",
    "q_rank": "q_lora_rank",
    "o_groups": "o_groups",
    "o_rank": "o_lora_rank",
    "window": "sliding_window",
    "ratios": "compress_ratios",
}
HASHED = {"n_hash": "num_hash_layers", "limit": "swiglu_limit"}
STREAMS = {"n_streams": "hc_mult", "sinkhorn_steps": "hc_sinkhorn_iters", "eps": "hc_eps"}
# Ours: no release has the baseline. Only false is written.
UNCONSTRAINED = "hc_constrained"
ROPE = {"theta": "rope_theta", "interleaved": "rope_interleave"}
YARN = {
    "factor": "factor",
    "original_length": "original_max_position_embeddings",
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
    "mscale": "mscale",
    "mscale_all_dim": "mscale_all_dim",
}
LLAMA3 = {
    "factor": "factor",
    "original_length": "original_max_position_embeddings",
    "low_turns": "low_freq_factor",
    "high_turns": "high_freq_factor",
}
NAMES = MODEL | DEPTHS | MLA | INDEXER | GQA | MOE | COMPRESSED | HASHED | STREAMS | ROPE | YARN | LLAMA3
# Another spelling of the same, that of transformers 5.
ALIASES = {"num_nextn_predict_layers": "num_mtp_layers", "n_routed_experts": "num_local_experts"}
ROPE_FIELDS = ("rope_theta", "rope_scaling", "rope_parameters")
# Fields that follow from others; a file in which they do not is refused.
FOLLOWING = ("num_key_value_heads", "qk_head_dim", "layer_types", "mlp_layer_types", "partial_rotary_factor")
# What stands in released files, or is written by transformers 4 and 5, and changes neither a tensor nor a number of the
# forward pass: it is neither used nor spoken of. Of training, running and the file itself; of every model of
# transformers; of generation, which older ones wrote here.
_IDLE = """
architectures auto_map torch_dtype dtype transformers_version _name_or_path name_or_path _commit_hash
quantization_config expert_dtype deepseek_jax_version unsloth_version unsloth_fixed ep_size pretraining_tp seq_aux
aux_loss_alpha router_aux_loss_coef router_jitter_noise output_router_logits use_cache attention_dropout
hidden_dropout head_dim return_dict use_return_dict output_hidden_states output_attentions _output_attentions
torchscript use_bfloat16 tf_legacy_loss pruned_heads chunk_size_feed_forward is_encoder_decoder is_decoder
cross_attention_hidden_size add_cross_attention tie_encoder_decoder per_layer_config finetuning_task id2label
label2id num_labels problem_type tokenizer_class prefix pad_token_id sep_token_id decoder_start_token_id
task_specific_params _attn_implementation attn_implementation _attn_implementation_autoset
_attn_implementation_internal _experts_implementation experts_implementation _experts_implementation_internal
bad_words_ids begin_suppress_tokens suppress_tokens diversity_penalty do_sample early_stopping
encoder_no_repeat_ngram_size exponential_decay_length_penalty forced_bos_token_id forced_eos_token_id
length_penalty max_length min_length max_new_tokens no_repeat_ngram_size num_beam_groups num_beams
num_return_sequences output_scores remove_invalid_values repetition_penalty return_dict_in_generate
temperature top_k top_p typical_p
"""
IDLE = frozenset(_IDLE.split())
# What every tradition reads.
COMMON = {*MODEL.values(), *ROPE_FIELDS}
# Axes are counted in 32 bits. Layers and experts are laid out one by one, so that far fewer exhaust the memory.
MOST = 2**31 - 1
MOST_LAID_OUT = 10_000
MOST_MTP = 100
# So many unknown fields are named in one line.
NAMED = 10


class Fields:
    """Typed access to a JSON object; every refusal names the field and its value.

    ``taken``: the defaults that were taken for fields that are not there.
    """

    def __init__(self, data: dict, where: str = "config.json"):
        if not isinstance(data, dict):
            raise ConfigError(f"{where} must be a JSON object, not {type(data).__name__} ({shown(data)}).")
        self.data, self.where = data, where
        self.taken: dict[str, Any] = {}

    def value(self, name: str, *default) -> Any:
        """The field's value under either spelling; without a default a missing field is an error."""
        alias = ALIASES.get(name)
        if alias in self.data and name in self.data and self.data[alias] != self.data[name]:
            raise ConfigError(
                f"{self.where} contradicts itself: {name} is {shown(self.data[name])}, {alias} "
                f"{shown(self.data[alias])}."
            )
        for spelling in (name, alias):
            if spelling in self.data:
                return self.data[spelling]
        if not default:
            raise ConfigError(f"{self.where} lacks {name}, which the shapes of the tensors depend on.")
        self.taken[name] = default[0]
        return default[0]

    def _typed(self, name: str, kinds: tuple[type, ...], kind: str, default):
        value = self.value(name, *default)
        if value is None and default and default[0] is None:
            return None
        # In Python a bool is an int.
        if not isinstance(value, kinds) or isinstance(value, bool) != (bool in kinds):
            raise ConfigError(f"{self.where}: {name} must be {kind}, not {shown(value)}.")
        return value

    def integer(self, name: str, *default, most: int = MOST) -> Any:
        value = self._typed(name, (int,), "an integer", default)
        if value is not None and value > most:
            raise ConfigError(f"{self.where}: {name} must be at most {most}; a larger one is not built.")
        return value

    def number(self, name: str, *default) -> Any:
        value = self._typed(name, (int, float), "a number", default)
        # An integer of JSON has any length, a float of Python's JSON may be NaN or Infinity.
        if value is not None and not abs(value) <= sys.float_info.max:
            raise ConfigError(f"{self.where}: {name} must be a finite number, not {shown(value)}.")
        return value if value is None else float(value)

    def contradiction(self, what: str) -> ConfigError:
        return ConfigError(f"{self.where} contradicts itself: {what}.")

    def flag(self, name: str, *default) -> Any:
        return self._typed(name, (bool,), "true or false", default)

    def make(self, kind: type, **values) -> Any:
        """A config of the values. What it refuses in our names is refused in the file's, and where a default had a part
        in it, the default is named."""
        try:
            return kind(**values)
        except ConfigError as error:
            text, used = str(error), []

            def file_name(word: re.Match) -> str:
                used.append(NAMES[word[0]])
                return used[-1]

            text = re.sub(rf"\b({'|'.join(NAMES)})\b", file_name, text)
            for name in dict.fromkeys(used):
                if name in self.taken:
                    text += f" The file lacks {name}: {shown(self.taken[name])} was taken, as transformers does."
            raise ConfigError(f"{self.where}: {text}") from None

    def note_unknown(self, known: Collection[str], idle: Collection[str]) -> None:
        """Says in one line which fields nothing reads; ``idle`` ones need not be read."""
        unknown = [name for name in self.data if name not in known and name not in idle]
        if not unknown:
            return
        said = []
        for name in unknown[:NAMED]:
            near = difflib.get_close_matches(name[:100], known, 1, 0.8)
            said.append(
                (name if name.isidentifier() and len(name) < LONGEST else shown(name))
                + (f" (did you mean {near[0]}?)" if near else "")
            )
        if len(unknown) > NAMED:
            said.append(f"and {len(unknown) - NAMED} more")
        note(f"{self.where}: nothing here reads {', '.join(said)}; ignored.")
