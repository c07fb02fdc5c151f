"""Transformer Engine's layers built on a machine without a GPU, its compiled part replaced (`platform.engine_on_meta`).

They are built, and nothing is computed. `python -m tests.support.engine_without_gpu FOLDER` does so in a
process of its own, since the replacement cannot be taken back, and prints what it found as JSON.
"""

from __future__ import annotations

import importlib
import inspect
import json
import sys
import warnings
from dataclasses import replace
from typing import Any

SHAPE = {"layers": 6, "hidden": 128, "heads": 4, "seq_length": 96}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "tensor": (2, {"tensor": 2}),
    "sequence": (2, {"tensor": 2, "sequence": True}),
    "pipeline": (2, {"pipeline": 2}),
}
RECIPES = ("none", "delayed", "tensorwise", "blockwise")


def install(folder: str) -> None:
    """Make `import transformer_engine.pytorch` work with the package unpacked in `folder`."""
    sys.path.insert(0, folder)
    from megadiff.platform import engine_on_meta

    engine_on_meta.install()


def used_names() -> list[str]:
    """Return the names and signatures that this package needs and that are not there."""
    engine: Any = importlib.import_module("transformer_engine.pytorch")
    base: Any = importlib.import_module("transformer_engine.pytorch.module.base")
    missing: list[str] = []

    def needs(owner: Any, name: str, **arguments: Any) -> None:
        found = getattr(owner, name, None)
        if found is None:
            missing.append(f"{owner.__name__}.{name}")
        elif arguments:
            try:
                inspect.signature(found).bind_partial(**arguments)
            except TypeError as error:
                missing.append(f"{owner.__name__}.{name}: {error}")

    needs(engine, "RMSNorm", hidden_size=1, eps=1e-6, sequence_parallel=False, zero_centered_gamma=True)
    needs(engine, "fp8_autocast", enabled=False)
    needs(engine, "is_fp8_available", return_reason=True)
    needs(engine, "is_fp8_block_scaling_available", return_reason=True)
    needs(base, "initialize_ub", shape=[1, 1], tp_size=1, quantization_modes=[], bootstrap_backend="nccl")
    for mode in ("FP8", "NONE"):
        needs(base.UserBufferQuantizationMode, mode)
    needs(base.TransformerEngineBaseModule, "init_fp8_meta_tensors", recipe=None)
    needs(importlib.import_module("transformer_engine.pytorch.optimizers"), "FusedAdam", lr=1.0, adam_w_mode=True)
    return missing


def _entries(chunks: list[Any]) -> dict[str, Any]:
    """Return the tensors of a checkpoint by name and offset: global shape, this rank's part, and type.

    All layers share a name and differ in their offset.
    """
    found: dict[str, Any] = {}
    for chunk in chunks:
        for key, value in chunk.sharded_state_dict(metadata={"chained_optim_avoid_prefix": True}).items():
            if hasattr(value, "axis_fragmentations"):
                place = [value.global_shape, value.global_offset, value.axis_fragmentations, value.local_shape]
                found[f"{value.key} at {value.global_offset}"] = [
                    *(list(part or ()) for part in place),
                    str(value.dtype),
                ]
            else:
                found[getattr(value, "key", key)] = type(value).__name__
    return found


def _built(block: dict[str, Any], parallel: dict[str, Any], recipe: str) -> dict[str, Any]:
    """Return the entries of this rank's checkpoint with local layers and with Transformer Engine's, and their types."""
    from megadiff.model.config import ModelConfig, PrecisionConfig
    from megadiff.model.denoiser import build_chunks
    from megadiff.parallel.config import Layout, ParallelConfig
    from megadiff.parallel.topology import open_topology
    from megadiff.testing.toy_run import platform_on_rank

    platform = platform_on_rank()
    settings = ParallelConfig.model_validate(parallel)
    topology = open_topology(Layout(settings.tensor, settings.pipeline, 1, 1, settings.pipeline))
    found: dict[str, Any] = {}
    for layers in ("local", "transformer_engine"):
        precision = {"compute": "bf16", **({"fp8": recipe} if layers != "local" else {})}
        chunks = build_chunks(
            ModelConfig.model_validate({**SHAPE, **block}),
            vocab_size=500,
            parallel=settings,
            precision=PrecisionConfig.model_validate(precision),
            platform=replace(platform, layers=layers, has_transformer_engine=layers != "local"),
            topology=topology,
        )
        found[layers] = _entries(chunks)
        found["types"] = sorted({type(module).__name__ for module in chunks[0].decoder.layers[0].modules()})
        found["recipe"] = str(chunks[0].config.fp8_recipe) if chunks[0].config.fp8 else "none"
    return found


def main() -> None:
    """Install, look at names, build on every layout and with every recipe."""
    warnings.simplefilter("ignore")
    install(sys.argv[1])
    import torch

    from tests.support.ranks import on_ranks
    from tests.support.runs import GIDD_BLOCK, MODERN_BLOCK

    torch.set_num_threads(1)
    missing = used_names()
    built = {}
    if not missing:
        for name, (ranks, parallel) in LAYOUTS.items():
            for title, block in {"plain": {}, "GIDD": GIDD_BLOCK, "modern": MODERN_BLOCK}.items():
                built[f"{name}, {title}"] = on_ranks(ranks, _built, block, parallel, "none")
        for recipe in RECIPES:
            built[f"recipe {recipe}"] = on_ranks(1, _built, {}, {}, recipe)
    print(json.dumps({"missing": missing, "built": built}))


if __name__ == "__main__":
    main()
