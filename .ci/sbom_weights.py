"""Adds the pinned weights (ckd_ray/model/sources.py) to a CycloneDX file: they are no Python package of their own."""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from ckd_ray.model.sources import PINNED

path = Path(sys.argv[1])
bom = json.loads(path.read_text(encoding="utf-8"))
bom["components"] += [
    {
        "type": "machine-learning-model",
        "bom-ref": f"{source}/{name}",
        "name": f"{source}/{name}",
        "hashes": [{"alg": "SHA-256", "content": digest}],
    }
    for source, files in PINNED.items()
    for name, digest in files.items()
    if name.endswith(".safetensors")
]
path.write_text(json.dumps(bom, indent=2, sort_keys=True) + "\n", encoding="utf-8")
print(f"{path}: {len(bom['components'])} components", file=sys.stderr)
