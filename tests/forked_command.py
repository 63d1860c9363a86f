"""A `patchscan` or `python -m MODULE` that somebody else starts, a shell script say, as tests/command.py has it on the
path for them: the first of its kind in a test run becomes the real one, and later ones are children of the fork server.

Run as a script with the fork server's address, a folder of what was started, the real program, and its arguments. What
reaches this process reaches the child: streams, signals, an end by SIGKILL; it ends as the child does.
"""

import array
import json
import os
import signal
import socket
import sys

PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def main(address: str, started: str, program: str, *arguments: str) -> int:
    """Run the command; returns its exit code, -N where signal N ended it."""
    if first_of_its_kind(started, program, arguments):
        os.execv(program, [program, *arguments])
    signal.pthread_sigmask(signal.SIG_BLOCK, PASSED_ON)
    request = {"arguments": [program, *arguments], "environment": dict(os.environ), "cwd": os.getcwd()}
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as channel:
        channel.connect(f"\0{address}")
        socket.send_fds(channel, [json.dumps(request).encode()], [0, 1, 2])
        (child,) = array.array("i", channel.recv(4))
        for number in PASSED_ON:
            signal.signal(number, lambda number, _: os.kill(child, number))
        signal.pthread_sigmask(signal.SIG_UNBLOCK, PASSED_ON)
        (status,) = array.array("i", channel.recv(4))
    return os.waitstatus_to_exitcode(status)


def first_of_its_kind(started: str, program: str, arguments: tuple[str, ...]) -> bool:
    """Whether this test run has not started the same command of `patchscan`, or the same module, in this way."""
    words = [os.path.basename(program), *(one for one in arguments if not one.startswith("-"))]
    try:
        os.close(os.open(os.path.join(started, "-".join(words[:2])), os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


if __name__ == "__main__":
    code = main(*sys.argv[1:])
    if code < 0:
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    sys.exit(code)
