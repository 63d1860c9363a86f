"""torchrun with our exit codes, for training by several processes; its own is 1 whatever they ended with.

    python -m patchscan.training.launch --standalone --nproc-per-node 4 -m patchscan \\
      train ssp --data DATA --run RUN

A wrong setting (2) ends it at once, without another round. Asked to stop (SIGTERM, Ctrl-C) it answers 75 once the
processes have written their checkpoint, and also where the other nodes do not come or have gone: the same command goes
on. Everything else ends in the exit code of the process that failed first. Options are torchrun's.
"""

import os
import signal
import sys
from types import FrameType

from torch.distributed import DistError
from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.elastic.rendezvous.api import RendezvousError
from torch.distributed.launcher import api
from torch.distributed.run import parse_args, run

from patchscan.common.errors import EXIT_INTERRUPTED, UserError

EXIT_USAGE = UserError.exit_code
# A step on a CPU may take half a minute, and the checkpoint after it is uploaded; a pod has 120 s to end.
STOP_S = 100


class Agent(LocalElasticAgent):
    """torchrun's agent, but for a wrong setting, which another round does not mend."""

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        result: RunResult = super()._monitor_workers(worker_group)
        if EXIT_USAGE in codes(result.failures):
            self._remaining_restarts = 0
        return result


def codes(failures: dict[int, ProcessFailure]) -> list[int]:
    """The exit codes of failed processes, first to fail first; -N where signal N ended one."""
    return [failure.exitcode for failure in sorted(failures.values(), key=lambda one: one.timestamp)]


def launch(arguments: list[str]) -> int:
    """Run torchrun's command line to its end; returns the exit code."""
    signal.signal(signal.SIGTERM, _interrupted)  # until torchrun's own handler, which comes with the processes
    # torch 2.14 tells where the processes meet in the first round only when one store serves both; a node that comes
    # later would wait in vain.
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    setattr(api, "LocalElasticAgent", Agent)  # noqa: B010  mypy has it that a class is not assigned to
    try:
        run(parse_args(["--shutdown-timeout", str(STOP_S), *arguments]))
    except ChildFailedError as error:
        found = codes(error.failures)
        known = [code for code in (EXIT_USAGE, EXIT_INTERRUPTED) if code in found]
        return (known or [code if code > 0 else 128 - code for code in found])[0]
    except (SignalException, KeyboardInterrupt) as error:
        print(f"patchscan: interrupted ({error}); the same command goes on from the checkpoint", file=sys.stderr)
        return EXIT_INTERRUPTED
    except (RendezvousError, DistError) as error:
        print(f"patchscan: the other nodes are not there: {error}", file=sys.stderr)
        return EXIT_INTERRUPTED
    return 0


def _interrupted(number: int, frame: FrameType | None) -> None:
    raise SignalException("before the processes ran", signal.Signals(number))


if __name__ == "__main__":
    sys.exit(launch(sys.argv[1:]))
