"""Take steps on MiniLM's shapes when told to: compare_trajectories.py --times runs this file on two trees in turn.

    PYTHONPATH=TREE python tests/step_times.py

A line of stdin is a command, a line of stdout its answer, both JSON: `["build", name, window size]` -> bytes of its state;
`["step"]` -> seconds.
"""

import json
import sys
import time

from trajectories import FP32, gradients, prepare, start

import hf_efcp
from hf_efcp.cli.shapes import BUILT_IN

OPTIONS = {"update_rms": 0.5, "lr": 1e-4}


def main():
    prepare()
    for line in sys.stdin:
        command, *arguments = json.loads(line)
        if command == "build":
            params = optimizer = None  # frees the memory of the one before
            params = start(FP32, BUILT_IN["minilm"]().values())
            optimizer = hf_efcp.create_optimizer(arguments[0], params, window_size=arguments[1], **OPTIONS)
            for p, g in zip(params, gradients(params, 0), strict=True):
                p.grad = g
            answer = sum(optimizer.estimate_footprint().values())
        else:
            for p in params:
                p.grad = p.grad.roll(1)  # another one
            began = time.perf_counter()
            optimizer.step()
            answer = time.perf_counter() - began
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
