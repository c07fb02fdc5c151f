"""Shape of the denoiser, and the precision it computes in, FP8 included."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from megadiff.config.section import Section
from megadiff.errors import ConfigError
from megadiff.model import cost
from megadiff.parallel.config import ParallelConfig


class RopeScaling(Section):
    """`model.rope_scaling:` rotary frequencies for sequences longer than those that a model was first trained on."""

    type: Literal["linear", "llama3", "yarn"]
    """Divide all frequencies by `factor` (`linear`), or only slow ones, with a smooth step between `low_freq_factor`
    and `high_freq_factor` turns (`llama3`) or a ramp between `beta_slow` and `beta_fast` turns (`yarn`)."""
    factor: float = Field(ge=1, le=2**20)
    """Ratio of the longest sequences to those of the first training."""
    original_seq_length: int | None = Field(default=None, gt=0, lt=2**31)
    """Length of the first training's sequences, over which turns are counted; `llama3` and `yarn` need it."""
    low_freq_factor: float = Field(default=1.0, ge=1e-6, le=1e6)
    """Frequencies of fewer turns than this are divided by `factor` (`llama3`)."""
    high_freq_factor: float = Field(default=4.0, ge=1e-6, le=1e6)
    """Frequencies of more turns than this stay (`llama3`)."""
    beta_fast: float = Field(default=32.0, ge=1e-6, le=1e6)
    """Frequencies of more turns than this stay (`yarn`)."""
    beta_slow: float = Field(default=1.0, ge=1e-6, le=1e6)
    """Frequencies of fewer turns than this are divided by `factor` (`yarn`)."""
    attention_factor: float | None = Field(default=None, ge=0.01, le=100)
    """Factor on rotated queries and keys (`yarn`); null for 0.1 ln(factor) + 1."""
    truncate: bool = True
    """Whether the ends of the ramp are rounded to whole frequencies (`yarn`)."""

    @model_validator(mode="after")
    def _has_what_its_type_needs(self) -> RopeScaling:
        if self.type != "linear" and self.original_seq_length is None:
            raise ValueError(f"model.rope_scaling.type={self.type} needs model.rope_scaling.original_seq_length")
        if self.type == "llama3" and self.low_freq_factor >= self.high_freq_factor:
            raise ValueError(
                f"model.rope_scaling.low_freq_factor is {self.low_freq_factor}; wanted less than high_freq_factor = "
                f"{self.high_freq_factor}"
            )
        if self.type == "yarn" and self.beta_slow >= self.beta_fast:
            raise ValueError(
                f"model.rope_scaling.beta_slow is {self.beta_slow}; wanted less than beta_fast = {self.beta_fast}"
            )
        return self


class ModelConfig(Section):
    """`model:` a bidirectional pre-norm Transformer with RMSNorm and rotary embeddings.

    The defaults are the paper's MLP and head; with `kv_heads`, `mlp: swiglu` and the keys of biases and rotary
    embeddings it is the block of Llama, Qwen and the diffusion models made from them.
    """

    layers: int = Field(gt=0)
    """Number of Transformer blocks."""
    hidden: int = Field(gt=0)
    """Width of the residual stream."""
    heads: int = Field(gt=0)
    """Attention heads."""
    kv_heads: int | None = Field(default=None, gt=0)
    """Heads of keys and values, each shared by `heads / kv_heads` heads of queries; null for as many as `heads`."""
    head_dim: int | None = Field(default=None, gt=0)
    """Width of one head; null for `hidden / heads`."""
    seq_length: int = Field(gt=0)
    """Tokens per sequence."""
    ffn_multiple: int = Field(default=4, gt=0)
    """MLP width over `hidden`."""
    ffn_hidden: int | None = Field(default=None, gt=0)
    """MLP width; null for `ffn_multiple * hidden`."""
    mlp: cost.Mlp = "relu2"
    """The MLP's middle: relu(x)^2 or gelu(x), or with a further matrix silu(gate) * x or gelu(gate) * x."""
    mlp_bias: bool = False
    """Whether the MLP matrices have biases (GIDD: yes)."""
    qkv_bias: bool = False
    """Whether queries, keys and values have biases (Qwen 2: yes)."""
    attention_out_bias: bool = False
    """Whether the matrix after attention has a bias."""
    qk_norm: Literal["full", "head", "none"] = "head"
    """RMS normalisation of queries and keys: over all heads together (GIDD), per head, or not at all."""
    sink: bool = False
    """A learned key and value per head of queries that every query sees (GIDD: yes)."""
    softcap: float | None = Field(default=None, gt=0)
    """Attention scores s become softcap * tanh(s / softcap) (GIDD: 30). Scores are then materialised chunk by chunk,
    which costs about twice the attention time and memory of a fused kernel."""
    resid_scale: float | Literal["completep"] = 1.0
    """Factor on both branches of every block; `completep` is 4 / layers (GIDD)."""
    head_scale: float | Literal["completep"] = 1.0
    """Factor on the logits; `completep` is 512 / hidden (GIDD)."""
    norm_eps: float = Field(default=1e-6, gt=0)
    """Added to the mean square in every RMSNorm."""
    rope_base: float = Field(default=10000.0, ge=1)
    """Base of the rotary frequencies (half-split layout)."""
    rope_scaling: RopeScaling | None = None
    """Change of the rotary frequencies for longer sequences."""
    init_scale: float = Field(default=0.4, ge=0)
    """Standard deviation of the block's matrices is this over sqrt(hidden)."""
    embed_init: float = Field(default=0.02, ge=0)
    """Standard deviation of the embedding."""
    head_init: float = Field(default=0.0, ge=0)
    """Standard deviation of the output head; 0 makes the first prediction uniform."""
    tie_embeddings: bool = False
    """Whether the output head is the embedding; `embed_init` then also draws the head."""
    alignment: Literal["same", "shifted"] = "same"
    """Token that the output of a position predicts: the one at it (`same`), or the one after it (`shifted`), as models
    do that were autoregressive before (Dream: yes). The first token is then predicted at its own position."""
    vocab_multiple: int = Field(default=128, gt=0, le=65536)
    """The vocabulary is padded with dead entries to a multiple of this; it must not change between layouts."""

    @model_validator(mode="after")
    def _heads_divide(self) -> ModelConfig:
        if self.head_dim is None and self.hidden % self.heads:
            raise ValueError(f"model.hidden is {self.hidden}, which model.heads = {self.heads} does not divide")
        if self.head_width % 2:
            what = "model.hidden / model.heads" if self.head_dim is None else "model.head_dim"
            raise ValueError(f"{what} is {self.head_width}, but rotary embeddings need an even width")
        if self.rope_scaling is not None and self.rope_scaling.type == "yarn" and self.rope_base <= 1:
            raise ValueError(f"model.rope_scaling.type=yarn needs model.rope_base above 1, found {self.rope_base}")
        if self.tie_embeddings and self.head_init:
            raise ValueError(
                f"model.head_init is {self.head_init}, but with model.tie_embeddings the head is the embedding, which "
                "model.embed_init draws; leave head_init at 0"
            )
        if self.heads % self.key_heads:
            raise ValueError(f"model.heads is {self.heads}, which model.kv_heads = {self.kv_heads} does not divide")
        return self

    @property
    def head_width(self) -> int:
        """Width of one attention head."""
        return self.hidden // self.heads if self.head_dim is None else self.head_dim

    @property
    def key_heads(self) -> int:
        """Number of heads of keys and of values."""
        return self.heads if self.kv_heads is None else self.kv_heads

    @property
    def mlp_width(self) -> int:
        """Width of the MLP."""
        return self.ffn_multiple * self.hidden if self.ffn_hidden is None else self.ffn_hidden

    @property
    def is_gated(self) -> bool:
        """Whether the MLP has a gate beside its first matrix."""
        return self.mlp in cost.GATED

    @property
    def qkv_rows(self) -> tuple[int, int, int]:
        """Rows of queries, keys and values that lie together in their common matrix, which has `key_heads` of them."""
        return self.heads // self.key_heads * self.head_width, self.head_width, self.head_width

    @property
    def resid_factor(self) -> float:
        """`resid_scale` as a number."""
        return 4.0 / self.layers if self.resid_scale == "completep" else float(self.resid_scale)

    @property
    def head_factor(self) -> float:
        """`head_scale` as a number."""
        return 512.0 / self.hidden if self.head_scale == "completep" else float(self.head_scale)

    def shape(self, *, vocab_size: int) -> cost.Shape:
        """Return the model's size for closed-form costs."""
        return cost.Shape(
            layers=self.layers,
            hidden=self.hidden,
            heads=self.heads,
            vocab_size=vocab_size,
            seq_length=self.seq_length,
            ffn_multiple=self.ffn_multiple,
            qk_norm=self.qk_norm,
            sink=self.sink,
            mlp_bias=self.mlp_bias,
            softcap=self.softcap is not None,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            ffn_hidden=self.ffn_hidden,
            mlp=self.mlp,
            qkv_bias=self.qkv_bias,
            attention_out_bias=self.attention_out_bias,
            tie_embeddings=self.tie_embeddings,
        )

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
    fp8: cost.Fp8 = "none"
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


_AMAX_HISTORY = 1024
"""Steps whose largest values `delayed` looks back on; Transformer Engine's own default."""


def megatron_settings(precision: PrecisionConfig) -> dict[str, Any]:
    """Return the arguments of megatron-core's `TransformerConfig`; none without FP8.

    Forward E4M3, gradients E5M2 (`hybrid`), except with `blockwise`, whose scales follow the values closely enough for
    E4M3 everywhere (Transformer Engine's default for it).
    """
    if precision.fp8 == "none":
        return {}
    ends = precision.fp8_first_last_bf16
    return {
        "fp8": "e4m3" if precision.fp8 == "blockwise" else "hybrid",
        "fp8_recipe": precision.fp8,
        "fp8_amax_history_len": _AMAX_HISTORY,
        "fp8_amax_compute_algo": "max",
        "first_last_layers_bf16": ends > 0,
        "num_layers_at_start_in_bf16": ends,
        "num_layers_at_end_in_bf16": ends,
    }


def check_shapes(
    precision: PrecisionConfig, model: ModelConfig, parallel: ParallelConfig, *, micro_batch_size: int
) -> None:
    """Check that every FP8 matrix product of a rank has a shape the hardware takes.

    Both operands are multiplied along either side once (forward, and for the gradients of input and weight), so every
    side counts: the widths on this rank, and the tokens of a microbatch. Each must be a multiple of 16 (Transformer
    Engine, `assert_dim_for_fp8_exec`, and FP8 products of cuBLAS). With sequence parallelism a rank quantises its own
    part of the tokens before they are gathered, `blockwise` in whole blocks of 128 of tokens and width.

    Raises:
        ConfigError: the first side that is not, and what would do. Nothing without FP8.
    """
    if precision.fp8 == "none":
        return
    multiple = 128 if precision.fp8 == "blockwise" and parallel.sequence else 16
    tensor = parallel.tensor
    tokens, parts = micro_batch_size * model.seq_length, tensor if parallel.sequence else 1
    sides = {
        "model.hidden": (model.hidden, multiple),
        "model.hidden / parallel.tensor": (model.hidden // tensor, 16),
        "model.heads x model.head_dim / parallel.tensor": (model.heads * model.head_width // tensor, 16),
        "model.kv_heads x model.head_dim / parallel.tensor": (model.key_heads * model.head_width // tensor, 16),
        "the MLP width / parallel.tensor": (model.mlp_width // tensor, 16),
        "batch.micro_batch_size x model.seq_length" + (" / parallel.tensor" if parts > 1 else ""): (
            tokens // parts,
            multiple,
        ),
    }
    for name, (value, wanted) in sides.items():
        if value % wanted:
            lower = value - value % wanted
            raise ConfigError(
                f"precision.fp8={precision.fp8} needs {name} to be a multiple of {wanted}, found {value}; "
                f"{f'{lower} or ' if lower else ''}{lower + wanted} would do"
            )
    if precision.fp8_first_last_bf16 > model.layers // parallel.pipeline:
        raise ConfigError(
            f"precision.fp8_first_last_bf16 is {precision.fp8_first_last_bf16}, but a pipeline stage has "
            f"{model.layers // parallel.pipeline} blocks; megatron-core wants at most that"
        )
