"""An op's implementation is not asked for what it does not take."""

import pytest
import torch
from case_runs import taken


@pytest.fixture(autouse=True)
def _taken(request: pytest.FixtureRequest) -> None:
    given = getattr(getattr(request.node, "callspec", None), "params", {})
    op = given["case"].op if "case" in given else given.get("op")
    if op and given.get("backend") and not taken(op, given["backend"], torch.float32):
        pytest.skip(f"{given['backend']} has no {op}")
