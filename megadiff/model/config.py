"""Shape of the denoiser, and the precision it computes in."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from megadiff.config.section import Section
from megadiff.model import cost


class ModelConfig(Section):
    """`model:` a bidirectional pre-norm Transformer with RMSNorm, RoPE, squared-ReLU MLP and an untied head."""

    layers: int = Field(gt=0)
    """Number of Transformer blocks."""
    hidden: int = Field(gt=0)
    """Width of the residual stream."""
    heads: int = Field(gt=0)
    """Attention heads; `hidden / heads` is the width of one."""
    seq_length: int = Field(gt=0)
    """Tokens per sequence."""
    ffn_multiple: int = Field(default=4, gt=0)
    """MLP width over `hidden`."""
    mlp_bias: bool = False
    """Whether the two MLP matrices have biases (GIDD: yes)."""
    qk_norm: Literal["full", "head", "none"] = "head"
    """RMS normalisation of queries and keys: over all heads together (GIDD), per head, or not at all."""
    sink: bool = False
    """A learned key and value per head that every query sees (GIDD: yes)."""
    softcap: float | None = Field(default=None, gt=0)
    """Attention scores s become softcap * tanh(s / softcap) (GIDD: 30). Scores are then materialised chunk by chunk,
    which costs about twice the attention time and memory of a fused kernel."""
    resid_scale: float | Literal["completep"] = 1.0
    """Factor on both branches of every block; `completep` is 4 / layers (GIDD)."""
    head_scale: float | Literal["completep"] = 1.0
    """Factor on the logits; `completep` is 512 / hidden (GIDD)."""
    norm_eps: float = Field(default=1e-6, gt=0)
    """Added to the mean square in every RMSNorm."""
    rope_base: int = Field(default=10000, gt=0)
    """Base of the rotary frequencies (half-split layout)."""
    init_scale: float = Field(default=0.4, ge=0)
    """Standard deviation of the block's matrices is this over sqrt(hidden)."""
    embed_init: float = Field(default=0.02, ge=0)
    """Standard deviation of the embedding."""
    head_init: float = Field(default=0.0, ge=0)
    """Standard deviation of the output head; 0 makes the first prediction uniform."""
    vocab_multiple: int = Field(default=128, gt=0, le=65536)
    """The vocabulary is padded with dead entries to a multiple of this; it must not change between layouts."""

    @model_validator(mode="after")
    def _heads_divide(self) -> ModelConfig:
        if self.hidden % self.heads:
            raise ValueError(f"model.hidden is {self.hidden}, which model.heads = {self.heads} does not divide")
        if (self.hidden // self.heads) % 2:
            raise ValueError(
                f"model.hidden / model.heads is {self.hidden // self.heads}, but rotary embeddings need an even width"
            )
        return self

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden // self.heads

    @property
    def ffn_hidden(self) -> int:
        """Width of the MLP."""
        return self.ffn_multiple * self.hidden

    @property
    def resid_factor(self) -> float:
        """`resid_scale` as a number."""
        return 4.0 / self.layers if self.resid_scale == "completep" else float(self.resid_scale)

    @property
    def head_factor(self) -> float:
        """`head_scale` as a number."""
        return 512.0 / self.hidden if self.head_scale == "completep" else float(self.head_scale)

    def padded_vocab_size(self, vocab_size: int) -> int:
        """Return the number of entries of the embedding and the head for `vocab_size` real ids."""
        return cost.padded_vocab_size(vocab_size, multiple=self.vocab_multiple)


class PrecisionConfig(Section):
    """`precision:` the numbers a run computes in."""

    compute: Literal["bf16", "fp32"] = "bf16"
    """Activations, weights and their gradients' products; bf16 keeps float32 master weights and reduces gradients in
    float32. On CPU take fp32: there bf16 is many times slower."""
    master_weights: bool = True
    """Keep float32 copies of bf16 weights. Without them weights and gradients are bf16 alone, as in the released code;
    only `laprop` without the distributed optimizer and without clipping does that."""
    fp8: Literal["none", "delayed", "tensorwise", "blockwise"] = "none"
    """Compute the blocks' matrix products in FP8 (Transformer Engine, `compute: bf16`, an H100 or newer), scaled by the
    largest values of past steps (`delayed`), of each tensor (`tensorwise`), or of blocks of 128 (`blockwise`). Weights,
    attention, norms, the embedding, the head and held-out evaluation stay in bf16."""
    fp8_first_last_bf16: int = Field(default=0, ge=0)
    """Number of blocks at either end that compute in bf16 all the same; not with `delayed`."""

    compile: bool = False
    """Whether to compile the blocks of training steps with `torch.compile`, which needs a C++ compiler and takes up to
    a minute at the start; for small models on the CPU, without tensor parallelism, recomputation and overlapped
    gathering. Steps whose sequences have clean prompts are not compiled. Results agree to rounding."""

    @model_validator(mode="after")
    def _fp8_fits(self) -> PrecisionConfig:
        if self.fp8 != "none" and self.compute != "bf16":
            raise ValueError(f"precision.fp8={self.fp8} needs precision.compute=bf16 (found {self.compute})")
        if self.fp8_first_last_bf16 and self.fp8 in ("none", "delayed"):
            raise ValueError(
                f"precision.fp8_first_last_bf16 is {self.fp8_first_last_bf16}, which goes with fp8=tensorwise "
                f"or blockwise only (found {self.fp8})"
            )
        return self
