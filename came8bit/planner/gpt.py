"""GPT-2 and GPT-NeoX: layer norms with biases, a plain feed-forward, fused projections.

Shapes follow transformers' modules; what is kept for the backward is counted as in
:mod:`.decoders`.
"""

from __future__ import annotations

from dataclasses import dataclass

from .heads import Head
from .model import Parameter, Stage, weight_and_bias


def _layer_norm(name: str, width: int, stage: str) -> list[Parameter]:
    return weight_and_bias(name, (width,), width, stage)


@dataclass(frozen=True)
class GPT2:
    """Sizes of a GPT-2.

    Attributes:
        layers: number of layers.
        hidden: width.
        feed_forward: width inside the feed-forward.
        heads: attention heads.
        vocabulary: number of tokens that exist.
        positions: length of the table of positions.
        tied: whether input embedding and output layer are one matrix.
        dropout: whether there is dropout on the embedding and the residual branches.
        python_gelu: whether the activation is transformers' ``gelu_new``, written in Python, whose
            intermediate results are all kept; else a fused one.
        head: what stands there instead of a language model's output layer; then not ``tied``.
    """

    layers: int
    hidden: int
    feed_forward: int
    heads: int
    vocabulary: int
    positions: int
    tied: bool = True
    dropout: bool = True
    python_gelu: bool = True
    head: Head | None = None

    @property
    def logits(self) -> int:
        """Numbers per token that go into the softmax."""
        return self.vocabulary if self.head is None else self.head.labels

    @property
    def longest(self) -> int | None:
        """Length of the table of positions."""
        return self.positions

    def parameters(self) -> list[Parameter]:
        """Every parameter once.  ``Conv1D`` keeps its matrix as (in, out)."""
        width, inner = self.hidden, self.feed_forward
        found = [
            Parameter("transformer.wte.weight", (self.vocabulary, width), "embedding", True),
            Parameter("transformer.wpe.weight", (self.positions, width), "embedding", True),
        ]
        for index in range(self.layers):
            layer = f"transformer.h.{index}"
            stage = f"layer {index} attention"
            found += _layer_norm(f"{layer}.ln_1", width, stage)
            found += weight_and_bias(f"{layer}.attn.c_attn", (width, 3 * width), 3 * width, stage)
            found += weight_and_bias(f"{layer}.attn.c_proj", (width, width), width, stage)
            stage = f"layer {index} mlp"
            found += _layer_norm(f"{layer}.ln_2", width, stage)
            found += weight_and_bias(f"{layer}.mlp.c_fc", (width, inner), inner, stage)
            found += weight_and_bias(f"{layer}.mlp.c_proj", (inner, width), width, stage)
        found += _layer_norm("transformer.ln_f", width, "head")
        if self.head is not None:
            return self.head.on(found, "transformer.", width)
        if not self.tied:
            found.append(Parameter("lm_head.weight", (self.vocabulary, width), "head"))
        return found

    def stages(self, batch: int, sequence: int, itemsize: int) -> list[Stage]:
        """Stages in the order of the forward."""
        tokens, width, inner = (
            batch * sequence,
            itemsize * self.hidden,
            itemsize * self.feed_forward,
        )
        norm = 2 * width + 8  # input and result; mean and deviation
        mask = self.hidden * self.dropout
        attention = norm + 3 * width + width + 4 * self.heads + mask
        mlp = norm + (5 if self.python_gelu else 2) * inner + mask
        in_mlp = 2 * inner + width if self.python_gelu else inner + 2 * width
        found = [Stage("embedding", tokens * mask, tokens * 2 * width)]
        for index in range(self.layers):
            name = f"layer {index}"
            found.append(Stage(f"{name} attention", tokens * attention, tokens * 6 * width, index))
            found.append(Stage(f"{name} mlp", tokens * mlp, tokens * in_mlp, index))
        last = norm + self.hidden * (self.head is not None and self.head.dropout)
        found.append(Stage("head", tokens * last, tokens * 2 * width))
        return found


@dataclass(frozen=True)
class GPTNeoX:
    """Sizes of a GPT-NeoX (Pythia).

    Attributes:
        layers: number of layers.
        hidden: width.
        feed_forward: width inside the feed-forward.
        heads: attention heads.
        vocabulary: number of tokens that exist.
        tied: whether input embedding and output layer are one matrix.
        attention_bias: whether the projections of attention have biases.
        parallel: whether attention and feed-forward read the same input.
        dropout: whether there is dropout on the embedding and the residual branches.
        head: what stands there instead of a language model's output layer; then not ``tied``.
    """

    layers: int
    hidden: int
    feed_forward: int
    heads: int
    vocabulary: int
    tied: bool = False
    attention_bias: bool = True
    parallel: bool = True
    dropout: bool = False
    head: Head | None = None

    @property
    def logits(self) -> int:
        """Numbers per token that go into the softmax."""
        return self.vocabulary if self.head is None else self.head.labels

    @property
    def longest(self) -> int | None:
        """Rotary positions: no table, no limit in memory."""
        return None

    def parameters(self) -> list[Parameter]:
        """Every parameter once."""
        width, inner = self.hidden, self.feed_forward
        table = (self.vocabulary, width)
        found = [Parameter("gpt_neox.embed_in.weight", table, "embedding", True)]
        bias = 1 if self.attention_bias else 0
        for index in range(self.layers):
            layer = f"gpt_neox.layers.{index}"
            stage = f"layer {index} attention"
            found += _layer_norm(f"{layer}.input_layernorm", width, stage)
            found += weight_and_bias(
                f"{layer}.attention.query_key_value", (3 * width, width), 3 * width * bias, stage
            )
            found += weight_and_bias(
                f"{layer}.attention.dense", (width, width), width * bias, stage
            )
            stage = f"layer {index} mlp"
            found += _layer_norm(f"{layer}.post_attention_layernorm", width, stage)
            found += weight_and_bias(f"{layer}.mlp.dense_h_to_4h", (inner, width), inner, stage)
            found += weight_and_bias(f"{layer}.mlp.dense_4h_to_h", (width, inner), width, stage)
        found += _layer_norm("gpt_neox.final_layer_norm", width, "head")
        if self.head is not None:
            return self.head.on(found, "gpt_neox.", width)
        if not self.tied:
            found.append(Parameter("lm_head.weight", table, "head"))
        return found

    def stages(self, batch: int, sequence: int, itemsize: int) -> list[Stage]:
        """Stages in the order of the forward."""
        tokens, width, inner = (
            batch * sequence,
            itemsize * self.hidden,
            itemsize * self.feed_forward,
        )
        norm = 2 * width + 8
        mask = self.hidden * self.dropout
        # Rotated query and key, the whole projection (value is a view of it), the result twice.
        attention = norm + 2 * width + 3 * width + 2 * width + 4 * self.heads + mask
        mlp = norm - (width if self.parallel else 0) + 2 * inner + mask
        in_mlp = inner + 2 * width
        found = [Stage("embedding", tokens * mask, tokens * width)]
        for index in range(self.layers):
            name = f"layer {index}"
            found.append(Stage(f"{name} attention", tokens * attention, tokens * 6 * width, index))
            found.append(Stage(f"{name} mlp", tokens * mlp, tokens * in_mlp, index))
        # The cosines and sines of the positions cover a quarter of a head: left out.
        last = norm + self.hidden * (self.head is not None and self.head.dropout)
        found.append(Stage("head", tokens * last, tokens * 2 * width))
        return found
