"""A trained model opened in one process, from a checkpoint of any layout, for evaluation or sampling."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from megadiff.checkpoint.folder import chosen
from megadiff.checkpoint.load import load
from megadiff.checkpoint.manifest import Manifest, read_manifest
from megadiff.data.open import open_validation
from megadiff.data.sequences import Padding, padding_of
from megadiff.data.tokenizers import Tokenizer
from megadiff.diffusion.noise_process import NoiseProcess
from megadiff.eval.likelihood import BoundSettings, Estimator
from megadiff.eval.validation import ValidationEvaluator, ValidationResult
from megadiff.methods import Method
from megadiff.model.config import ModelConfig, PrecisionConfig
from megadiff.model.denoiser import build_chunks
from megadiff.parallel.config import Layout, ParallelConfig
from megadiff.parallel.pipeline import ModelChunk
from megadiff.parallel.topology import Topology, open_topology, process_group
from megadiff.platform.machine import Platform, detect
from megadiff.run.recorded_parts import method_of, naming_the_manifest, tokenizer_of
from megadiff.sampling.sampler import Sampler


@dataclass(frozen=True)
class InferenceModel:
    """A model with the training method, the noise and the tokenizer it was trained with."""

    folder: Path
    """Folder of the checkpoint."""
    manifest: Manifest
    model: ModelConfig
    method: Method
    tokenizer: Tokenizer
    chunks: Sequence[ModelChunk]
    topology: Topology
    platform: Platform

    @property
    def process(self) -> NoiseProcess:
        """The noise, which also knows the vocabulary and its mask."""
        return self.method.process

    @property
    def adds_start_token(self) -> bool:
        """Whether the training method itself puts a token before every sequence."""
        return self.method.adds_start_token

    def estimator(self, settings: BoundSettings) -> Estimator:
        """Return the estimator of likelihoods; see `methods.Method.estimator`."""
        return self.method.estimator(settings)

    def sampler(self) -> Sampler:
        """Return the sampler; see `methods.Method.sampler`."""
        return self.method.sampler()

    @property
    def prepends_bos(self) -> bool:
        """Whether the documents of the training data began with bos."""
        return self.manifest.prepended_bos

    @property
    def _padding(self) -> Padding | None:
        """The token that fills conversations up: as in training, or one without noise for a model trained on text."""
        data = self.manifest.config.get("data", {})
        if trained := data.get("padding"):
            return padding_of(trained, self.tokenizer, packing=data.get("packing", False))
        tokens = {"eos": self.tokenizer.eos_id, "pad": self.tokenizer.pad_id}
        policy = next((name for name, token in tokens.items() if token is not None), None)
        return padding_of(policy, self.tokenizer)

    def denoise(self, ids: Tensor, prompt_length: int = 0) -> Tensor:
        """Map token ids [B, L] to logits [B, L, V], float32 or bf16 as loaded.

        Args:
            prompt_length: leading clean tokens; they attend only to themselves if the model was trained so.
        """
        return self.logits(ids, torch.full((ids.shape[0],), prompt_length))

    @torch.no_grad()
    def logits(self, ids: Tensor, prompt_lengths: Tensor) -> Tensor:
        """Return the model's logits for a prompt length per sequence, [B], in the method's own attention."""
        pattern = self.method.prompted_attention(prompt_lengths.cpu(), ids.shape[1])
        logits = self.chunks[0](ids.to(self.platform.device), pattern.codes())
        return logits.transpose(0, 1)[..., : self.process.vocab_size]

    def held_out_elbo(
        self, data: str, *, sequences: int, num_noise_levels: int, micro_batch_size: int, key: str = "data"
    ) -> ValidationResult:
        """Return the bound on indexed data, with the same sequences and noise as a training run with these settings.

        Args:
            data: prefix P of `P.bin` and `P.idx`.
            sequences: maximal number of sequences.
            num_noise_levels: number of noise levels for each.
            micro_batch_size: sequences per forward pass.
            key: name of the option that gave `data`, for messages.

        Raises:
            DataError: the data are missing, damaged, or made with another tokenizer.
        """
        source = open_validation(
            data,
            self.tokenizer,
            seq_length=self.model.seq_length,
            sequences=sequences,
            key=key,
            padding=self._padding,
        )
        evaluator = ValidationEvaluator(
            sources=[source],
            task=self.method.validation(num_noise_levels=num_noise_levels),
            chunks=self.chunks,
            topology=self.topology,
            device=self.platform.device,
            micro_batch_size=micro_batch_size,
        )
        return evaluator()


@contextmanager
def load_model(
    path: str | Path,
    *,
    platform: Literal["auto", "cpu", "cuda"] = "auto",
    compute: Literal["bf16", "fp32"] = "fp32",
    tokenizer: str | None = None,
) -> Iterator[InferenceModel]:
    """Open a run folder (its newest complete checkpoint) or one of its step folders, in this process alone.

    Args:
        tokenizer: path to use instead of the one the run was configured with, for a checkpoint that was moved.

    Raises:
        CheckpointError: there is no complete checkpoint, or it is damaged.
        DataError: the tokenizer is missing, or is not the one that the model was trained with.
    """
    folder = chosen(Path(path))
    manifest = read_manifest(folder)
    with naming_the_manifest(folder):
        model = ModelConfig.model_validate(manifest.config["model"])
    text = tokenizer_of(manifest, tokenizer, where=folder)
    machine = detect(platform, setting="--platform {}")
    method = method_of(manifest, text, where=folder, platform=machine)
    machine.prepare_megatron()
    with process_group(machine, alone=True):
        topology = open_topology(Layout(1, 1, 1, 1, 1))
        chunks = build_chunks(
            model,
            vocab_size=manifest.vocab_size,
            parallel=ParallelConfig(),
            precision=PrecisionConfig(compute=compute),
            platform=machine,
            topology=topology,
        )
        load(folder, chunks, None, topology=topology, platform=machine)
        for chunk in chunks:
            chunk.eval()
        yield InferenceModel(
            folder=folder,
            manifest=manifest,
            model=model,
            method=method,
            tokenizer=text,
            chunks=chunks,
            topology=topology,
            platform=machine,
        )
