"""What the hosts' guides say, to be run as it stands."""

import os
import re
import subprocess
import sys
from pathlib import Path

ADAPTERS = Path(__file__).parents[2] / "adapters"


def text(host):
    """Returns a guide."""
    return (ADAPTERS / host / "README.md").read_text()


def blocks(host, language):
    """Returns a guide's code blocks of a language."""
    found = re.findall(rf"^```{language}\n(.*?)^```", text(host), re.M | re.S)
    assert found, f"{host} has no {language}"
    return found


def commands(host, beginning):
    """Returns a guide's commands that begin so."""
    joined = text(host).replace("\\\n", "")
    found = re.findall(rf"^ {{4}}({re.escape(beginning)}.*)$", joined, re.M)
    assert found, f"{host} has no command {beginning}"
    return found


def run(command, folder):
    """Runs a command as a shell does, with this Python."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=folder,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout
