"""Asking a cluster's GPUs what they compute; Ray is told of GPUs that are not there."""

from __future__ import annotations

import json
import subprocess
import sys

ASK = """
import json, ray
from ckd_ray.errors import JobError, UserError
from ckd_ray.ray_util.gpus import kinds_of_gpus

ray.init(address="local", num_cpus=1, num_gpus=1, include_dashboard=False, log_to_driver=False, logging_level="ERROR",
         object_store_memory=80 * 2**20)
found = {}
try:
    kinds_of_gpus(1.0)
except UserError as error:
    found["unusable"] = str(error)

@ray.remote(num_cpus=0, num_gpus=1)
class Holder:
    def here(self):
        return True

holder = Holder.remote()
ray.get(holder.here.remote())
try:
    kinds_of_gpus(0.5, patience=1.0)
except JobError as error:
    found["held"] = str(error)
print(json.dumps(found))
"""


def test_a_gpu_that_pytorch_cannot_use_and_one_that_others_hold() -> None:
    """What the stage would meet later is told before its precision is chosen, by a process that holds the GPU."""
    done = subprocess.run([sys.executable, "-c", ASK], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert "Ray has given this process a GPU that PyTorch cannot use" in found["unusable"]
    assert "no GPU was free within 1 s" in found["held"] and "the cluster has 1" in found["held"]
