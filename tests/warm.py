"""Commands of featcache from a process that has loaded its libraries once: half a minute less for each dozen of them.

    with warm_featcache(folder) as command:
        subprocess.run([command, "list"])

`command` is a program: a real process with its own exit code, output and working directory, which takes signals. Behind
it a server forks; the fork does the work. A program that is killed takes its fork with it.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

ROOT = Path(__file__).parents[1]
SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)


@contextmanager
def warm_featcache(folder: Path) -> Iterator[Path]:
    """The command ``featcache`` of this checkout, as a program in `folder`; its server ends with the block."""
    address, command = folder / "server", folder / "featcache"
    this = f"{sys.executable} -I -S {__file__}"
    command.write_text(f'#!/bin/sh\nexec {this} call {address} "$@"\n')
    command.chmod(0o755)
    settings = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    server = subprocess.Popen([sys.executable, __file__, "serve", str(address)], env=settings)
    try:
        while not address.exists():
            assert server.poll() is None, "the server of the tests' commands did not start"
            time.sleep(0.01)
        yield command
    finally:
        server.kill()
        server.wait()


def call(address: str, arguments: list[str]) -> int:
    """Run the command in a fork of the server; forward signals, and return the exit code."""
    with socket.socket(socket.AF_UNIX) as link:
        link.connect(address)
        for number in SIGNALS:
            signal.signal(number, lambda number, _: link.sendall(bytes([number])))
        request = json.dumps({"arguments": arguments, "folder": os.getcwd(), "environment": dict(os.environ)}).encode()
        socket.send_fds(link, [len(request).to_bytes(4, "big")], [0, 1, 2])
        link.sendall(request)
        return int.from_bytes(link.recv(4), "big")


def serve(address: str) -> None:
    """Fork for every call, until killed."""
    import heads.estimators.fit  # noqa: F401

    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(f"{address}.new")
        listening.listen()
        os.rename(f"{address}.new", address)
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        while True:
            link, _ = listening.accept()
            if os.fork() == 0:
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                listening.close()
                answer(link)
            link.close()


def answer(link: socket.socket) -> None:
    """Serve one call: work in a fork, with a thread that forwards signals."""
    size, files, _, _ = socket.recv_fds(link, 4, 3)
    request = b""
    while len(request) < int.from_bytes(size, "big"):
        request += link.recv(65_536)
    wanted = json.loads(request)
    worker = os.fork()
    if worker == 0:
        for target, file in enumerate(files):
            os.dup2(file, target)
        sys.stdin = open(0, closefd=False)  # noqa: SIM115
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
        link.close()
        os.chdir(wanted["folder"])
        os.environ.clear()
        os.environ.update(wanted["environment"])
        work(wanted["arguments"])
    for file in files:
        os.close(file)

    def hand_on() -> None:
        with suppress(ProcessLookupError):  # it is done
            while number := link.recv(1):
                os.kill(worker, number[0])
            os.kill(worker, signal.SIGKILL)  # the program is gone

    threading.Thread(target=hand_on, daemon=True).start()
    code = os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1])
    link.sendall((code if code >= 0 else 128 - code).to_bytes(4, "big"))
    os._exit(0)


def work(arguments: list[str]) -> None:
    """Run ``featcache ARGUMENTS`` in a separate process."""
    from featcache.cli.main import main

    sys.argv = ["featcache", *arguments]
    code: object = 1
    try:
        code = main(arguments)
    except SystemExit as stop:
        code = stop.code
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except OSError:
                code = 1
        os._exit(code if isinstance(code, int) else 1 if code else 0)


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(sys.argv[2])
    sys.exit(call(sys.argv[2], sys.argv[3:]))
