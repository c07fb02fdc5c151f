"""The name that was probably meant by one that does not exist, here or in another trainer.

Sources: Megatron-LM `megatron/training/arguments.py`, torchtitan `config/job_config.py`, Transformers
`TrainingArguments` and `PretrainedConfig`, nanoGPT `train.py`. The table serves suggestions only: none of these names
is accepted as a key.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from pathlib import Path


def did_you_mean(word: str, words: Iterable[str]) -> str:
    """Return `; did you mean `x`?` for the nearest word, or an empty string if none is near."""
    near = difflib.get_close_matches(word, list(words), n=1, cutoff=0.6)
    return f"; did you mean `{near[0]}`?" if near else ""


def similar_path(path: str | Path, is_wanted: Callable[[Path], bool], *, ending: str = "") -> str | None:
    """Return the path in the same folder whose name is nearest to that of a path which does not exist, if any is near.

    Args:
        path: what was given, without `ending`.
        is_wanted: whether a path could have been meant, such as `Path.is_dir` where a folder is wanted.
        ending: how the names that count end; it is left out of the answer.
    """
    folder = Path(path).parent
    try:
        names = sorted(found.name.removesuffix(ending) for found in folder.glob(f"*{ending}") if is_wanted(found))
    except OSError:
        return None
    by_stem = {Path(name).stem: name for name in reversed(names)}  # endings alone make no two names alike
    near = difflib.get_close_matches(Path(path).stem, by_stem, n=1, cutoff=0.6)
    return str(folder / by_stem[near[0]]) if near else None


_NAMES_BY_KEY: dict[str, str] = {
    "model.layers": (
        "num_layers n_layer n_layers num_hidden_layers depth encoder_num_layers decoder_num_layers nlayers model_layers"
    ),
    "model.hidden": "hidden_size d_model dim n_embd n_embed embed_dim model_dim width hidden_dim embedding_size",
    "model.heads": "num_attention_heads n_head n_heads num_heads attention_heads nheads",
    "model.kv_heads": "num_query_groups n_kv_heads num_key_value_heads num_kv_heads kv_head_num query_groups",
    "model.head_dim": "kv_channels head_size d_head dim_head attention_head_dim",
    "model.seq_length": (
        "seq_len sequence_length max_seq_len max_seq_length max_position_embeddings block_size context_length "
        "max_sequence_length model_max_length n_positions n_ctx encoder_seq_length seqlen context_size"
    ),
    "model.ffn_multiple": "mlp_ratio ffn_dim_multiplier mlp_multiple",
    "model.ffn_hidden": "ffn_hidden_size intermediate_size ffn_dim d_ff mlp_hidden_size mlp_hidden",
    "model.mlp": "hidden_act activation activation_function activation_type swiglu gated_linear_unit mlp_type",
    "model.mlp_bias": "add_bias_linear disable_bias_linear bias use_bias",
    "model.qkv_bias": "add_qkv_bias attention_bias include_qkv_bias",
    "model.tie_embeddings": (
        "tie_word_embeddings untie_embeddings_and_output_weights weight_tying tied_embeddings tie_weights "
        "share_embeddings"
    ),
    "model.qk_norm": "qk_layernorm use_qk_norm qk_layer_norm",
    "model.softcap": "attn_logit_softcapping attn_soft_cap logit_softcap attention_softcap",
    "model.sink": "attention_sink softmax_type attn_sink use_sink",
    "model.norm_eps": "rms_norm_eps layernorm_epsilon norm_epsilon layer_norm_eps layer_norm_epsilon",
    "model.rope_base": "rotary_base rope_theta rope_freq_base",
    "model.rope_scaling": "use_rope_scaling rope_scaling_factor rope_parameters",
    "model.init_scale": "init_method_std initializer_range init_std",
    "model.vocab_multiple": "make_vocab_size_divisible_by pad_vocab_size_to_multiple_of vocab_size_multiple",
    "noise.process": "noise.form forward_process noise_kind mixing diffusion_type",
    "noise.shift": "noise_type",
    "noise.scale": "noise_scale",
    "noise.schedule": "noise.rate noise_schedule schedule_type log_snr_schedule",
    "noise.p_uniform": "uniform_noise p_unif",
    "conditioning.per_token_noise": "conditioning.independent",
    "conditioning.linear_noise": "conditioning.linear",
    "conditioning.infilling": "conditioning.infill",
    "conditioning.pad_insertion": "conditioning.empty",
    "conditioning.pad_insertion_law": "conditioning.empty_law",
    "method.name": "objective.name objective_type loss_type training_method",
    "objective.loss_kernel": "objective.head head",
    "objective.itakura_saito_weight": "objective.is_weight is_weight beta_is_div",
    "objective.weighting": "loss_weighting loss_weight weighting_scheme",
    "data.train": (
        "data_path train_data_path dataset dataset_path dataset_name train_file train_data data_dir training_data "
        "train_dataset"
    ),
    "data.valid": (
        "valid_data_path validation_file eval_file val_data eval_dataset validation valid_data val_data_path "
        "valid_file data.val data.eval data.validation"
    ),
    "data.tokenizer": "tokenizer_type tokenizer_model tokenizer_path tokenizer_name tokenizer_name_or_path vocab_file",
    "data.packing": "packing sample_packing pack_sequences packed_sequences multipack neat_packing packed_sequence",
    "data.vocab_size": "vocabulary_size n_vocab padded_vocab_size",
    "batch.global_batch_size": (
        "batch.global_sequences global_batch_size global_batch "
        "total_batch_size train_batch_size training.batch_size global_bs"
    ),
    "batch.micro_batch_size": (
        "batch.micro_sequences micro_batch_size local_batch_size "
        " per_device_train_batch_size per_device_batch_size micro_batch mbs "
        "train_micro_batch_size_per_gpu device_batch_size per_gpu_batch_size"
    ),
    "batch.rampup": "batch.ramp rampup_batch_size batch_size_rampup",
    "parallel.tensor": (
        "tensor_model_parallel_size tensor_parallel_degree tensor_parallel_size tensor_parallel tp tp_size tp_degree "
        "model_parallel_size"
    ),
    "parallel.pipeline": (
        "pipeline_model_parallel_size pipeline_parallel_degree pipeline_parallel_size pipeline_parallel pp pp_size "
        "pp_degree"
    ),
    "parallel.virtual_pipeline": (
        "virtual_pipeline_model_parallel_size num_virtual_stages_per_pipeline_rank vpp "
        "num_layers_per_virtual_pipeline_stage"
    ),
    "parallel.sequence": "sequence_parallel use_sequence_parallel enable_sequence_parallel sp",
    "parallel.distributed_optimizer": (
        "use_distributed_optimizer zero_stage zero_optimization fsdp use_fsdp shard_optimizer "
        "data_parallel_shard_degree"
    ),
    "parallel.recompute": (
        "recompute_granularity recompute_activations activation_checkpoint activation_checkpointing "
        "gradient_checkpointing activation_checkpoint.mode recompute_method"
    ),
    "parallel.recompute_layers": "recompute_num_layers",
    "parallel.tp_comm_overlap": "parallel.tensor_overlap tp_comm_overlap enable_async_tensor_parallel",
    "precision.compute": "dtype torch_dtype mixed_precision mixed_precision_param param_dtype params_dtype",
    "precision.compile=true": "compile torch_compile use_compile",
    "precision.compute=bf16": "bf16 fp16 use_bf16 half_precision",
    "precision.fp8": "fp8_format fp8_recipe enable_fp8 use_fp8 float8",
    "optimizer.name": "optim optimizer_type optimizer_name",
    "optimizer.lr": "learning_rate max_lr peak_lr base_lr max_learning_rate",
    "optimizer.beta1": "adam_beta1 b1",
    "optimizer.beta2": "adam_beta2 b2",
    "optimizer.eps": "adam_eps adam_epsilon epsilon",
    "optimizer.weight_decay": "wd decay adam_weight_decay",
    "optimizer.clip_grad": "max_grad_norm gradient_clip gradient_clipping max_norm grad_clip gradient_clip_val clip",
    "schedule.steps": (
        "train_iters train_steps max_steps num_train_steps total_steps max_iters num_steps training_steps iterations "
        "training.steps max_train_steps num_iterations"
    ),
    "schedule.tokens": "train_tokens max_tokens total_tokens num_tokens token_budget num_train_tokens",
    "schedule.flops": "train_flops compute_budget max_flops",
    "schedule.warmup_steps": (
        "lr_warmup_iters warmup warmup_iters lr_warmup_steps num_warmup_steps warm_up lr_warmup lr_warmup_fraction "
        "warmup_ratio"
    ),
    "schedule.decay_steps": (
        "schedule.cooldown cooldown lr_wsd_decay_iters lr_decay_iters cooldown_steps decay_ratio lr_decay_steps "
        "decay_iters lr_cooldown"
    ),
    "schedule.decay_shape": (
        "schedule.shape lr_decay_style lr_scheduler_type lr_wsd_decay_style decay_type lr_schedule lr_scheduler"
    ),
    "checkpoint.every": (
        "save_interval save_steps checkpoint_interval save_every ckpt_interval checkpoint.interval save_freq "
        "checkpoint_every save_frequency"
    ),
    "checkpoint.keep": "save_total_limit keep_latest_k keep_last_n max_checkpoints keep_last",
    "checkpoint.start_from": (
        "load pretrained_checkpoint resume_from_checkpoint initial_load_path init_from load_path resume_from "
        "model_name_or_path"
    ),
    "checkpoint.weights_only": "finetune initial_load_model_only load_weights_only no_load_optim model_only",
    "checkpoint.async": "async_save async_mode async_checkpoint",
    "eval.every": "eval_interval eval_steps eval_freq validation_freq eval_every val_interval validation.freq",
    "eval.sequences": "eval.rows eval_iters eval_batches eval_iters_per_eval max_eval_samples eval_samples",
    "eval.num_noise_levels": "eval.noise_levels noise_levels eval_noise_levels",
    "log.every": "log_interval logging_steps log_freq metrics.log_freq log_every log_steps logging_interval",
    "log.tensorboard": "tensorboard_dir enable_tensorboard report_to use_tensorboard",
    "name": "run_name exp_name experiment_name experiment job_name",
    "stop.grace_period_s": "stop.lead_s grace_period",
    "output_dir": "save out_dir dump_folder output save_dir checkpoint_dir output_path output_folder save_path run_dir",
    "seed": "random_seed data_seed manual_seed",
    "platform": "device backend distributed_backend accelerator",
    "transformer_impl": "kernels",
}
"""Names used elsewhere, separated by spaces, by the key of a run description (`key=value` where one value is meant)."""

_NAMES_BY_ANSWER: dict[str, str] = {
    "context parallelism is not available; parallel.tensor with parallel.sequence=true divides activations instead": (
        "context context_parallel_size context_parallel_degree context_parallel cp cp_size"
    ),
    "mixture-of-experts models are not available": (
        "expert_model_parallel_size expert_parallel_degree num_experts expert expert_parallel ep moe"
    ),
    "the data-parallel size follows from the number of ranks and the other sizes under `parallel`": (
        "data_parallel_size data_parallel_degree data_parallel data_parallel_replicate_degree dp dp_size"
    ),
    "the number of ranks is given to the launcher (`torchrun --nproc-per-node N`)": (
        "nproc_per_node nnodes num_gpus gpus num_nodes world_size n_gpus num_processes nodes ranks devices"
    ),
    "gradients are accumulated as batch.global_batch_size and batch.micro_batch_size require": (
        "gradient_accumulation_steps grad_accum grad_accum_steps accumulate_grad_batches"
    ),
    "the batch of a step is batch.global_batch_size, and what a rank takes at once is batch.micro_batch_size": (
        "batch_size bs batchsize"
    ),
    "a run's length is schedule.steps, schedule.tokens or schedule.flops; `--check` prints the epochs": (
        "num_train_epochs epochs num_epochs max_epochs"
    ),
    "the model has no dropout": ("dropout hidden_dropout attention_dropout attn_dropout resid_dropout"),
    "the cooldown ends at a rate of 0": ("min_lr lr_min min_learning_rate"),
    "the loader needs no workers; it reads ahead by itself": ("num_workers dataloader_num_workers"),
    "curves are written to metrics.jsonl and, with log.tensorboard, to TensorBoard": (
        "wandb use_wandb wandb_project wandb_run_name"
    ),
}
"""Names used elsewhere for what no key of a run description sets, by the sentence that answers them."""

KEY_BY_OTHER_NAME: dict[str, str] = {name: key for key, names in _NAMES_BY_KEY.items() for name in names.split()}
"""Keys of a run description (`key=value` where one value is meant) by names used elsewhere, in lower case with `_`."""

NOT_A_KEY: dict[str, str] = {name: answer for answer, names in _NAMES_BY_ANSWER.items() for name in names.split()}
"""Sentences about what has no key, by names used elsewhere."""


MEANT_BY_VALUE = {"gpu": "cuda", "bfloat16": "bf16", "float32": "fp32", "fp16": "bf16", "float16": "bf16"}
"""Values as other trainers write them, and the value here; they are suggested where a key takes it."""


def key_elsewhere(name: str) -> str | None:
    """Return the key that a name of another trainer means here, or None.

    Args:
        name: the name as typed, dotted or not, such as `training.seq_len` or `tensor-model-parallel-size`.
    """
    return _looked_up(name, KEY_BY_OTHER_NAME)


def answer_elsewhere(name: str) -> str | None:
    """Return the sentence about a name of another trainer for which there is no key here, or None."""
    return _looked_up(name, NOT_A_KEY)


def _looked_up(name: str, table: dict[str, str]) -> str | None:
    """Look up the whole name first, then its last part alone."""
    plain = name.lstrip("-").replace("-", "_").lower()
    return table.get(plain) or table.get(plain.rpartition(".")[2])
