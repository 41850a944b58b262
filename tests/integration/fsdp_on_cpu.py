"""`python -m hf_efcp.run` under FSDP on processes without GPUs: Accelerate has FSDP for devices of its list only.

Its state is told that the gloo processes of this machine have GPUs; the rest (FSDP2, checkpoints, Trainer) is real.
"""

import sys

from accelerate.state import PartialState
from accelerate.utils import DistributedType

from hf_efcp import run

original = PartialState.__init__


def as_gpus(self, *args, **kwargs):
    original(self, *args, **kwargs)
    if self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type = DistributedType.MULTI_GPU


if __name__ == "__main__":
    PartialState.__init__ = as_gpus
    sys.exit(run.main())
