"""Dry runs of Transformer Engine's layers, in a process of their own since its compiled part is replaced for good.

`python -m tests.support.engine_dry_runs FOLDER` takes the package unpacked in FOLDER, reads runs as JSON from standard
input, name -> [ranks, description], and writes name -> report of every rank.
"""

from __future__ import annotations

import json
import sys
import warnings

from megadiff.run.config import RunConfig


def main() -> None:
    """Install, and make the dry runs, or write the sentence with which one is refused."""
    warnings.simplefilter("ignore")
    sys.path.insert(0, sys.argv[1])
    from megadiff.run.dry_runs import load_engine

    runs = {name: (ranks, RunConfig.model_validate(tree)) for name, (ranks, tree) in json.load(sys.stdin).items()}
    load_engine(config for _, config in runs.values())
    from megadiff.run.dry_run import as_json, dry_run

    found = {}
    for name, (ranks, config) in runs.items():
        report = dry_run(config, world_size=ranks, chosen=None, all_stages=ranks > 1)
        found[name] = json.loads(as_json(report))
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
