"""SANA's linear diffusion transformer, as diffusers' ``SanaTransformer2DModel`` builds it.

Shapes are those of that class, with the sizes of the published ``transformer/config.json`` of
``Sana_1600M_1024px_diffusers`` for SANA-1.6B.  The autoencoder and the text encoder do not train
and are not counted.
"""

from __future__ import annotations

from dataclasses import dataclass

from .model import Parameter, Stage, weight_and_bias


@dataclass(frozen=True)
class Sana:
    """Sizes of a SANA transformer.  A token is a cell of the latent image (32 x 32 pixels).

    Attributes:
        layers: number of blocks.
        heads: heads of the linear self-attention.
        head_dim: width of one; ``heads * head_dim`` is the width of the model.
        cross_heads: heads of the cross-attention.
        cross_head_dim: width of one.
        caption_channels: width of the text encoder.
        expansion: the feed-forward is this many times as wide as the model.
        in_channels: channels of the latent image.
        out_channels: channels of the prediction.
        patch_size: cells per token and side.
        attention_bias: whether the self-attention's projections have biases.
        guidance: whether the guidance scale is embedded, too.
        qk_norm: whether queries and keys are normalized.
        caption_tokens: tokens of a caption (activations only).
    """

    layers: int
    heads: int
    head_dim: int
    cross_heads: int
    cross_head_dim: int
    caption_channels: int
    expansion: float
    in_channels: int = 32
    out_channels: int = 32
    patch_size: int = 1
    attention_bias: bool = False
    guidance: bool = False
    qk_norm: bool = False
    caption_tokens: int = 300

    @property
    def hidden(self) -> int:
        """Width of the model."""
        return self.heads * self.head_dim

    @property
    def tied(self) -> bool:
        """There is no vocabulary."""
        return False

    @property
    def logits(self) -> int:
        """There is no softmax over a vocabulary."""
        return 0

    @property
    def longest(self) -> int | None:
        """Any image size."""
        return None

    def parameters(self) -> list[Parameter]:
        """Every parameter once."""
        width = self.hidden
        square = (width, width)
        patch = (width, self.in_channels, self.patch_size, self.patch_size)
        found = [Parameter("scale_shift_table", (2, width), "head")]
        found += weight_and_bias("patch_embed.proj", patch, width, "embedding")
        time = "time_embed" if self.guidance else "time_embed.emb"
        for name in ("timestep_embedder", *(["guidance_embedder"] if self.guidance else [])):
            embedder = f"{time}.{name}"
            found += weight_and_bias(f"{embedder}.linear_1", (width, 256), width, "embedding")
            found += weight_and_bias(f"{embedder}.linear_2", square, width, "embedding")
        found += weight_and_bias("time_embed.linear", (6 * width, width), 6 * width, "embedding")
        caption = (width, self.caption_channels)
        found += weight_and_bias("caption_projection.linear_1", caption, width, "embedding")
        found += weight_and_bias("caption_projection.linear_2", square, width, "embedding")
        found.append(Parameter("caption_norm.weight", (width,), "embedding"))
        for index in range(self.layers):
            found += self._block(f"transformer_blocks.{index}", f"layer {index}")
        out = self.patch_size**2 * self.out_channels
        return found + weight_and_bias("proj_out", (out, width), out, "head")

    def _block(self, block: str, layer: str) -> list[Parameter]:
        width, inner = self.hidden, int(self.expansion * self.hidden)
        cross = self.cross_heads * self.cross_head_dim
        attention, feed_forward = f"{layer} attention", f"{layer} mlp"
        found = [Parameter(f"{block}.scale_shift_table", (6, width), attention)]
        for attn, size, bias in (("attn1", width, self.attention_bias), ("attn2", cross, True)):
            for name in ("to_q", "to_k", "to_v"):
                found += weight_and_bias(
                    f"{block}.{attn}.{name}", (size, width), size * bias, attention
                )
            if self.qk_norm:
                for name in ("norm_q", "norm_k"):
                    found.append(Parameter(f"{block}.{attn}.{name}.weight", (size,), attention))
            found += weight_and_bias(f"{block}.{attn}.to_out.0", (width, size), width, attention)
        ff = f"{block}.ff"
        found += weight_and_bias(
            f"{ff}.conv_inverted", (2 * inner, width, 1, 1), 2 * inner, feed_forward
        )
        found += weight_and_bias(f"{ff}.conv_depth", (2 * inner, 1, 3, 3), 2 * inner, feed_forward)
        return [*found, Parameter(f"{ff}.conv_point.weight", (width, inner, 1, 1), feed_forward)]

    def stages(self, batch: int, sequence: int, itemsize: int) -> list[Stage]:
        """Stages in the order of the forward."""
        tokens, captions = batch * sequence, batch * self.caption_tokens
        width, inner = self.hidden, itemsize * int(self.expansion * self.hidden)
        cross = itemsize * self.cross_heads * self.cross_head_dim
        wide = itemsize * width
        padded = 4 * (width + self.heads)  # the linear attention is fp32, with a row of ones added
        # Norm's input, result and modulated result; query and key after ReLU; then, in fp32, query,
        # key, padded value and padded result; the input of the projection and its result; the input
        # of the cross-attention, its query and result.
        attention = 5 * wide + 8 * width + 2 * padded + 4 * self.heads + 3 * wide + 2 * cross
        attention = tokens * (attention + 4 * self.cross_heads + 8)
        attention += batch * 4 * self.heads * self.head_dim * (self.head_dim + 1)  # sums over keys
        attention += captions * 2 * cross + batch * 9 * wide
        # Norm as above; three tensors of twice the inner width, two of the inner width; the result.
        mlp = tokens * (4 * wide + 8 * inner + 8) + batch * wide
        caption = 4 * wide + (4 * width if itemsize < 4 else 0) + 4  # a norm in fp32 is among it
        found = [Stage("embedding", captions * caption, tokens * wide)]
        for index in range(self.layers):
            name = f"layer {index}"
            found.append(Stage(f"{name} attention", attention, tokens * 12 * width, index))
            found.append(Stage(f"{name} mlp", mlp, tokens * 2 * inner, index))
        found.append(Stage("head", tokens * 4 * wide, tokens * 2 * wide))
        return found
