"""Verify a checkpoint and show its contents."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megadiff.config.command_line import CommandParser

if TYPE_CHECKING:
    from megadiff.checkpoint.manifest import Manifest

_EPILOG = """examples:
  megadiff inspect_checkpoint runs/demo
  megadiff inspect_checkpoint runs/demo/checkpoints/step_00000240 --tensors

Every file is read and its SHA-256 is compared with the manifest's. The exit code is 0 if every byte is as it was
written; otherwise it is 2, and the message names the file. Only torch's index is unpickled, by an unpickler that allows
no other classes.
"""


def main() -> None:
    """Verify the checkpoint, then print its contents."""
    parser = CommandParser(description=__doc__, epilog=_EPILOG)
    parser.add_argument("folder", type=Path, help="a run folder (its newest checkpoint), or one step_* folder")
    parser.add_argument("--no-hashes", action="store_true", help="compare sizes only")
    parser.add_argument("--tensors", action="store_true", help="list every tensor with its shape and type")
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args()

    from megadiff.checkpoint.folder import chosen, verify_files
    from megadiff.checkpoint.safe_metadata import read_index

    folder = chosen(arguments.folder)
    manifest = verify_files(folder, hashes=not arguments.no_hashes)
    tensors = _tensors(read_index(folder))
    if arguments.json:
        found = {"folder": str(folder), **manifest.model_dump(mode="json"), "tensors": tensors}
        print(json.dumps(found, indent=1))
        return
    for line in _described(folder, manifest, tensors, are_hashes_checked=not arguments.no_hashes):
        print(line)
    if arguments.tensors:
        for name, (shape, kind) in tensors.items():
            print(f"  {name}  {'x'.join(map(str, shape)) or 'scalar'}  {kind}")


def _tensors(index: Any) -> dict[str, tuple[list[int], str]]:
    """Map the name of every tensor in the shards to its shape and type."""
    return {
        name: (list(entry.size), str(entry.properties.dtype).removeprefix("torch."))
        for name, entry in sorted(index.state_dict_metadata.items())
        if hasattr(entry, "size")
    }


def _described(
    folder: Path, manifest: Manifest, tensors: dict[str, tuple[list[int], str]], *, are_hashes_checked: bool
) -> list[str]:
    written = sum(entry.bytes for entry in manifest.files.values())
    checked = "every byte as it was written" if are_hashes_checked else "sizes as written (hashes not read)"
    model, noise = manifest.config.get("model", {}), manifest.config.get("noise", {})
    weights = {name: entry for name, entry in tensors.items() if not name.startswith("optimizer.")}
    lines = [
        f"{folder}: whole, {checked}",
        f"step {manifest.step:,}, {manifest.samples:,} sequences, {manifest.tokens:,} tokens",
        f"model     {model.get('layers')} layers, hidden {model.get('hidden')}, heads {model.get('heads')}; "
        f"vocabulary {manifest.vocab_size:,} (mask id {manifest.mask_id}), noise shift {noise.get('shift')}",
        f"files     {len(manifest.files)}, {written:,} bytes; {len(weights)} weights of {len(tensors)} tensors",
        f"layout    {', '.join(f'{name} {size}' for name, size in manifest.layout.items())} when it was written",
        f"versions  {', '.join(f'{name} {found}' for name, found in manifest.versions.items())}",
        f"tokenizer {manifest.tokenizer_fingerprint}",
        f"data      {manifest.data_fingerprint}",
    ]
    lines += _sources(manifest.mixture)
    lines += [f"changed   after step {change.after_step}: {change.describe()}" for change in manifest.changes]
    return lines


def _sources(mixture: dict[str, Any]) -> list[str]:
    """Return a line for each source of the training data, with the position reached in it."""
    lines = []
    for kind in ("sources", "removed"):
        for found in mixture.get(kind, ()):
            epochs = found["drawn"] / found["sequences"]
            gone = ", no longer in the mixture" if kind == "removed" else ""
            lines.append(f"source    {found['path']}: {found['drawn']:,} sequences drawn, {epochs:.2f} epochs{gone}")
    return lines
