"""Values and weights on a GPU: nobody waits for them, and the best are put back all the same.

Skipped without a GPU; `make gpu-report` runs it, and tests/training on the GPU's machine as well.
"""

import pytest
import torch
from torch import nn

from reg_kernels.training import EarlyStopping, StopReason

from support import no_waiting

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")


def mark(model, number):
    with torch.no_grad():
        for x in model.state_dict().values():
            x.fill_(number)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_check_waits_for_nothing(dtype):
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)).cuda()
    values = torch.tensor([3, 1, 2, 2, 0], dtype=dtype, device="cuda").unbind()
    for sync, expected in ((False, [False, False, False, False, True]), (True, [False] * 3)):
        with EarlyStopping(model, 2, sync=sync) as stop:
            found = []
            for number, value in enumerate(values[: len(expected)], 1):
                mark(model, number)
                if sync:
                    found.append(stop(value))
                else:
                    torch.cuda._sleep(10_000_000)  # the value is not there yet
                    with no_waiting():
                        found.append(stop(value))
        assert found == expected
        assert all((x == 2).all() for x in model.state_dict().values())
        assert (stop.best, stop.best_check) == (1.0, 2)
        assert stop.reason is (None if sync else StopReason.PATIENCE)


def test_a_model_that_went_to_the_host():
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)).cuda()
    stop = EarlyStopping(model, 9)
    mark(model, 1)
    stop(torch.ones((), device="cuda"))
    model.cpu()
    mark(model, 2)
    stop.restore()
    assert all((x == 1).all() and x.device.type == "cpu" for x in model.state_dict().values())
    stop(0.5)
    assert all(x.device.type == "cpu" for x in stop.state_dict()["weights"].values())
