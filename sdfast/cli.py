"""The command `sdfast`: generate | inpaint | outpaint | train | segment | bound | bench | doctor.

Bad input is one line on stderr, `sdfast: error: ...`, and exit status 2, before any work is done. Work that
fails, because memory ran out or training diverged, is such a line and 1; Ctrl-C is 130. (`python -X dev -m
sdfast` shows the traceback instead.) Nothing here imports torch before the arguments have been checked, so
that a mistake is answered at once.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from sdfast import __version__
from sdfast._arguments import check_counts, check_folder
from sdfast.bench.command import add_parser as add_bench
from sdfast.bound_command import add_parser as add_bound
from sdfast.command_line import one_line
from sdfast.generate_command import add_parser as add_generate
from sdfast.inpaint_command import add_parsers as add_inpaint_and_outpaint
from sdfast.segment_command import add_parser as add_segment
from sdfast.training.command import add_parser as add_ldm
from sdfast.training.vae_command import add_parser as add_vae

_INTERRUPTED = 130  # 128 + SIGINT, as shells have it
_BAD_INPUT = 2
_FAILED = 1


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: the arguments, those of the process when None.

    Returns:
        The exit status: 0, 1 for work that failed, 2 for bad input, 130 when interrupted. `--help` and
        `--version` raise SystemExit.
    """
    with _warnings_as_lines():
        try:
            arguments = _parser().parse_args(argv)
            return arguments.run(arguments)
        except KeyboardInterrupt as interrupt:
            print(f"\nsdfast: {str(interrupt) or 'interrupted'}", file=sys.stderr)
            return _INTERRUPTED
        # What comes from outside is checked by whoever takes it, and refused with one of these.
        except (ValueError, OSError, ImportError) as error:
            if sys.flags.dev_mode:
                raise
            print(f"sdfast: error: {one_line(error)}", file=sys.stderr)
            return _BAD_INPUT
        except (FloatingPointError, MemoryError, RuntimeError) as error:
            diverged = isinstance(error, FloatingPointError)
            if sys.flags.dev_mode or not (diverged or _out_of_memory(error)):
                raise
            print(f"sdfast: error: {'' if diverged else 'out of memory: '}{one_line(error)}", file=sys.stderr)
            return _FAILED


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} (see: {self.prog} --help)")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="sdfast", description="Fast latent diffusion on CPU and GPU.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"sdfast {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    add_generate(commands)
    add_inpaint_and_outpaint(commands)
    _add_train(commands)
    add_segment(commands)
    add_bound(commands)
    add_bench(commands)
    doctor = commands.add_parser("doctor", help="say what sdfast found on this machine, and what it lacks")
    doctor.set_defaults(run=_doctor)
    return parser


def _add_train(commands: Any) -> None:
    train = commands.add_parser("train", help="train a model")
    models = train.add_subparsers(title="models", metavar="MODEL", required=True)
    parser = models.add_parser("digits", help="handwritten digits; some twenty minutes on two CPU cores")
    add = parser.add_argument
    add("-o", "--output", type=Path, default=Path("my-digits"), help="folder to write (%(default)s)")
    add("--run-dir", type=Path, default=Path("runs/digits"), help="where checkpoints go (%(default)s)")
    add("--seed", type=int, default=0, help="of everything random (%(default)s)")
    add("--vae-steps", type=int, help="length of the first phase")
    add("--unet-steps", type=int, help="length of the second phase")
    add("--threads", type=int, default=2, help="CPU threads (%(default)s)")
    add("--restart", action="store_true", help="forget the checkpoints in --run-dir and start anew")
    parser.set_defaults(run=_train_digits)
    add_vae(models)
    add_ldm(models)


def _doctor(_: argparse.Namespace) -> int:
    from sdfast.doctor import report

    print(report())
    return 0


def _train_digits(arguments: argparse.Namespace) -> int:
    steps = {"vae_steps": arguments.vae_steps, "unet_steps": arguments.unet_steps}
    steps = {name: count for name, count in steps.items() if count is not None}
    check_counts(arguments, "vae_steps", "unet_steps", "threads")
    check_folder("--output", arguments.output.parent)
    check_folder("--run-dir", arguments.run_dir)
    from sdfast.training.digits import train_digits

    output = train_digits(
        arguments.output,
        run_dir=arguments.run_dir,
        seed=arguments.seed,
        resume=not arguments.restart,
        threads=arguments.threads,
        **steps,
    )
    # With "./", for the name alone may mean something else.
    model = shlex.quote(os.path.join(os.curdir, output))
    print(f"{output}: trained; try: sdfast generate 'a handwritten seven' --model {model}")
    return 0


@contextlib.contextmanager
def _warnings_as_lines() -> Iterator[None]:
    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        print(f"sdfast: warning: {one_line(message)}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


def _out_of_memory(error: Exception) -> bool:
    torch = sys.modules.get("torch")  # if it has not been loaded it has not failed
    gpu = torch is not None and isinstance(error, torch.OutOfMemoryError)
    # On the CPU torch raises a plain RuntimeError.
    return gpu or isinstance(error, MemoryError) or "DefaultCPUAllocator: can't allocate" in str(error)
