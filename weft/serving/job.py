"""The job of a server: a process that starts one process for each device and waits for their end.

It is a process of its own, so that the server has no part in what PyTorch's elastic agent does with signals and
children, and can end all of it at once. It is given its work on stdin, says on stdout how it ended, and stays to do it
again (importing torch takes longer than most restarts should), but no longer than the server (``launcher``).
"""

from __future__ import annotations

import base64
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass

import cloudpickle
import torch.distributed as dist

from weft.errors import InputError, WeftError
from weft.runtime.launch import launch
from weft.runtime.worker import die_with
from weft.serving.channel import SECRET, Channel
from weft.serving.decoder import Decoder
from weft.serving.driver import Leader, drive

BOOTSTRAP = "import json,sys;sys.path[:]=json.loads(sys.argv.pop(1));from weft.serving.job import main;main()"


@dataclass(frozen=True, kw_only=True)
class Job:
    """What the worker processes are.

    Attributes:
        make: makes the decoder, in every process of the job; sent to it, as ``weft.launch`` sends functions.
        devices: processes.
        memory: limit of each device in bytes, or of one after the other; empty: none.
        device: ``"cpu"``, or a type of accelerator; None takes the accelerator where there is one.
    """

    make: Callable[[], Decoder]
    devices: int
    memory: tuple[int, ...] = ()
    device: str | None = None


def command() -> list[str]:
    """What starts the job's process."""
    return [sys.executable, "-c", BOOTSTRAP, json.dumps([path or os.getcwd() for path in sys.path])]


def introduction(job: Job) -> bytes:
    """The first line that the job's process reads on stdin."""
    return base64.b64encode(cloudpickle.dumps((job, os.getpid()))) + b"\n"


def main() -> None:
    """Run the job that the first line of stdin tells of, once for each line after it, which says where and how to find
    the server. On stdout goes a line of JSON each time it ends: the error, or nothing wrong."""
    said = sys.stdin.readline()
    if not said:
        return  # there is nothing to do after all
    job, parent = cloudpickle.loads(base64.b64decode(said))
    die_with(parent)
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever user code prints is no answer
    for line in sys.stdin:
        start = json.loads(line)
        os.environ[SECRET] = start["secret"]
        found: dict[str, object] = {}
        try:
            launch(
                serve_here,
                job.make,
                start["port"],
                devices=job.devices,
                memory=job.memory or None,
                device=job.device,
            )
        except WeftError as error:
            found = {"error": str(error), "input": isinstance(error, InputError)}
        answer.write(json.dumps(found) + "\n")
        answer.flush()


def serve_here(make: Callable[[], Decoder], port: int) -> None:
    """Decode for the server at a port, in every process of a job."""
    secret = os.environ.pop(SECRET)
    decoder = make()
    if dist.get_rank() > 0:
        drive(decoder, None)
        return
    channel = Channel(port)
    facts = {name: getattr(decoder, name) for name in ("vocabulary", "max_length", "capacity_tokens")}
    channel.send({"secret": secret, "devices": dist.get_world_size(), **facts})
    drive(decoder, Leader(channel))
    channel.close()
