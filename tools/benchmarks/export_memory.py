"""Peak resident memory of exporting a synthetic checkpoint, by default of gidd-unif-10b's shape, in bf16.

All blocks of the checkpoint refer to the same bytes on the disk, so it takes 3 GB for a model of 20 GB; the export
reads
and writes all blocks. The real export runs in a process of its own; each exported file is deleted when it is complete.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.storage import WriteResult

from megadiff.checkpoint.folder import entry_of
from megadiff.checkpoint.manifest import FORMAT, Manifest, read_manifest
from megadiff.checkpoint.safe_metadata import read_index
from megadiff.config.command_line import CommandParser
from megadiff.data.tokenizers.byte import ByteTokenizer
from megadiff.diffusion.config import ConditioningConfig, noise_config
from megadiff.errors import run_command
from megadiff.export.export import export
from megadiff.export.importing import write_training_checkpoint
from megadiff.export.weight_files import TrainingTensor, released_shapes, training_tensors
from megadiff.model.config import ModelConfig

_EPILOG = """example:
  python tools/benchmarks/export_memory.py --folder /dev/shm
  python tools/benchmarks/export_memory.py --layers 2 --hidden 1024 --heads 8 --vocab-size 16384
"""


def main() -> None:
    """Write a checkpoint, export it, print the memory used, and delete the files."""
    parser = CommandParser(description=__doc__, epilog=_EPILOG)
    parser.add_argument("--layers", type=int, default=34)
    parser.add_argument("--hidden", type=int, default=4608)
    parser.add_argument("--heads", type=int, default=36)
    parser.add_argument("--vocab-size", type=int, default=131072)
    parser.add_argument("--folder", type=Path, help="working folder (default: the system's temporary folder)")
    parser.add_argument("--json", action="store_true", help="print one JSON line instead of a table")
    parser.add_argument("--export-only", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.export_only:
        _export(arguments.export_only)
        return
    if arguments.folder:
        arguments.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        found = _measure(arguments, Path(folder))
    print(json.dumps(found) if arguments.json else _table(found))


def _measure(arguments: argparse.Namespace, folder: Path) -> dict[str, float]:
    model = ModelConfig.model_validate(
        {
            "layers": arguments.layers,
            "hidden": arguments.hidden,
            "heads": arguments.heads,
            "seq_length": 2048,
            "mlp_bias": True,
            "qk_norm": "full",
            "sink": True,
            "softcap": 30.0,
            "resid_scale": "completep",
            "head_scale": "completep",
        }
    )
    (folder / "checkpoint").mkdir()
    _write(folder / "checkpoint", model, arguments.vocab_size)
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, __file__, "--export-only", str(folder)], check=True, capture_output=True, text=True
    )
    shapes = released_shapes(model, vocab_size=arguments.vocab_size).values()
    sizes = [2 * torch.Size(shape).numel() for shape in shapes]
    return {
        **json.loads(done.stdout.splitlines()[-1]),
        "model_bytes": sum(sizes),
        "largest_tensor_bytes": max(sizes),
        "seconds": round(time.monotonic() - began, 1),
    }


def _write(folder: Path, model: ModelConfig, vocab_size: int) -> None:
    """Write a checkpoint whose tensors repeat one random block of numbers."""
    block = torch.randn(2**20, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)

    def fetch(tensor: TrainingTensor) -> torch.Tensor:
        count = torch.Size(tensor.shape).numel()
        return block.repeat(-(-count // len(block)))[:count].clone().view(tensor.shape)

    tensors = list(training_tensors(model.model_copy(update={"layers": 1}), vocab_size=vocab_size))
    text = ByteTokenizer()
    manifest = Manifest(
        format=FORMAT,
        step=1,
        samples=0,
        tokens=0,
        config={
            "model": model.model_dump(mode="json"),
            "noise": noise_config().model_dump(mode="json"),
            "conditioning": ConditioningConfig().model_dump(mode="json"),
            "objective": {},
            "method": {"name": "gidd"},
            "data": {"tokenizer": "byte"},
        },
        vocab_size=vocab_size,
        mask_id=text.mask_id,
        tokenizer_fingerprint=text.fingerprint,
        data_fingerprint="",
        layout={},
        versions={},
    )
    dtypes = {tensor.key: torch.bfloat16 for tensor in tensors}
    write_training_checkpoint(folder, tensors, fetch, dtypes=dtypes, layers=1, manifest=manifest)
    _repeat_the_block(folder, model.layers)
    files = {name: entry_of(folder / name) for name in read_manifest(folder).files}
    manifest.model_copy(update={"files": files}).write(folder)


def _repeat_the_block(folder: Path, layers: int) -> None:
    """Rewrite the index for `layers` blocks, all stored where the first one is."""
    index = read_index(folder)
    results = []
    for place, stored in index.storage_data.items():
        described = index.state_dict_metadata[place.fqn]
        is_stacked = place.fqn.startswith("decoder.layers.") and isinstance(described, TensorStorageMetadata)
        if is_stacked:
            described.size = torch.Size((layers, *described.size[1:]))
            first = described.chunks[0]
            places = [torch.Size((layer, *first.offsets[1:])) for layer in range(layers)]
            described.chunks = [ChunkStorageMetadata(offset, first.sizes) for offset in places]
            indices = [MetadataIndex(place.fqn, offset, number) for number, offset in enumerate(places)]
        else:
            indices = [place]
        results += [WriteResult(one, stored.length, stored) for one in indices]
    index.storage_meta = None
    (folder / ".metadata").unlink()
    _Writer(folder).finish(index, [results])


class _Writer(FileSystemWriter):
    """A writer that leaves the folder's name out of the index, as the import does."""

    def storage_meta(self) -> None:
        return None


def _export(folder: Path) -> None:
    start = _peak_bytes()
    export(folder / "checkpoint", folder / "out", on_file=Path.unlink)
    shutil.rmtree(folder / "out")
    print(json.dumps({"start_bytes": start, "peak_bytes": _peak_bytes()}))


def _peak_bytes() -> int:
    """Return the peak resident memory of this program.

    `ru_maxrss` would include the memory that the parent held when it started this process.
    """
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:")) * 1024


def _table(found: dict[str, float]) -> str:
    gib = 2**30
    sequences = {
        "weights": f"{found['model_bytes'] / gib:.2f} GiB",
        "largest tensor": f"{found['largest_tensor_bytes'] / gib:.2f} GiB",
        "resident before the export": f"{found['start_bytes'] / gib:.2f} GiB",
        "resident at its peak": f"{found['peak_bytes'] / gib:.2f} GiB",
        "seconds": f"{found['seconds']:.0f} (hashing the checkpoint, reading and writing)",
    }
    return "\n".join(f"{name:<28}{value}" for name, value in sequences.items())


if __name__ == "__main__":
    run_command(main)
