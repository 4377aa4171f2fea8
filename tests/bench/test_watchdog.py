"""bench/watchdog.py: what hangs is stopped, what is slow is not."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from bench import watchdog


def python(code: str, seconds: int = 1000, **options: Any) -> Any:
    return watchdog.run([sys.executable, "-S", "-c", code], seconds, **options)


def test_what_a_program_says_and_how_it_ends():
    code = "import sys; print('out'); print('err', file=sys.stderr); sys.exit(3)"
    done = python(code)
    assert (done.returncode, done.stdout, done.stderr) == (3, "out\n", "err\n")
    done = python("import sys; sys.stdout.flush(); print('err', file=sys.stderr)", together=True)
    assert (done.stdout, done.stderr) == ("err\n", None)


def test_options_reach_the_program(tmp_path: Path):
    code = "import os, sys; print(os.getcwd(), os.environ['WORD'])"
    assert python(code, cwd=tmp_path, env={"WORD": "x"}).stdout == f"{tmp_path.resolve()} x\n"
    with pytest.raises(FileNotFoundError):
        python(code, cwd=tmp_path / "none")
    assert watchdog.run(["no-such-program"]).returncode == 127


def test_who_computes_for_ever_is_stopped_by_processor_time():
    with pytest.raises(TimeoutError, match=r"took more than 1 s of processor time: begun"):
        python("print('begun', flush=True)\nwhile True: pass", 1)


def test_waiting_is_no_processor_time():
    assert python("import time; time.sleep(1.5); print('done')", 1).stdout == "done\n"


def test_who_waits_for_ever_is_stopped_with_all_it_started(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(watchdog, "CLOCK", 1e-3)  # a thousand seconds: one
    # What a program started holds its output open, too: it ends where all have gone.
    code = "import os, time; os.fork(); time.sleep(30); print('survived')"
    with pytest.raises(TimeoutError, match=r"still ran after 1\.0 s") as caught:
        python(code)
    assert "survived" not in str(caught.value)
