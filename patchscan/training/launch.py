"""Run torchrun with patchscan's exit codes, for training in several processes (torchrun itself always ends with 1).

    python -m patchscan.training.launch --standalone --nproc-per-node 4 -m patchscan \\
      train ssp --data DATA --run RUN

Options are torchrun's. Exit codes: 2 after a wrong setting, without a restart; 75 after SIGTERM or Ctrl-C, once the
processes have written their checkpoint, and when other nodes are missing (the same command continues the run);
otherwise the exit code of the process that failed first.
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
from torch.distributed.run import get_args_parser, run

from patchscan.common.console import tell
from patchscan.common.errors import EXIT_INTERRUPTED, UserError

EXIT_USAGE = UserError.exit_code
# Seconds that the processes have for the current step (up to half a minute on a CPU) and for uploading the checkpoint.
# Kubernetes kills the pod after 120 s.
STOP_TIMEOUT_S = 100


class NoRestartAgent(LocalElasticAgent):
    """torchrun's agent, except that it does not restart the processes after a wrong setting."""

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        result: RunResult = super()._monitor_workers(worker_group)
        if EXIT_USAGE in exit_codes(result.failures):
            self._remaining_restarts = 0
        return result


def exit_codes(failures: dict[int, ProcessFailure]) -> list[int]:
    """Return the exit codes of failed processes in the order of failure; -N for one that signal N ended."""
    return [failure.exitcode for failure in sorted(failures.values(), key=lambda failure: failure.timestamp)]


def launch(arguments: list[str]) -> int:
    """Run torchrun with these arguments; returns the exit code."""
    signal.signal(signal.SIGTERM, _interrupted)  # until torchrun sets its own handler, when it starts the processes
    # With a shared store, torch 2.14 announces the address of the process group in the first round only, and a node
    # that joins later would wait for ever.
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    setattr(api, "LocalElasticAgent", NoRestartAgent)  # noqa: B010  mypy rejects a plain assignment to a class
    parser = get_args_parser()
    parser.allow_abbrev = False  # it would take the --run of `patchscan train` for its own --run-path
    try:
        run(parser.parse_args(["--shutdown-timeout", str(STOP_TIMEOUT_S), *arguments]))
    except ChildFailedError as error:
        codes = exit_codes(error.failures)
        known = [code for code in (EXIT_USAGE, EXIT_INTERRUPTED) if code in codes]
        return (known or [code if code > 0 else 128 - code for code in codes])[0]
    except (SignalException, KeyboardInterrupt) as error:
        tell(f"interrupted ({error}); run the same command again to continue")
        return EXIT_INTERRUPTED
    except (RendezvousError, DistError) as error:
        tell(f"cannot reach the other nodes: {error}")
        return EXIT_INTERRUPTED
    return 0


def _interrupted(number: int, frame: FrameType | None) -> None:
    raise SignalException("before the processes started", signal.Signals(number))


if __name__ == "__main__":
    sys.exit(launch(sys.argv[1:]))
