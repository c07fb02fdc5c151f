"""Transformer Engine's Python part on a machine without a GPU, its compiled part replaced by names without content.

Layers can be built, and nothing can be computed. `python -m tests.support.engine_without_gpu FOLDER` does so in a
process of its own, since the replacement cannot be taken back, and prints what it found as JSON.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import inspect
import json
import os
import sys
import types
import warnings
import zlib
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


class _Name:
    """A substitute for anything that a compiled module has: an attribute, a function, a base class, a number."""

    __members__: dict[str, Any] = {}  # noqa: RUF012  an enumeration of the compiled part has members

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        found = _Name(f"{self._name}.{name}")
        setattr(self, name, found)
        return found

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        is_decorator = len(args) == 1 and not kwargs and isinstance(args[0], types.FunctionType)
        return args[0] if is_decorator else _Name(f"{self._name}()")

    def __int__(self) -> int:
        return zlib.crc32(self._name.encode()) & 0x7FFFFFFF

    __index__ = __int__

    def __mro_entries__(self, bases: Any) -> tuple[type, ...]:
        return (object,)

    def __getitem__(self, key: Any) -> Any:
        return self

    def __or__(self, other: Any) -> Any:
        return self

    __ror__ = __or__


class _Module(types.ModuleType):
    """A module that has every name."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__spec__ = importlib.machinery.ModuleSpec(name, None)
        self.__path__ = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        found = _Name(name)
        setattr(self, name, found)
        return found


def install(folder: str) -> None:
    """Make `import transformer_engine.pytorch` work with the package unpacked in `folder`."""
    os.environ["NVTE_PROJECT_BUILDING"] = "1"  # the package then looks for no shared library of its own
    sys.path.insert(0, folder)
    import torch
    import torch._dynamo  # looks at onnx itself, before there is a substitute

    for name in ("transformer_engine_torch", "onnx", "onnxscript", "onnxscript.onnx_opset", "einops"):
        if name not in sys.modules:
            sys.modules[name] = _Module(name)
    common: Any = importlib.import_module("transformer_engine.common")
    common.load_framework_extension = lambda framework: None
    importlib.import_module("transformer_engine.pytorch")
    torch.cuda.is_available = lambda: True  # `module/base.py` asks before it builds FP8 parts
    torch.cuda.get_device_capability = lambda *_: (9, 0)


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
