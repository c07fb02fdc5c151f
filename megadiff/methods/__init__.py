"""Training methods (a family): everything that changes together in a paper about training.

A file's name is its name under `method.name`; a dotted path (`my_package.my_method`) names a file of your own. A member
has `build(settings, context)`, which returns its `Method`, and may have `Settings`, a section with keys of its own
beside `name`, `check(config)`, which refuses a run description that it cannot train, and `advice(config)`, which
returns warnings about one that is likely a mistake, each a sentence without its full stop.

Data flow: `batch` makes a microbatch of clean sequences into what the model reads, on the host; `attention` and `loss`
describe what the model does with it; `validation` and `estimator` measure the trained model, `sampler` draws from it,
and `export_config` describes it to Hugging Face's Transformers. `megadiff.testing.check_method` is the contract.

Members stay quick to import, since a run description names them: they import torch inside functions.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from inspect import signature
from typing import TYPE_CHECKING, Any, ClassVar

from megadiff.config.registry import Family, call, check_arguments
from megadiff.config.section import Section
from megadiff.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from torch import Tensor

    from megadiff.data.config import StepBatch
    from megadiff.data.tokenizers import Tokenizer
    from megadiff.diffusion.config import ConditioningConfig, NoiseConfig, ObjectiveConfig
    from megadiff.diffusion.noise_process import NoiseProcess
    from megadiff.diffusion.noising import NoisedBatch
    from megadiff.eval.likelihood import BoundSettings, Estimator
    from megadiff.eval.validation import EvalTask
    from megadiff.loss.fused_lm_head import LossKernel
    from megadiff.loss.lm_head import LossOutput, VocabShard
    from megadiff.parallel.attention_pattern import AttentionPattern
    from megadiff.parallel.objective import DeviceBatch
    from megadiff.run.config import RunConfig
    from megadiff.sampling.sampler import Sampler

METHODS = Family("megadiff.methods")
"""The family of training methods."""

_NO_METHOD = (
    "method.name is {name}, whose module must have a function build(settings, context) that returns a "
    "megadiff.methods.Method; {found}"
)


class MethodConfig(Section):
    """`method: {name: gidd}`: how the model is trained, with the method's own settings."""

    name: str = "gidd"
    """Training method: `gidd`, denoising under the run's noise (arXiv:2512.10858); `next_token`, causal next-token
    prediction on the same data, for comparison; `adaptation`, denoising by a model that predicted next tokens
    before; or a dotted path to a module of your own."""


@dataclass(frozen=True)
class MethodContext:
    """The parts that a method is built from, for training, evaluation and export alike."""

    process: NoiseProcess
    """Noise over the tokenizer's vocabulary."""
    tokenizer: Tokenizer
    noise: NoiseConfig
    objective: ObjectiveConfig
    """The section `objective`; of a checkpoint, without the keys that a weighting declares itself."""
    conditioning: ConditioningConfig
    loss_kernel: LossKernel
    """The LM head with its loss that `objective.loss_kernel` names, or for inference one that this machine has."""
    seed: int = 0
    """The run's seed."""


class Method(ABC):
    """A training method. It holds no state that training changes, and is the same on every rank."""

    adds_start_token: ClassVar[bool] = False
    """Whether the method itself puts a token before every sequence, so that prompts need no bos."""

    def __init__(self, context: MethodContext) -> None:
        self.context = context

    @property
    def process(self) -> NoiseProcess:
        """The noise, which also knows the vocabulary and its mask."""
        return self.context.process

    @property
    @abstractmethod
    def description(self) -> str:
        """Sentence about models trained by this method, for model cards."""

    @property
    def log_snr_range(self) -> tuple[float, float] | None:
        """Range of log-SNR that the `elbo` of a training step covers; None for an exact likelihood."""
        return None

    @abstractmethod
    def batch(
        self,
        clean: npt.NDArray[np.int64],
        sample_index: list[int],
        step_batch: StepBatch,
        predicted: npt.NDArray[np.bool_] | None = None,
        documents: npt.NDArray[np.int64] | None = None,
    ) -> NoisedBatch:
        """Return a microbatch as the model and the loss see it, on the CPU.

        It must be a pure function of the run's seed, the step, the sample indices and the tokens of each sequence: the
        same bits on any layout, in any microbatch, and after any resume. It is called in a background thread.

        Args:
            clean: [B, L] ids.
            sample_index: B global sample indices, counted over the whole run.
            step_batch: the global batch that the samples belong to.
            predicted: tokens that are to be predicted, [B, L], where data hold conversations: the others are given
                to the model and have no loss. None for all, as for text; the argument is left out then.
            documents: number of each token's document, [B, L], ascending along a sequence, where sequences hold several
                conversations (`data.packing`); the batch hands it on as its `documents`, by which `attention` keeps
                them apart. None if every sequence is one document; the argument is left out then.
        """

    @abstractmethod
    def attention(self, batch: NoisedBatch) -> AttentionPattern:
        """Return the attention of a training microbatch (see `parallel.objective.Objective`)."""

    def loss_tokens(self, batch: NoisedBatch) -> Tensor | None:
        """Return the positions of the tokens that can have a loss (see `parallel.objective.Objective`); None for all.

        Logits of the others need not be computed.
        """
        del batch
        return None

    def loss_weights(self, batch: NoisedBatch) -> Tensor | None:
        """Return how much each token counts in the loss, [B, L], to show it to people; None if that is not known.

        The weight of a token is its loss if its divergence, or cross-entropy, is one nat; 0 for tokens without a loss.
        """
        del batch
        return None

    @abstractmethod
    def loss(self, hidden: Tensor, lm_head_weight: Tensor, batch: DeviceBatch, shard: VocabShard) -> LossOutput:
        """Return summed loss and per-token terms, sequence first (see `parallel.objective.Objective`).

        A loss of your own may call `context.loss_kernel`, which is exact on any number of tensor-parallel ranks.
        """

    @abstractmethod
    def prompted_attention(self, prompt_lengths: Tensor, length: int) -> AttentionPattern:
        """Return the attention of a trained model over sequences whose first tokens are a clean prompt.

        Args:
            prompt_lengths: number of prompt tokens of each sequence, [B] int64.
            length: L, tokens in each sequence.
        """

    @abstractmethod
    def validation(self, *, num_noise_levels: int) -> EvalTask:
        """Return what is evaluated on validation sequences, whatever the loss; `num_noise_levels` a sequence."""

    @abstractmethod
    def estimator(self, settings: BoundSettings) -> Estimator:
        """Return the estimator of the likelihood of texts given prompts.

        Raises:
            ConfigError: models of this method have none.
        """

    def sampler(self) -> Sampler:
        """Return the sampler of new text.

        Raises:
            ConfigError: models of this method cannot be sampled.
        """
        raise ConfigError(
            f"models trained by the method {type(self).__name__} cannot be sampled; use one that was trained by gidd, "
            "and in training set eval.samples to 0"
        )

    def export_config(self) -> dict[str, Any]:
        """Return the keys of `config.json` that tell Transformers how the model is used.

        Raises:
            ConfigError: models of this method cannot be exported.
        """
        raise ConfigError(f"models trained by the method {type(self).__name__} cannot be exported to Hugging Face")


def refuse_conversations(method: Method, key: str) -> None:
    """Refuse to train a method on conversations if its batches know only text.

    Args:
        method: the run's method.
        key: entry of the configuration that names a source of conversations.

    Raises:
        ConfigError: its `batch` has no argument `predicted`.
    """
    if "predicted" not in signature(method.batch).parameters:
        family, _, name = type(method).__module__.rpartition(".")
        if family == __name__:
            raise ConfigError(
                f"{key} holds conversations, but method.name is {name}, which trains on text alone; train on text with "
                "it, then on conversations with method.name=gidd and the same model.alignment"
            )
        raise ConfigError(
            f"{key} holds conversations, but the method {type(method).__name__} has no argument `predicted` in its "
            "`batch`, which names the tokens to predict; train on text, fine-tune with method.name=gidd, or add it to "
            "a method of your own"
        )


def refuse_packing(method: Method, key: str) -> None:
    """Refuse to train a method on several conversations in a sequence if its batches do not know documents.

    Args:
        method: the run's method.
        key: entry of the configuration that names a source of packed conversations.

    Raises:
        ConfigError: its `batch` has no argument `documents`.
    """
    if "documents" not in signature(method.batch).parameters:
        raise ConfigError(
            f"data.packing puts several conversations of {key} in a sequence, but the method {type(method).__name__} "
            "has no argument `documents` in its `batch`, by which it would keep them apart; set data.packing to false, "
            "or add it to a method of your own"
        )


def check_method_of(config: RunConfig) -> None:
    """Refuse a run description that its method cannot train.

    Raises:
        ConfigError: the module has no `build`, or its `check` refuses the description in its own words.
    """
    member = METHODS.member(config.method.name)
    if not callable(getattr(member, "build", None)):
        raise ConfigError(_NO_METHOD.format(name=config.method.name, found="it has none"))
    check_arguments(member, "build", config.method, None)
    if hasattr(member, "check"):
        call(member, "check", config)


def method_advice(config: RunConfig) -> list[str]:
    """Return the warnings of a run's method about its description; none where the method has no `advice`."""
    member = METHODS.member(config.method.name)
    return list(call(member, "advice", config)) if hasattr(member, "advice") else []


def build_method(settings: MethodConfig, context: MethodContext) -> Method:
    """Return the method that `method.name` names.

    Raises:
        ConfigError: its module has no `build`, or what that returns is no `Method`.
    """
    member = METHODS.member(settings.name)
    build = getattr(member, "build", None)
    method = call(member, "build", settings, context) if callable(build) else None
    if not isinstance(method, Method):
        found = "it has none" if build is None else f"found {type(method).__name__}"
        raise ConfigError(_NO_METHOD.format(name=settings.name, found=found))
    return method
