"""A server that others start ends with them."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from e2e.outage import wait_until

from guard.redteam.server import find_free_port

SERVER = """
import time
print("up", flush=True)
time.sleep(600)
"""
STARTER = """
import signal, sys, time
from pathlib import Path
from guard.redteam.server import run_server
# Whoever runs the tests may have told his processes to overlook some signals.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
folder = Path(sys.argv[1])
with run_server(["server"], port={port}, log=folder / "log") as server:
    (folder / "pid").write_text(str(server.pid))
    time.sleep(600)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_whoever_is_told_to_end_takes_his_server_along(
    tmp_path: Path, number: signal.Signals
) -> None:
    (tmp_path / "server.py").write_text(SERVER)
    script = tmp_path / "starter.py"
    script.write_text(STARTER.format(port=find_free_port()))
    paths = [str(tmp_path), *sys.path]
    starter = subprocess.Popen(
        [sys.executable, str(script), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        stderr=subprocess.DEVNULL,
    )
    log = tmp_path / "log"
    wait_until(lambda: log.exists() and "up" in read(log), "a server")
    server = int(read(tmp_path / "pid"))
    assert Path(f"/proc/{server}").exists()
    starter.send_signal(number)
    assert starter.wait(timeout=60) != 0
    # Its own parent has waited for it: not even its remains are left.
    assert not Path(f"/proc/{server}").exists()


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")
