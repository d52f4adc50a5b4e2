"""A real nginx in front of real servers, configured as the one that ships."""

import contextlib
import subprocess
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path

from e2e.scraping import wait_for
from e2e.serving import Server, stop
from pages import ROOT
from tools import find_tool

from guard.redteam.server import find_free_port

SHIPPED = ROOT / "deploy" / "proxy" / "guard.conf"
TEMPORARY = "client_body proxy fastcgi uwsgi scgi".split()


@contextlib.contextmanager
def proxying(servers: Sequence[Server], folder: Path) -> Iterator[str]:
    """Run an nginx whose upstreams are the servers, and yield its URL.

    Args:
        servers: As many as the configuration names.
        folder: Empty; for what nginx writes.
    """
    port = find_free_port()
    text = SHIPPED.read_text()
    places = {f"guard-{n}:8000": s.url[len("http://") :] for n, s in enumerate(servers)}
    for old, new in {**places, "listen 8080": f"listen 127.0.0.1:{port}"}.items():
        assert text.count(old) == 1
        text = text.replace(old, new)
    assert "guard-" not in text
    (folder / "guard.conf").write_text(text)
    paths = "".join(f"{name}_temp_path {folder / name};\n" for name in TEMPORARY)
    config = folder / "nginx.conf"
    config.write_text(
        f"daemon off; pid {folder / 'pid'}; error_log {folder / 'log'};\n"
        f"events {{}}\nhttp {{\naccess_log off;\n{paths}include guard.conf;\n}}\n"
    )
    process = subprocess.Popen(
        [find_tool("nginx"), "-p", str(folder), "-c", str(config), "-e", "stderr"],
        stdin=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        url = f"http://127.0.0.1:{port}"
        wait_for(lambda: urllib.request.urlopen(f"{url}/guard/ready").read())
        yield url
    finally:
        stop(process)
