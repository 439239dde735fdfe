"""The least work that training and decoding need, counted: what measured times are compared with. Not a script.

Training is counted in multiply-adds of a token, decoding in bytes of weights. What counts are the products with the
candidate table, with the matrices of the layers, and those of attention; norms, softmaxes, the energy head and the
modulation by the step (once for a landscape, however long the text) do not.

Shapes: ``V`` vocabulary, ``D`` width, ``F`` width of the feed-forward layers, ``L`` layers, ``A`` width of all query
heads together, ``A_kv`` that of the key/value heads, ``T`` tokens of a row, ``K`` steps, ``R`` landscapes that they
walk on.
"""

from dataclasses import dataclass

from ebt_transformers import EBTConfig


FORWARD_BACKWARD = 3  # a product, and those that the gradients of its two factors take
MOVE = 2  # the energy of a candidate, and its gradient in the candidate alone
# products in place of one in a step that is differentiated:
DIFFERENTIATED = {
    # the move, and the gradients of both factors in both of its products
    "double_backward": MOVE + 2 * 2,
    # the move; value and derivative along a direction, and the gradients of both factors of each (torch's forward mode
    # takes 2 more, with derivatives of the weights that are zero)
    "forward_over_reverse": MOVE + 2 + 2 * 2,
    # the move; the energy and its gradients at two points
    "central_difference": MOVE + 2 * FORWARD_BACKWARD,
}


@dataclass(frozen=True)
class Work:
    """
    Multiply-adds of a token.

    Args:
        table (`float`): in products with the candidate table, or with the twin's output layer.
        body (`float`): in products with the matrices of the layers.
        attention (`float`): in products of queries with keys, and of attention weights with values.
    """

    table: float
    body: float
    attention: float

    @property
    def total(self) -> float:
        """All of them."""
        return self.table + self.body + self.attention


# ---- weights ---------------------------------------------------------------------------------------------------


def table_weights(config: EBTConfig) -> int:
    """Weights of the candidate table, and of the twin's output layer: `V D`."""
    return config.vocab_size * config.hidden_size


def body_weights(config: EBTConfig) -> int:
    """Weights of the layers' matrices: `L (2 D A + 2 D A_kv + 3 D F)` for queries and output, keys and values, and the
    gated feed-forward."""
    return config.num_hidden_layers * (_key_weights(config) + _other_weights(config))


def context_weights(config: EBTConfig) -> int:
    """What of [`body_weights`] the context stream uses: of the last layer keys and values only, because nothing reads
    the rest; all of it for a model that starts at a proposal of its own."""
    return body_weights(config) - (0 if config.starts_at_prediction else _other_weights(config))


def _key_weights(config: EBTConfig) -> int:
    """Of a layer: keys and values, `2 D A_kv`."""
    return 2 * config.hidden_size * config.key_value_heads * config.head_width


def _other_weights(config: EBTConfig) -> int:
    """Of a layer: queries, output and feed-forward, `2 D A + 3 D F`."""
    return config.hidden_size * (2 * _attention_width(config) + 3 * config.feed_forward_width)


def _attention_width(config: EBTConfig) -> int:
    return config.num_attention_heads * config.head_width


# ---- training --------------------------------------------------------------------------------------------------


def training_steps(config: EBTConfig) -> int:
    """The number of thinking steps K of a training step: the default one, unless `random_steps` draws it."""
    return config.num_landscapes if config.thinking_steps is None else config.thinking_steps


def twin_training(config: EBTConfig, context: int) -> Work:
    """
    A training step of the Transformer++ twin: `3 V D + 3 body + 3 L 2 A (T + 1) / 2`.

    Three products for each of the forward pass. A token looks at (T + 1) / 2 tokens on average, and each takes A
    multiply-adds in either of the two products of attention.

    Args:
        config ([`EBTConfig`]): that of the EBT whose twin it is.
        context (`int`): T.
    """
    looked_at = (context + 1) / 2
    attention = config.num_hidden_layers * 2 * _attention_width(config) * looked_at
    return Work(
        table=FORWARD_BACKWARD * table_weights(config),
        body=FORWARD_BACKWARD * body_weights(config),
        attention=FORWARD_BACKWARD * attention,
    )


def table_products(config: EBTConfig) -> int:
    """
    Products with the candidate table in a training step of the EBT: `2 K + 3 S - 2 J`, for S steps that are scored.

    A step embeds its candidate and projects its gradient back: 2. A scored one also embeds where it arrives, for the
    gradient of its loss, and takes the table's own gradient at both ends: 3. Where the next step is scored, too, and
    starts from there (without noise in between), the embedding is the one that it needs anyway and the gradients at
    that place are taken together: 2 fewer at each of J places. Hence 3 K + 2 where all steps are scored, 2 K + 3 where
    the last one is. A proposal takes 3 more, as any output layer.
    """
    steps = training_steps(config)
    every = config.loss_on_steps == "all"
    scored = steps if every else 1
    joints = steps - 1 if every and not config.thinking_noise_std else 0
    return 2 * steps + 3 * scored - 2 * joints + (FORWARD_BACKWARD if config.starts_at_prediction else 0)


def ebt_training(config: EBTConfig, context: int) -> Work:
    """
    A training step of the EBT, its steps detached from one another.

    - Table: [`table_products`] times `V D`.
    - Candidates: `P` passes over the body, with 6 for a scored step (8 where `second_order` is not
      `"double_backward"`) and 2 for one that only moves. Their attention: `P L 2 A (C + 1)`, over all C columns of the
      context, whether or not a candidate may look at them, and itself.
    - Context: 3 passes over what it uses of the body ([`context_weights`]) for each of R landscapes, and causal
      attention as the twin's in all layers but the last. With `step_conditioning="time_embed"` there is one more
      token, the step's, in each row: C = T + 1 instead of T.

    `training_chunk_size` makes no difference: what is taken all at once has the same floor.

    Args:
        config ([`EBTConfig`]): the EBT's.
        context (`int`): T.
    """
    steps = training_steps(config)
    landscapes = min(steps, config.num_landscapes)
    scored = steps if config.loss_on_steps == "all" else 1
    passes = DIFFERENTIATED[config.second_order] * scored + MOVE * (steps - scored)
    columns = context + (config.step_conditioning == "time_embed")
    encoded = landscapes * columns / context  # tokens of the context stream for each token of the text

    layers, products = config.num_hidden_layers, 2 * _attention_width(config)
    looking = layers if config.starts_at_prediction else layers - 1
    of_candidates = layers * products * (columns + 1)
    of_context = encoded * looking * products * (columns + 1) / 2
    return Work(
        table=table_products(config) * table_weights(config),
        body=passes * body_weights(config) + FORWARD_BACKWARD * encoded * context_weights(config),
        attention=passes * of_candidates + FORWARD_BACKWARD * of_context,
    )


# ---- decoding --------------------------------------------------------------------------------------------------


def twin_decoding(config: EBTConfig, bytes_per_weight: int = 4) -> int:
    """
    Bytes of weights that the twin reads for a token: the body and the output layer, once.

    Args:
        config ([`EBTConfig`]): that of the EBT whose twin it is.
        bytes_per_weight (`int`, *optional*, defaults to 4): float32.
    """
    return bytes_per_weight * (body_weights(config) + table_weights(config))


def ebt_decoding(config: EBTConfig, steps: int, final_energy: bool = False, bytes_per_weight: int = 4) -> int:
    """
    Bytes of weights that the EBT reads for a token: `context + K (2 body + 2 V D)`.

    The new token passes through the context stream once, for all landscapes together ([`context_weights`]). A step
    reads the body forwards and backwards, and the table to embed the candidate and to project its gradient. A proposal
    reads the table once more, the energy after the last step body and table. How many candidates and rows there are
    makes no difference; keys and values in the cache are no weights.

    Args:
        config ([`EBTConfig`]): the EBT's.
        steps (`int`): K.
        final_energy (`bool`, *optional*, defaults to `False`): whether the energy after the last step is asked for, as
            it is to choose between several candidates.
        bytes_per_weight (`int`, *optional*, defaults to 4): float32.
    """
    body, table = body_weights(config), table_weights(config)
    read = context_weights(config) + steps * MOVE * (body + table)
    if config.starts_at_prediction:
        read += table
    if final_energy:
        read += body + table
    return bytes_per_weight * read


def decoding_ratio(config: EBTConfig, steps: int, final_energy: bool = False) -> float:
    """How many times what its twin reads the EBT reads for a token; see [`ebt_decoding`]."""
    return ebt_decoding(config, steps, final_energy) / twin_decoding(config)


__all__ = [
    "MOVE",
    "Work",
    "body_weights",
    "context_weights",
    "decoding_ratio",
    "ebt_decoding",
    "ebt_training",
    "table_products",
    "table_weights",
    "training_steps",
    "twin_decoding",
    "twin_training",
]
