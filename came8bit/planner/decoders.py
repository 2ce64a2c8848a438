"""Decoders in the manner of Llama: RMS norms, rotary positions, (mostly) a gated feed-forward.

Shapes follow transformers' modules and are compared with them by the tests.  What a layer keeps for
the backward is counted tensor by tensor for the same modules with PyTorch's fused attention
(``sdpa``): ``benchmarks/planner.py`` compares it with what autograd really keeps.
"""

from __future__ import annotations

from dataclasses import dataclass

from .heads import Head
from .model import Parameter, Stage, weight_and_bias


@dataclass(frozen=True)
class Decoder:
    """Sizes and habits of a decoder.

    Attributes:
        layers: number of layers.
        hidden: width.
        feed_forward: width inside the feed-forward.
        heads: query heads.
        kv_heads: key and value heads.
        head_dim: width of a head.
        vocabulary: number of tokens that exist.
        tied: whether input embedding and output layer are one matrix.
        qkv_bias: whether query, key and value projections have a bias.
        out_bias: whether the projection after attention has one.
        mlp_bias: whether the feed-forward has them.
        fused: one matrix for query, key and value, and one for gate and up (Phi-3).
        head_norm: ``"head"``: queries and keys are normalized per head; ``"full"``: over all heads.
        norms: ``"pre"``: before attention and feed-forward; ``"post"``: after; ``"both"``.
        norm_in_fp32: whether the norm's weight is applied before rounding to the model's dtype.
        scores: whether attention scores are kept (``eager`` attention), quadratic in the sequence.
        softcap: whether logits pass through a tanh.
        dropout: whether there is dropout on the two residual branches.
        head: what stands there instead of a language model's output layer; then not ``tied``.
    """

    layers: int
    hidden: int
    feed_forward: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    fused: bool = False
    head_norm: str = ""
    norms: str = "pre"
    norm_in_fp32: bool = False
    scores: bool = False
    softcap: bool = False
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

    # --- parameters -------------------------------------------------------------------------------

    def parameters(self) -> list[Parameter]:
        """Every parameter once."""
        table = (self.vocabulary, self.hidden)
        found = [Parameter("model.embed_tokens.weight", table, "embedding", embedding=True)]
        for index in range(self.layers):
            found += self._attention(f"model.layers.{index}", f"layer {index} attention")
            found += self._feed_forward(f"model.layers.{index}", f"layer {index} mlp")
        found.append(Parameter("model.norm.weight", (self.hidden,), "head"))
        if self.head is not None:
            return self.head.on(found, "model.", self.hidden)
        if not self.tied:
            found.append(Parameter("lm_head.weight", table, "head"))
        return found

    def _attention(self, layer: str, stage: str) -> list[Parameter]:
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        attention = f"{layer}.self_attn"
        inputs = {"q": queries, "k": keys, "v": keys}
        if self.fused:
            inputs = {"qkv": queries + 2 * keys}
        found = []
        for name, width in inputs.items():
            bias = width if self.qkv_bias else 0
            found += weight_and_bias(f"{attention}.{name}_proj", (width, self.hidden), bias, stage)
        found += weight_and_bias(
            f"{attention}.o_proj", (self.hidden, queries), self.hidden * self.out_bias, stage
        )
        if self.head_norm:
            widths = (queries, keys) if self.head_norm == "full" else (self.head_dim,) * 2
            for name, width in zip("qk", widths, strict=True):
                found.append(Parameter(f"{attention}.{name}_norm.weight", (width,), stage))
        if self.norms != "post":
            found.append(Parameter(f"{layer}.input_layernorm.weight", (self.hidden,), stage))
        if self.norms != "pre":
            found.append(
                Parameter(f"{layer}.post_attention_layernorm.weight", (self.hidden,), stage)
            )
        return found

    def _feed_forward(self, layer: str, stage: str) -> list[Parameter]:
        inputs = {"gate_up": 2} if self.fused else {"gate": 1, "up": 1}
        found = []
        for name, times in inputs.items():
            width = times * self.feed_forward
            bias = width if self.mlp_bias else 0
            found += weight_and_bias(f"{layer}.mlp.{name}_proj", (width, self.hidden), bias, stage)
        bias = self.hidden if self.mlp_bias else 0
        shape = (self.hidden, self.feed_forward)
        found += weight_and_bias(f"{layer}.mlp.down_proj", shape, bias, stage)
        names = {
            "pre": ["post_attention_layernorm"],
            "post": ["post_feedforward_layernorm"],
            "both": ["pre_feedforward_layernorm", "post_feedforward_layernorm"],
        }[self.norms]
        return found + [Parameter(f"{layer}.{n}.weight", (self.hidden,), stage) for n in names]

    # --- activations ------------------------------------------------------------------------------

    def stages(self, batch: int, sequence: int, itemsize: int) -> list[Stage]:
        """Stages in the order of the forward."""
        tokens, size = batch * sequence, itemsize
        attention = tokens * self._kept_by_attention(sequence, size)
        mlp = tokens * self._kept_by_mlp(size)
        # The input of the output layer, its norm, and the cosines and sines of the positions; the
        # logits are counted on their own.
        last = tokens * (self._norm(self.hidden, size) + size * self.hidden)
        last += 2 * sequence * self.head_dim * size
        if self.softcap:
            last += tokens * size * self.vocabulary
        if self.head is not None and self.head.dropout:
            last += tokens * self.hidden
        # Gradients of the tensors in hand.  A norm's backward holds four of them in fp32.
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        in_norm = 16 * self.hidden
        in_attention = tokens * max(size * 2 * (queries + keys + self.hidden), in_norm)
        if self.scores:
            in_attention += tokens * sequence * self.heads * (size + 4)
        in_mlp = tokens * size * (2 * self.feed_forward + self.hidden)
        if self.norms != "pre":  # it is the first thing on the way back
            in_mlp = max(in_mlp, tokens * in_norm)
        found = [Stage("embedding", 0, tokens * size * self.hidden)]
        for index in range(self.layers):
            found.append(Stage(f"layer {index} attention", attention, in_attention, index))
            found.append(Stage(f"layer {index} mlp", mlp, in_mlp, index))
        found.append(Stage("head", last, tokens * size * 2 * self.hidden))
        return found

    def _norm(self, width: int, size: int, count: int = 1) -> int:
        """Bytes a norm keeps per token: its input in fp32, the normalized input, the factor."""
        return 4 * width + (4 if self.norm_in_fp32 else size) * width + 4 * count

    def _kept_by_attention(self, sequence: int, size: int) -> int:
        """Bytes per token."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        kept = size * self.hidden  # the projections' input
        kept += self._norm(self.hidden, size) * (2 if self.norms == "both" else 1)
        if self.head_norm:
            per_head = self.head_norm == "head"
            kept += self._norm(queries, size, self.heads if per_head else 1)
            kept += self._norm(keys, size, self.kv_heads if per_head else 1)
        if self.scores:
            # Keys and values are repeated for every query head; tanh, softmax, rounded softmax.
            kept += size * 3 * queries + size * queries
            kept += sequence * self.heads * (size + 4 + (size if size < 4 else 0))
        else:
            # Rotated query and key, value, result, and the logarithm of the softmax's sum.
            kept += size * (2 * queries + 2 * keys) + 4 * self.heads
            if self.fused:  # views hold the whole projection; the result is copied
                kept += size * (queries + keys) + size * queries
        return kept + self.hidden * self.dropout

    def _kept_by_mlp(self, size: int) -> int:
        """Bytes per token."""
        kept = size * self.hidden + 4 * size * self.feed_forward
        kept += self._norm(self.hidden, size) * (2 if self.norms == "both" else 1)
        return kept + self.hidden * self.dropout
