"""The command line of `sdfast bench`; nothing here imports torch before the arguments are checked."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import Any

from sdfast._arguments import check_counts, check_folder, usable_device
from sdfast.bench.request import DTYPES, ENGINES, OPS, PARTS, Request, names
from sdfast.dispatch import BACKENDS

_DESCRIPTION = f"""\
Measures sdfast beside eager PyTorch and other engines, and writes bench.json, bench.md and bench.html.

  sdfast bench [{"|".join(PARTS)}] ...   those parts, or all
  sdfast bench compare A.json B.json [--fail-over 10%]   what got slower; exits 1 over the threshold

Every candidate's result is checked before it is timed; sides take turns in time."""


def add_parser(commands: Any) -> None:
    """Add `bench` to the commands of an argparse parser."""
    parser = commands.add_parser(
        "bench", help="measure beside eager PyTorch and other engines, or compare two records",
        description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("what", nargs="*", metavar="PART", help=f"{', '.join(PARTS)} (all), or compare and two files")
    add("--device", default="cpu", help="cpu, cuda, cuda:1, ... (%(default)s)")
    add("--dtype", default="float32", help=f"of {', '.join(DTYPES)}, with commas between (%(default)s)")
    add("--against", default="eager", help=f"of {', '.join(ENGINES)}, with commas between (%(default)s)")
    add("--quick", action="store_true", help="few cases, small models; two minutes on two cores")
    folder_help = "folder to write, {machine} in it stands for this machine's name (%(default)s)"
    add("-o", "--output", type=Path, default=Path("sdfast-bench"), help=folder_help)
    add(
        "--resume", action="store_true", help="go on with the folder's run: measure what is missing or failed"
    )
    add("--only", help=f"operations of the part ops: of {', '.join(OPS)}")
    add("--seconds", type=float, help="of timing for each case of ops (3, quick 0.3)")
    add("--rounds", type=int, help="of calls of models, images and training (5, quick 3)")
    add("--threads", type=int, help="CPU threads (torch's choice)")
    add("--backend", choices=BACKENDS, help="whose kernels are ours (the fastest that can run)")
    add("--fail-over", metavar="PERCENT", help="with compare: exit 1 where a row got slower by more")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """
    Returns:
        0, or 1 where our side of a row failed or a comparison found too much.

    Raises:
        ValueError: bad arguments.
        OSError: a file or folder that cannot be read or written.
    """
    if arguments.what[:1] == ["compare"]:
        return _compare(arguments)
    if arguments.fail_over is not None:
        raise ValueError("--fail-over: needs compare")
    request = request_of(arguments)
    # What follows imports torch.
    from sdfast.bench import suite, tables

    _check_device(request.device)
    command = _recorded(sys.argv[1:])
    try:
        result = suite.run(request, command, lambda line: print(line, flush=True))
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"interrupted; --resume goes on with {request.output}") from None
    return 1 if tables.failures(result) else 0


def _recorded(told: list[str]) -> str:
    """The command without what changes no number: where the record goes, and that it is gone on with."""
    if told[:1] != ["bench"]:
        return "sdfast bench"
    words, rest = ["sdfast"], iter(told)
    for word in rest:
        if word in ("-o", "--output"):
            next(rest, None)
        elif word != "--resume" and not word.startswith("--output="):
            words.append(word)
    return shlex.join(words)


def request_of(arguments: argparse.Namespace) -> Request:
    """
    Raises:
        ValueError: an argument is not allowed; says what is.
    """
    check_counts(arguments, "rounds", "threads")
    if arguments.seconds is not None and not 0 < arguments.seconds < float("inf"):
        raise ValueError(f"--seconds: got {arguments.seconds}, expected more than 0")
    check_folder("--output", arguments.output)
    parts = names("bench", arguments.what, PARTS) if arguments.what else PARTS
    if arguments.only is not None and "ops" not in parts:
        raise ValueError(f"--only: names operations of the part ops, which {', '.join(parts)} is without")
    return Request(
        parts=parts,
        device=arguments.device,
        dtypes=names("--dtype", arguments.dtype, DTYPES),
        against=names("--against", arguments.against, ENGINES),
        quick=arguments.quick,
        output=arguments.output,
        only=names("--only", arguments.only, OPS) if arguments.only is not None else OPS,
        seconds=arguments.seconds,
        rounds=arguments.rounds,
        threads=arguments.threads,
        backend=arguments.backend,
        resume=arguments.resume,
    )


def _check_device(name: str) -> None:
    if usable_device("--device", name).type not in ("cpu", "cuda"):
        raise ValueError(f"--device: {name!r} is not measured, expected cpu or cuda")


def _compare(arguments: argparse.Namespace) -> int:
    from sdfast.bench.compare import report

    files = arguments.what[1:]
    if len(files) != 2:
        raise ValueError(f"bench compare: got {len(files)} files, expected two: A.json B.json")
    threshold = None if arguments.fail_over is None else _fraction(arguments.fail_over)
    lines, failed = report((Path(files[0]), Path(files[1])), threshold)
    print("\n".join(lines))
    return 1 if failed else 0


def _fraction(text: str) -> float:
    try:
        percent = float(text.removesuffix("%"))
    except ValueError:
        percent = -1
    if not 0 <= percent < float("inf"):
        raise ValueError(f"--fail-over: got {text!r}, expected a percentage such as 10%")
    return percent / 100
