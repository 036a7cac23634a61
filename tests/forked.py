"""Scripts as processes of their own, forked from one that has imported torch but not used it: that saves the import."""

import importlib
import multiprocessing
import os
import runpy
import signal
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CONTEXT = multiprocessing.get_context("forkserver")
# The third is imported by any optimizer, the last by -d digits.
CONTEXT.set_forkserver_preload(["cifar", "mnist.mnist", "torch._dynamo", "sklearn.datasets"])
# The figures of training and pruning, which take longer to draw than a short run to train.
FIGURES = [
    "utils.training.outputs.draw_curves",
    "utils.training.outputs.draw_regularization",
    "utils.plots.plot_accuracy_vs_sparsity",
]


def become(
    script: Path, options: list[str], environment: dict[str, str], cwd: Path, pipes: tuple[str, str], figures: bool
) -> None:
    """Be what `python script options` is, in this environment and folder, writing to two files; Ctrl-C arrives."""
    for module, _, name in [path.rpartition(".") for path in FIGURES if not figures]:
        setattr(importlib.import_module(module), name, lambda *_, **__: None)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell in the background may have had it ignored
    for number, path in enumerate(pipes, start=1):
        os.dup2(os.open(path, os.O_WRONLY), number)
    os.environ.update(environment)
    os.chdir(cwd)
    sys.argv = [str(script), *options]
    runpy.run_path(str(script), run_name="__main__")


class Forked:
    """A script that runs; the names are those of subprocess.Popen, but that `stderr` is the path of a terminal.

    The figures of training and pruning are left out, unless they are asked for.
    """

    def __init__(
        self,
        *options: object,
        script: str = "cifar.py",
        env: dict | None = None,
        cwd: Path | None = None,
        stderr: str | None = None,
        figures: bool = False,
    ):
        self.files = [tempfile.NamedTemporaryFile(mode="r") for _ in range(2)]  # noqa: SIM115  (to the end)
        pipes = (self.files[0].name, stderr or self.files[1].name)
        work = (ROOT / script, [str(option) for option in options], env or {}, cwd or Path.cwd(), pipes, figures)
        self.process = CONTEXT.Process(target=become, args=work, daemon=True)
        self.process.start()

    @property
    def returncode(self) -> int | None:
        """The exit status, or minus the signal that killed it; None while it runs."""
        return self.process.exitcode

    def poll(self) -> int | None:
        """Return the exit status, None while it runs."""
        return self.process.exitcode

    def send_signal(self, number: int) -> None:
        """Send it a signal."""
        os.kill(self.process.pid, number)

    def kill(self) -> None:
        """Kill it with SIGKILL."""
        self.process.kill()

    def communicate(self, timeout: float) -> list[str]:
        """Wait for the end; return what it printed, and to stderr. Once: the files go."""
        self.process.join(timeout)
        texts = [file.read() for file in self.files]
        for file in self.files:
            file.close()
        return texts
