"""What docs/ shows of other packages, where these are installed."""

import importlib.util
import re
from pathlib import Path

import pytest

PAGE = (Path(__file__).parents[2] / "docs" / "early_stopping.md").read_text()
EXAMPLES = re.findall(r"```py\n(.*?)```", PAGE, re.S)


@pytest.mark.parametrize("package", ["accelerate", "lightning"])
@pytest.mark.filterwarnings("ignore")
def test_examples(package, tmp_path, monkeypatch):
    (example,) = (e for e in EXAMPLES if re.search(rf"^(from|import) {package}\b", e, re.M))
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    monkeypatch.chdir(tmp_path)
    exec(compile(example, package, "exec"), {"__name__": "example"})
