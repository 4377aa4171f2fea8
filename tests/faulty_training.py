"""A training script for the tests: `faulty_training.py RANK FAULT`, under torchrun.

Each rank takes ten steps with one all_reduce, a collective waits 6 s at most, and in step 3 the
rank of that number dies, stops (and goes on 18 s later), raises, or ends for want of batches.
"""

import datetime
import os
import signal
import sys
import time

import torch
from process_group import stop
from torch import distributed as dist
from torch.distributed.elastic.multiprocessing.errors import record

from reg_kernels.distributed import guard


@record
def main() -> None:
    rank, fault = int(sys.argv[1]), sys.argv[2]
    dist.init_process_group("gloo")
    group = dist.new_group(timeout=datetime.timedelta(seconds=6))
    total = torch.zeros(1)
    with guard(group, timeout=3):
        for step in range(10):
            if step == 3 and dist.get_rank() == rank:
                if fault == "dies":
                    os.kill(os.getpid(), signal.SIGKILL)
                if fault == "raises":
                    raise ValueError("no such file")
                if fault == "stops":
                    stop(18)
                if fault == "waits":  # for the test that ends its host
                    print(f"waiting at {total.item():g}", flush=True)
                    time.sleep(60)
                if fault == "ends":
                    break
            dist.all_reduce(total.add_(1), group=group)
    print(f"rank {dist.get_rank()}: {total.item():g}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
