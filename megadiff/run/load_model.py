"""A trained model opened in one process, from a checkpoint of any layout, for evaluation or sampling."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from pydantic import ValidationError
from torch import Tensor

from megadiff.checkpoint.folder import chosen
from megadiff.checkpoint.load import load
from megadiff.checkpoint.manifest import Manifest, read_manifest
from megadiff.data.open import open_validation
from megadiff.data.tokenizer_files import load_tokenizer
from megadiff.data.tokenizers import Tokenizer
from megadiff.diffusion.config import NoiseConfig, noise_config
from megadiff.diffusion.next_token import start_id
from megadiff.diffusion.noise_process import NoiseProcess, build_process
from megadiff.errors import SHOWN_DIGITS, CheckpointError
from megadiff.eval.validation import ValidationEvaluator, ValidationResult, diffusion_bound, next_token_likelihood
from megadiff.model.attention import prompt_code
from megadiff.model.config import ModelConfig, PrecisionConfig
from megadiff.model.denoiser import build_chunks
from megadiff.parallel.config import Layout, ParallelConfig
from megadiff.parallel.pipeline import ModelChunk
from megadiff.parallel.topology import Topology, open_topology, process_group
from megadiff.platform.machine import Platform, detect


@dataclass(frozen=True)
class InferenceModel:
    """A model with the noise and the tokenizer it was trained with."""

    folder: Path
    """Folder of the checkpoint."""
    manifest: Manifest
    model: ModelConfig
    process: NoiseProcess
    tokenizer: Tokenizer
    chunks: Sequence[ModelChunk]
    topology: Topology
    platform: Platform

    @property
    def is_autoregressive(self) -> bool:
        """Whether the model predicts next tokens rather than denoises."""
        return self.manifest.config["objective"]["name"] == "ar"

    @property
    def prepends_bos(self) -> bool:
        """Whether the documents of the training data began with bos."""
        return self.manifest.prepended_bos

    @property
    def knows_prompts(self) -> bool:
        """Whether the model was trained with clean prompts that attend only to themselves."""
        return self.manifest.config["conditioning"]["prompt"] > 0

    def denoise(self, ids: Tensor, prompt_length: int = 0) -> Tensor:
        """Map token ids [B, L] to logits [B, L, V], float32 or bf16 as loaded.

        Args:
            prompt_length: leading clean tokens; they attend only to themselves if the model was trained so.
        """
        return self.logits(ids, torch.full((ids.shape[0],), prompt_length))

    @torch.no_grad()
    def logits(self, ids: Tensor, prompt_lengths: Tensor) -> Tensor:
        """Return `denoise`'s logits for a prompt length per sequence, [B]; next-token logits if autoregressive."""
        is_causal = self.is_autoregressive or self.manifest.config["conditioning"]["prompt_attention"] == "causal"
        lengths = torch.full((ids.shape[0],), ids.shape[1]) if self.is_autoregressive else prompt_lengths.cpu()
        if not (self.is_autoregressive or self.knows_prompts):
            lengths = torch.zeros_like(lengths)
        logits = self.chunks[0](ids.to(self.platform.device), prompt_code(lengths, is_causal=is_causal))
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
        source = open_validation(data, self.tokenizer, seq_length=self.model.seq_length, sequences=sequences, key=key)
        measure = next_token_likelihood(self.process, start_id=start_id(self.tokenizer), topology=self.topology)
        if not self.is_autoregressive:
            measure = diffusion_bound(self.process, topology=self.topology, num_noise_levels=num_noise_levels)
        held_out = ValidationEvaluator(
            sources=[source],
            measure=measure,
            chunks=self.chunks,
            topology=self.topology,
            device=self.platform.device,
            micro_batch_size=micro_batch_size,
        )
        return held_out()


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
    named, model, noise = _settings(folder, manifest)
    text = load_tokenizer(tokenizer or named)
    if text.fingerprint != manifest.tokenizer_fingerprint:
        raise CheckpointError(
            f"{folder} was trained with another tokenizer ({manifest.tokenizer_fingerprint[:SHOWN_DIGITS]}) than "
            f"{text.name} ({text.fingerprint[:SHOWN_DIGITS]}); give the first one's path with --tokenizer"
        )
    machine = detect(platform, setting="--platform {}")
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
            process=build_process(noise, vocab_size=manifest.vocab_size, mask_id=manifest.mask_id),
            tokenizer=text,
            chunks=chunks,
            topology=topology,
            platform=machine,
        )


def _settings(folder: Path, manifest: Manifest) -> tuple[str, ModelConfig, NoiseConfig]:
    """Return the tokenizer's path, the model and the noise recorded in a checkpoint's manifest."""
    config = manifest.config
    try:
        return (
            str(config["data"]["tokenizer"]),
            ModelConfig.model_validate(config["model"]),
            noise_config(**config["noise"]),
        )
    except (KeyError, TypeError, ValidationError) as error:
        what = str(error).splitlines()[0]
        raise CheckpointError(
            f"{folder / 'manifest.json'} describes no model of this version ({what}); use another checkpoint of the run"
        ) from None
