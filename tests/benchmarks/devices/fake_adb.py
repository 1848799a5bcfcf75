"""A stand-in for the `adb` client: it executes for real, in a folder that plays the phone's /data/local/tmp.

Configured by `phone.json` in the folder FAKE_ADB_ROOT:
    devices  {serial: state}
    abi      what getprop tells
    fault    "" or one of: full (a push finds no space), vanish:N (the phone goes at the Nth call to it),
             hang (the benchmark tool never ends), mute (answers break off), silent-push (an old client:
             ends with 0 although the copy failed), crlf (an old phone's line ends)
    gpu      how the benchmark tool fares with a GPU: full, partial, refused, none
Its messages are those of the client 1.0.41 and of a phone's sync service.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

SHARED = "/data/local/tmp"
STUB = b"stand-in for benchmark_model"  # inside an ELF file that no machine can start
ROOT = Path(os.environ.get("FAKE_ADB_ROOT", ""))
TOOL = Path(__file__).with_name("fake_benchmark_model.py")


def main(arguments: list[str]) -> int:
    os.environ.pop("OMP_NUM_THREADS", None)  # which `nproc` goes by
    phone = json.loads((ROOT / "phone.json").read_text())
    with (ROOT / "calls.txt").open("a") as log:
        log.write(json.dumps(arguments) + "\n")
    if arguments[0] == "devices":
        print("List of devices attached")
        for serial, state in phone["devices"].items():
            print(f"{serial:<22} {state} product:panther model:Pixel_7 device:panther transport_id:1")
        print()
        return 0
    assert arguments[0] == "-s"
    serial, (verb, *rest) = arguments[1], arguments[2:]
    state = phone["devices"].get(serial)
    if state != "device" or vanished(phone["fault"]):
        print(
            f"error: device '{serial}' not found" if state in (None, "device") else f"error: device {state}",
            file=sys.stderr,
        )
        return 1
    return {"push": push, "pull": pull, "shell": shell, "get-state": get_state}[verb](rest, phone)


def vanished(fault: str) -> bool:
    kind, _, after = fault.partition(":")
    calls = [line for line in (ROOT / "calls.txt").read_text().splitlines() if '"-s"' in line]
    return kind == "vanish" and len(calls) >= int(after)


def local(path: str) -> Path:
    return ROOT / "tmp" / path.removeprefix(SHARED).lstrip("/")


def get_state(_: list[str], __: dict[str, str]) -> int:
    print("device")
    return 0


def push(paths: list[str], phone: dict[str, str]) -> int:
    source, target = paths
    if phone["fault"] in ("full", "silent-push"):
        local(target).write_bytes(Path(source).read_bytes()[:7])
        print(
            f"adb: error: failed to copy '{source}' to '{target}': remote write failed: No space left on device"
            if phone["fault"] == "full"
            else "",
            file=sys.stderr,
        )
        return int(phone["fault"] == "full")
    shutil.copyfile(source, local(target))
    local(target).chmod(0o644)
    print(f"{source}: 1 file pushed, 0 skipped.")
    return 0


def pull(paths: list[str], _: dict[str, str]) -> int:
    source, target = paths
    if not local(source).exists():
        print(f"adb: error: failed to stat remote object '{source}': No such file or directory", file=sys.stderr)
        return 1
    shutil.copyfile(local(source), target)
    return 0


def shell(words: list[str], phone: dict[str, str]) -> int:
    """Run as the phone's shell would: in a session of its own, which outlives this client."""
    script = " ".join(words)
    kind = phone["fault"]
    script = re.sub(rf"{SHARED}/\S*/benchmark_model(?= --)", lambda found: start_of(found[0]), script)
    script = script.replace(SHARED, str(ROOT / "tmp"))
    prelude = (
        f"getprop() {{ case $1 in *abi) echo {phone['abi']};; *model) echo Pixel 7;; *release) echo 15;; esac; }}\n"
    )
    child = subprocess.Popen(["bash", "-c", prelude + script], stdout=subprocess.PIPE, start_new_session=True)
    out, _ = child.communicate()
    if kind == "mute":
        out = out[: len(out) // 2]
    if kind == "crlf":
        out = out.replace(b"\n", b"\r\n")
    sys.stdout.buffer.write(out)
    return child.returncode if kind != "crlf" else 0  # an old client ends with 0 always


def start_of(path: str) -> str:
    """How to start a pushed file: the stub, if it may be executed, is played by a script."""
    file = local(path)
    if STUB in file.read_bytes() and os.access(file, os.X_OK):
        return f"{sys.executable} {TOOL}"
    return path


if __name__ == "__main__":
    if os.environ.get("FAKE_ADB_SLEEP"):
        time.sleep(float(os.environ["FAKE_ADB_SLEEP"]))
    sys.exit(main(sys.argv[1:]))
