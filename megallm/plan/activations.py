"""What a micro-batch keeps between its forward and its backward pass, operator by operator. Needs no torch.

Each table below has a line for each operator that keeps something, in the order of the code it describes: `_layer` of
`model/block.py`, `_attention` of `layers/attention.py`, `_embedding` of `model/embedding.py`, `_output` of
`model/gpt.py`, `_bert_heads` of `model/bert.py`. An operator that keeps other tensors than before (a fused kernel, a
norm that saves its output, a new mask) changes its line and nothing else. tests/distributed/test_activation_formula.py
counts what autograd really keeps, storage by storage, and holds the sums to it byte for byte, over random
configurations on a CPU.

Counted are the storages that autograd saves, the stage's input among them, each once; not parameters, tables and the
micro-batch itself, which are there anyway. What `--ops` leaves to plain torch keeps more, as a composition of torch's
operators does: each mask, and most results on the way. Without a word there the native operators are assumed; who knows
what a device runs says so with `--ops` (`operators_in_use` of `ops/library.py`). The norms of torch and apex count as
the native ones, which on a GPU they are like; on a CPU torch's RMSNorm keeps more.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from megallm.config.operators import OperatorChoices, parse_choices
from megallm.config.resolve import (
    GATED_ACTIVATIONS,
    attention_window,
    kv_channels,
    loss_chunk_size,
    num_query_groups,
    num_token_types,
    rotary_width,
)
from megallm.config.tree import Config
from megallm.plan.parameters import padded_vocabulary


@dataclass(frozen=True)
class Sizes:
    """Sizes on one process, of a resolved configuration."""

    config: Config
    on_gpu: bool = True

    @property
    def tensor_size(self) -> int:
        return self.config.parallel.tensor_model_parallel_size

    @property
    def element(self) -> int:
        """Bytes of a weight or an activation."""
        training = self.config.training
        return 8 if training.fp64 else 2 if training.bf16 or training.fp16 else 4

    @property
    def wide(self) -> int:
        """Bytes of a number that 16 bits would be too few for."""
        return max(4, self.element)

    @property
    def sequence(self) -> int:
        return self.config.data.seq_length

    @property
    def batch(self) -> int:
        return self.config.training.micro_batch_size

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch, as between the matrices of a tensor parallel pair."""
        return self.sequence * self.batch

    @property
    def local_tokens(self) -> int:
        """Tokens of a micro-batch as norms and the residual stream see them."""
        return self.tokens // (self.tensor_size if self.config.parallel.sequence_parallel else 1)

    @property
    def hidden(self) -> int:
        """Bytes of hidden states between the layers: also those of a message between stages."""
        return self.local_tokens * self.config.model.hidden_size * self.element

    def recomputes(self, module: str) -> bool:
        """Whether a module of each layer is computed again in the backward pass."""
        training = self.config.training
        return training.recompute_granularity == "selective" and module in training.recompute_modules

    @cached_property
    def _operators(self) -> OperatorChoices:
        return parse_choices(self.config.training.ops)

    def is_plain(self, operator: str) -> bool:
        """Whether an operator is a composition of torch's."""
        return self._operators.of(operator) == "reference"

    @property
    def ffn(self) -> int:
        """Bytes of one of the MLP's inner vectors for all tokens."""
        width = self.config.model.ffn_hidden_size
        assert width is not None, "the configuration is resolved"
        return self.tokens * width // self.tensor_size * self.element

    @property
    def heads(self) -> int:
        return self.config.model.num_attention_heads // self.tensor_size

    @property
    def groups_divide(self) -> bool:
        return num_query_groups(self.config.model) % self.tensor_size == 0

    @property
    def groups(self) -> int:
        """Key/value heads, as attention gets them: where they do not come out even, one for each query head."""
        return num_query_groups(self.config.model) // self.tensor_size if self.groups_divide else self.heads

    @property
    def is_bert(self) -> bool:
        return self.config.model.architecture == "bert"

    @property
    def mask(self) -> int:
        """Elements of the mask of attention, where it is not plainly causal."""
        if self.is_bert:
            return self.batch * self.sequence**2
        window = attention_window(self.config.model)
        if self.config.data.reset_attention_mask:
            return self.batch * self.sequence**2
        return self.sequence**2 if window is not None and window < self.sequence - 1 else 0

    @property
    def logits(self) -> int:
        """Bytes of the logits of a micro-batch."""
        return self.tokens * padded_vocabulary(self.config) // self.tensor_size * self.element

    @property
    def kept_logits(self) -> int:
        """Bytes of the logits that a micro-batch keeps: all, or none where they are made in chunks of tokens."""
        return self.logits if loss_chunk_size(self.config) is None else 0

    @property
    def chunk_of_logits(self) -> int:
        """Bytes of the logits that exist at once where a micro-batch keeps none, else 0."""
        chunk = loss_chunk_size(self.config)
        return 0 if chunk is None else self.logits // self.tokens * chunk


def saved_by_stage(sizes: Sizes, num_layers: int, *, is_first: bool, is_last: bool) -> int:
    """Bytes that a stage keeps of one micro-batch until its backward pass has begun."""
    runs, kept_whole = recomputed_runs(sizes, num_layers)
    total = len(runs) * sizes.hidden + kept_whole * sum(layer(sizes).values())
    total += sum(_shared(sizes, kept_whole, is_first=is_first).values())
    total += sum(_embedding(sizes).values()) if is_first else 0
    return total + (sum(_output(sizes).values()) if is_last else 0)


def recomputed_runs(sizes: Sizes, num_layers: int) -> tuple[list[int], int]:
    """Lengths of the runs of layers of which only the input is kept, and the number of layers that are kept as they
    are. (The runs of `model/stack.py`.)"""
    training = sizes.config.training
    length = training.recompute_num_layers
    if training.recompute_granularity != "full":
        return [], num_layers
    if training.recompute_method == "block":
        again = min(length, num_layers)
        return [1] * again, num_layers - again
    return [min(length, num_layers - begin) for begin in range(0, num_layers, length)], 0


def keeps_input(sizes: Sizes, num_layers: int) -> bool:
    """Whether what a stage keeps has in it the hidden states that it got."""
    return bool(recomputed_runs(sizes, num_layers)[0]) or _norm_keeps_input(sizes)


def layer(sizes: Sizes) -> dict[str, int]:
    """Bytes by operator of a layer that is not recomputed as a whole."""
    in_mlp = 0 if sizes.recomputes("mlp") else _activation_vectors(sizes) * sizes.ffn
    norm = _norm(sizes, sizes.local_tokens, sizes.config.model.hidden_size)
    # The input of a layer whose norms both read it is kept once.
    twice = sizes.hidden if sizes.config.model.parallel_residual and _norm_keeps_input(sizes) else 0
    return {
        "attention norm": norm,
        "query, key and value": sizes.hidden,
        **_attention(sizes),
        "attention's dropout": _hidden_dropout(sizes),
        "MLP norm": norm - twice,
        "up": sizes.hidden,
        "activation and down": in_mlp,
        "MLP's dropout": _hidden_dropout(sizes),
    }


def _activation_vectors(sizes: Sizes) -> int:
    """Vectors as wide as the MLP: gate and up, or up alone, and the result, which goes into the product that follows.
    In plain torch also the activated gate; and ReLU keeps its result alone.
    """
    activation = sizes.config.model.activation
    plain = sizes.is_plain(activation)
    if activation in GATED_ACTIVATIONS:
        return 4 if plain else 3
    return 1 if plain and activation == "relu" else 2


def _norm(sizes: Sizes, rows: int, width: int) -> int:
    """Of a norm: its input; for each row one number (RMSNorm) or two (LayerNorm); the sum of weight and 1 where the
    weight is what is added to 1.

    In plain torch input and weights in the dtype it computes in, where that is another, and RMSNorm's input once it is
    normalised.
    """
    model = sizes.config.model
    is_rms = model.normalization == "RMSNorm"
    statistics = (1 if is_rms else 2) * rows * sizes.wide
    made = width * sizes.wide if model.apply_layernorm_1p else 0
    if not sizes.is_plain(_norm_operator(sizes)):
        return rows * width * sizes.element + statistics + made
    input = rows * width * (sizes.element if _norm_keeps_input(sizes) else sizes.wide)
    if is_rms:
        converted = width * sizes.wide if sizes.element < sizes.wide else 0
        return input + rows * width * sizes.wide + statistics + max(made, converted)
    if _norm_keeps_input(sizes) and not sizes.on_gpu:
        # torch's LayerNorm has them in the dtype of its input there.
        statistics = 2 * rows * sizes.element
    with_bias = 2 if sizes.element < sizes.wide else 1
    return input + statistics + with_bias * made


def _norm_operator(sizes: Sizes) -> str:
    return "rms_norm" if sizes.config.model.normalization == "RMSNorm" else "layer_norm"


def _norm_keeps_input(sizes: Sizes) -> bool:
    """Whether a norm keeps its input as it is, not as numbers of another dtype."""
    converts = sizes.config.model.normalization == "RMSNorm" or sizes.config.model.apply_layernorm_1p
    return not (sizes.is_plain(_norm_operator(sizes)) and converts and sizes.element < sizes.wide)


def _hidden_dropout(sizes: Sizes) -> int:
    """Of one dropout of hidden states: in plain torch the mask, natively nothing of its own."""
    model = sizes.config.model
    plain = model.hidden_dropout and sizes.is_plain("dropout_add")
    return sizes.local_tokens * model.hidden_size if plain else 0


def _attention(sizes: Sizes) -> dict[str, int]:
    """The core, from the packed projection to the product with the output matrix, whose input is the result."""
    model = sizes.config.model
    square = sizes.batch * sizes.heads * sizes.sequence**2
    query = sizes.tokens * sizes.heads * kv_channels(model) * sizes.element
    core = {
        "query and key norm": _query_and_key_norm(sizes),
        "queries, keys, values": _queries_keys_values(sizes, query),
        "output": query,
    }
    if sizes.recomputes("core_attn"):
        return core
    if model.attention_dropout:
        # Probabilities, and what dropout leaves of them for the product with the values.
        if not sizes.is_plain("softmax"):
            return core | {"softmax and dropout": square * 2 * sizes.element}
        # Probabilities in the dtype they are computed in; masks of dropout, of attention and of rows without a key.
        masks = square + (sizes.mask or sizes.sequence**2) + sizes.tokens * sizes.heads
        return core | {"softmax and dropout": square * (sizes.wide + sizes.element) + masks}
    mask = sizes.mask * sizes.element
    return core | {"log of sums": sizes.tokens * sizes.heads * sizes.wide, "mask as numbers": mask}


def _query_and_key_norm(sizes: Sizes) -> int:
    """Their inputs are parts of the packed projection, but for keys that were collected."""
    model = sizes.config.model
    if not model.qk_layernorm:
        return 0
    width = kv_channels(model)
    queries, keys = (_norm(sizes, sizes.tokens * heads, width) for heads in (sizes.heads, sizes.groups))
    packed = sizes.heads + (sizes.groups if sizes.groups_divide else 0) if _norm_keeps_input(sizes) else 0
    return queries + keys - sizes.tokens * packed * width * sizes.element


def _queries_keys_values(sizes: Sizes, query: int) -> int:
    """Bytes of the storages behind queries, keys and values.

    They are parts of one packed tensor, which lives on while any of them is used as it is. Norm and rotation make
    queries and keys of their own, collecting the groups makes keys and values of their own, and the core with dropout,
    written in matrix products, copies what it cannot see as one batch of heads.
    """
    model = sizes.config.model
    groups = sizes.groups
    packed = query + 2 * query * num_query_groups(model) // model.num_attention_heads
    key = query * groups // sizes.heads
    is_made = model.position_embedding_type == "rope" or model.qk_layernorm
    composed = bool(model.attention_dropout) and not sizes.recomputes("core_attn")
    repeats = composed and groups < sizes.heads
    copies = composed and sizes.batch > 1 and sizes.heads > 1
    indices = 0 if sizes.groups_divide else 2 * 8 * sizes.heads
    # For each of the three: bytes of its own, or None where it is a part of the packed tensor.
    own_query = query if is_made or copies else None
    own_key = query if repeats else key if is_made or copies or not sizes.groups_divide else None
    own_value = query if repeats else key if copies or not sizes.groups_divide else None
    owned = (own_query, own_key, own_value)
    is_read = None in owned or (model.qk_layernorm and _norm_keeps_input(sizes))
    return indices + sum(own or 0 for own in owned) + (packed if is_read else 0)


def _shared(sizes: Sizes, num_layers: int, *, is_first: bool) -> dict[str, int]:
    """What the layers that are not recomputed keep together. (The others hold it without autograd's knowledge.)"""
    config, tables, mask, scores = sizes.config, 0, 0, 0
    if config.model.position_embedding_type == "rope" and config.data.reset_position_ids and num_layers:
        tables = 2 * sizes.tokens * rotary_width(config.model) * sizes.wide
    if sizes.recomputes("core_attn") and num_layers:
        # BERT's says of each key alone whether it is padding.
        mask = sizes.tokens if sizes.is_bert else sizes.mask
    if (
        config.model.attention_dropout
        and num_layers
        and (sizes.recomputes("core_attn") or not sizes.is_plain("softmax"))
    ):
        scores = 8 * sizes.tokens * sizes.heads
    dropped = config.model.hidden_dropout and not sizes.is_plain("dropout_add") and (num_layers or is_first)
    rows = 8 * sizes.local_tokens if dropped else 0
    return {"rotary angles": tables, "attention mask": mask, "rows of scores": scores, "rows of dropout": rows}


def _embedding(sizes: Sizes) -> dict[str, int]:
    """Token ids as this rank's rows; positions; types; dropout."""
    model = sizes.config.model
    learned = model.position_embedding_type == "learned_absolute"
    return {
        "rows": 8 * sizes.tokens if sizes.tensor_size > 1 else 0,
        "positions": 8 * sizes.local_tokens if learned else 0,
        "types": 8 * sizes.local_tokens if num_token_types(model) else 0,
        "dropout": _hidden_dropout(sizes),
    }


def _output(sizes: Sizes) -> dict[str, int]:
    """Final norm, its output, and of the loss: the logits (unless chunks of them are made again), and of each token
    the largest and the sum.
    """
    between = _bert_heads(sizes) if sizes.is_bert else {}
    return between | {
        "final norm": _norm(sizes, sizes.local_tokens, sizes.config.model.hidden_size),
        "output layer": sizes.hidden,
        "logits": sizes.kept_logits,
        "loss": sizes.tokens * 2 * sizes.wide,
    }


def _bert_heads(sizes: Sizes) -> dict[str, int]:
    """What stands between final norm and output layer, the labels without those below 0, and of the binary head the
    first token, what the pooler makes of it, and the logarithms of two probabilities.
    """
    model = sizes.config.model
    heads = {
        "transform": sizes.hidden,
        "its activation": sizes.hidden,
        "its norm": _norm(sizes, sizes.local_tokens, model.hidden_size),
        "labels": 8 * sizes.tokens,
    }
    if model.bert_binary_head:
        vector = sizes.batch * model.hidden_size * sizes.element
        # Where sequences are not cut, the first token is a part of what the final norm made.
        is_cut = sizes.local_tokens < sizes.tokens
        heads |= {
            "first token": vector if is_cut else 0,
            "pooler": vector,
            "order of two texts": (2 * sizes.batch + 1) * sizes.wide,
        }
    return heads
