"""One process a GPU: jobs that run side by side on one machine each take a device of their own."""

import fcntl
import os
import shutil
import subprocess

from companion.paths import store_dir

_held = []  # open lock files: the kernel frees them when this process ends, however it ends


def visible() -> list[str]:
    """Return the GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    if (named := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [device for device in named.split(",") if device.strip()]
    if not shutil.which("nvidia-smi"):
        return []
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True).stdout
    return [str(i) for i in range(sum(line.startswith("GPU ") for line in listed.splitlines()))]


def claim() -> str | None:
    """Take the first GPU that no other job of this machine and store has, until this process ends;
    return its name.

    Sets CUDA_VISIBLE_DEVICES, so it comes before CUDA is touched; a kernel started afterwards
    inherits it. Nothing is done with one GPU or none, as inside of a cluster's job: the scheduler
    has chosen. Where all are taken, one is shared.
    """
    if len(devices := visible()) < 2:
        return None
    store_dir().mkdir(parents=True, exist_ok=True)
    chosen = devices[os.getpid() % len(devices)]
    for device in devices:
        file = open(store_dir() / f"gpu-{os.uname().nodename}-{device}.lock", "a+b")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
        else:
            _held.append(file)
            chosen = device
            break
    os.environ["CUDA_VISIBLE_DEVICES"] = chosen
    return chosen
