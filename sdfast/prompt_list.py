"""Draw every line of a list of prompts into a folder, by one process or several, and go on where it stopped.

    000001.png, 000002.png, ...      by line, from 1 on; line i has seed + i; a blank line has none
    settings.json                    what all of them were made with: other settings are refused there, and
                                     so are other weights under the same name

Consecutive prompts form a batch, and of W processes each takes every W-th batch. They do not talk to each
other: a picture is there, whole, or it is not. A batch of which one is missing is drawn whole, so that
with the same `batch_size` (and threads) the pictures are the same bit for bit, by however many processes and
with however many interruptions they were made; with another one they are the same to rounding.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sdfast.diffusion import sampler_name
from sdfast.generation import OnStep
from sdfast.images import read_image, read_settings, save_png
from sdfast.pipelines import StableDiffusion
from sdfast.prompt_lines import Line, Share
from sdfast.request import default_batch_size


@dataclasses.dataclass
class Progress:
    """What one process has done of its share.

    Attributes:
        found: pictures that were there.
        made: pictures that it wrote.
        missing: pictures that it still has to write.
        steps, seconds: how many passes over a batch it ran, and how long it took for them.
    """

    found: int = 0
    made: int = 0
    missing: int = 0
    steps: int = 0
    seconds: float = 0.0


@dataclasses.dataclass(frozen=True)
class PromptList:
    """The lines, the folder they are drawn into, and what with.

    Attributes:
        pipe: the model.
        lines: what to draw, in order.
        folder: where.
        seed: line i gets seed + i.
        share: which of the batches are this process's.
        batch_size: prompts at once; when None by their size, and so that every process has some.
        options: further arguments of `StableDiffusion.text_to_image`: one value for all lines each.
    """

    pipe: StableDiffusion
    lines: Sequence[Line]
    folder: Path
    seed: int = 0
    share: Share = dataclasses.field(default_factory=Share)
    batch_size: int | None = None
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def draw(self, progress: Progress, on_step: OnStep | None = None) -> None:
        """Write the pictures of this process's share that are not there yet.

        Args:
            progress: is kept up to date, so that it can be told after an interruption.
            on_step: called as on_step(done, total) after each step of each batch.

        Raises:
            ValueError: an argument of `text_to_image` is out of its range, or the folder holds pictures of
                other settings or prompts. Nothing was computed then.
            OSError: the folder cannot be written to; the pictures that are there are whole.
        """
        if self._settings_path.exists():
            self._compare_settings()
        batches = [
            (batch, missing)
            for batch in self._batches()
            if (missing := [one for one in batch if not self._is_there(one)])
        ]
        self._sweep([line for _, missing in batches for line in missing])
        progress.missing = sum(len(missing) for _, missing in batches)
        progress.found = sum(len(batch) for batch in self._batches()) - progress.missing
        for i, (batch, missing) in enumerate(batches):
            tell = None if on_step is None else _shifted(on_step, i, len(batches))
            result = self.pipe.text_to_image(
                [line.prompt for line in batch], seed=[self.seed + line.number for line in batch],
                batch_size=len(batch), on_step=tell, **self.options,
            )  # fmt: skip
            if i == 0:  # not before: an argument that was refused must not bind the folder
                self._claim_folder()
            for line, image in zip(batch, result.images, strict=True):
                if line in missing:
                    own = {
                        "prompt": line.prompt, "seeds": [self.seed + line.number], "weights": self._weights,
                    }  # fmt: skip
                    save_png(image, self._path(line), result.settings | own)
                    progress.made += 1
                    progress.missing -= 1
            progress.steps += result.settings["steps"]
            progress.seconds += result.seconds_per_step * result.settings["steps"]

    def _batches(self) -> list[Sequence[Line]]:
        """This process's."""
        size = self.batch_size
        if size is None:
            height, width = (side // self.pipe.vae.downsampling for side in self._size())
            each = -(-len(self.lines) // self.share.processes)
            size = min(default_batch_size(height, width), each)
        batches = [self.lines[first : first + size] for first in range(0, len(self.lines), size)]
        return batches[self.share.rank :: self.share.processes]

    def _size(self) -> tuple[int, int]:
        height, width = self.pipe.default_size
        return self.options.get("height") or height, self.options.get("width") or width

    def _path(self, line: Line) -> Path:
        return self.folder / f"{line.number:06d}.png"

    def _is_there(self, line: Line) -> bool:
        """Whether this line's picture is there and whole; that of another line or settings is refused."""
        path = self._path(line)
        if not path.exists():
            return False
        try:
            settings = read_settings(path)
        except (OSError, SyntaxError, ValueError):
            if _is_whole(path):
                raise ValueError(
                    f"--output: {path} was not made here; move it away, or choose another folder"
                ) from None
            warnings.warn(f"{path} is damaged; it is made anew")
            return False
        if settings.get("prompt") != line.prompt or settings.get("seeds") != [self.seed + line.number]:
            raise ValueError(
                f"--output: {path} shows {settings.get('prompt')!r}, but line {line.number} is now"
                f" {line.prompt!r}; delete the picture, or choose another folder"
            )
        # settings.json may be gone. Pictures name no LoRA where there is none.
        theirs = {"loras": {}, "weights": None} | settings
        ours = self._settings
        if differ := _differences(theirs, ours, [name for name in ours if name in theirs]):
            raise ValueError(
                f"--output: {path} was made with other settings ({differ}); choose another folder, or delete"
                " that picture"
            )
        return True

    @functools.cached_property
    def _weights(self) -> str:
        return self.pipe.fingerprint()

    @property
    def _settings(self) -> dict[str, Any]:
        """What all pictures of the folder are made with."""
        height, width = self._size()
        return {
            "model": self.pipe.name,
            "weights": self._weights,
            "dtype": str(self.pipe.dtype).removeprefix("torch."),
            "loras": self.pipe.loras,
            "seed": self.seed,
            **self.options,
            "sampler": sampler_name(self.pipe.scheduler_config, self.options.get("sampler")),
            "height": height,
            "width": width,
        }

    @property
    def _settings_path(self) -> Path:
        return self.folder / "settings.json"

    def _claim_folder(self) -> None:
        """Note the settings in the folder, or compare with what another process has noted meanwhile."""
        self.folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self._settings, indent=2, ensure_ascii=False) + "\n"
        _write_if_absent(self._settings_path, text)
        self._compare_settings()

    def _compare_settings(self) -> None:
        path = self._settings_path
        try:
            theirs = dict(json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"--output: {path} holds no settings ({error}); choose another folder"
            ) from error
        if differ := _differences(theirs, self._settings, {**self._settings, **theirs}):
            raise ValueError(
                f"--output: {self.folder} holds pictures of other settings ({differ}); choose another folder,"
                " or delete that one"
            )

    def _sweep(self, lines: Sequence[Line]) -> None:
        """Remove what a killed process left of these lines' pictures, which no other process writes."""
        names = {self._path(line).name for line in lines}
        for left in self.folder.glob(".*.png.*.tmp"):
            if left.name[1:].split(".png.")[0] + ".png" in names:
                left.unlink(missing_ok=True)


def _differences(theirs: Mapping[str, Any], ours: Mapping[str, Any], names: Iterable[str]) -> str:
    """Which of these differ, and how; empty where none does."""
    return "; ".join(
        f"{name} is {theirs.get(name)!r} there and {ours.get(name)!r} here"
        for name in names
        if theirs.get(name) != ours.get(name)
    )


def _shifted(on_step: OnStep, batch: int, batches: int) -> OnStep:
    """on_step for one of several batches, told as steps of all."""
    return lambda done, total: on_step(batch * total + done, batches * total)


def _is_whole(path: Path) -> bool:
    try:
        read_image(path)
    except OSError:
        return False
    return True


def _write_if_absent(path: Path, text: str) -> None:
    """Write a file whole and only where there is none: of processes that start together one wins."""
    if path.exists():
        return
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        try:
            os.link(temporary, path)
        except FileExistsError:  # another process was faster
            pass
        except (OSError, NotImplementedError, AttributeError):  # a file system or a Python without links
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
