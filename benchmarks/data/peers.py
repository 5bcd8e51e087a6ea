"""The environment of the libraries that the data benchmarks compare with, and fresh processes with their CPU time.

The peers are no dependencies: the first use installs them into benchmarks/.peers-venv (about two minutes, 2 GB). They
are pinned and installed without their dependencies, and what they import is installed beside them: to resolve all of it
together takes longer than ten minutes, and half of it is clients of object stores that nothing here calls.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import venv
from importlib import metadata
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
PEERS_VENV = HERE.parent / ".peers-venv"
SCRATCH = HERE.parent / ".scratch"
PEERS = (
    "datatrove==0.10.1",
    "litdata==0.2.76",
    "mosaicml-streaming==0.13.0",
    "ai2-olmo-core==3.0.0",
    "megatron-core==0.16.1",
    "trl==1.16.0",
)
# Libraries that are measured themselves, then what the peers import.
NEEDS = (
    "datasets==5.2.0",
    "tokenizers==0.23.3",
    "fastokens==0.3.5",
    "numpy==2.4.6",
    *("pyarrow", "packaging", "pyyaml", "tqdm", "psutil", "requests", "humanize", "loguru", "multiprocess", "boto3"),
    *("lightning-utilities", "tifffile", "obstore", "Brotli", "python-snappy", "xxhash", "zstd", "catalogue"),
    *("cached-path", "dataclass-extensions", "rich", "safetensors", "importlib_resources", "bettermap", "pandas"),
    *("accelerate", "transformers==5.23.0", "pillow"),
)


def peers_python() -> Path:
    """The interpreter of the peers' environment, which is made on first use."""
    python = PEERS_VENV / "bin" / "python"
    complete = PEERS_VENV / "complete"
    if not complete.exists():
        shutil.rmtree(PEERS_VENV, ignore_errors=True)
        venv.create(PEERS_VENV, with_pip=True)
        (PEERS_VENV / ".gitignore").write_text("*\n")
        torch = f"torch=={metadata.version('torch').partition('+')[0]}"
        install = [python, "-m", "pip", "install", "--quiet"]
        subprocess.run([*install, torch, *NEEDS], check=True, stdout=sys.stderr)
        subprocess.run([*install, "--no-deps", *PEERS], check=True, stdout=sys.stderr)
        complete.touch()
    return python


def site_packages() -> Path:
    """Where the peers' packages lie."""
    peers_python()
    (folder,) = PEERS_VENV.glob("lib/python*/site-packages")
    return folder


def scratch(name: str) -> Path:
    """A folder for files that are made once and kept, in benchmarks/.scratch, which git does not see."""
    folder = SCRATCH / name
    folder.mkdir(parents=True, exist_ok=True)
    (SCRATCH / ".gitignore").write_text("*\n")
    return folder


def measure(side: str, script: str, *arguments: object) -> dict[str, Any]:
    """The JSON object that a script of this folder prints last, in a fresh process of `side`, "ours" or "peers".

    Raises:
        RuntimeError: it failed; with the end of what it wrote.
    """
    python = peers_python() if side == "peers" else Path(sys.executable)
    # One thread each, so that CPU time is that of the work and not of threads that wait for each other.
    quiet = {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    quiet |= {"HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [str(python), str(HERE / script), *map(str, arguments)], capture_output=True, text=True, env=os.environ | quiet
    )
    if done.returncode:
        raise RuntimeError(f"{script} {' '.join(map(str, arguments))} failed:\n{done.stderr[-3000:]}")
    printed = "\n" + done.stdout
    measured: dict[str, Any] = json.loads(printed[printed.rindex("\n{") :])
    return measured
