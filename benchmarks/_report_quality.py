"""Tables of what models do rather than of how fast: the shipped one's pictures, inpainting, LoRA."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from sdfast.bench.tables import markdown_table

Row = dict[str, Any]


def digits_lines(record: Row) -> list[str]:
    """The digits: how many are read as asked."""
    training = record["training"]
    lines = [
        f"Real digits that were held out: {record['real']['accuracy']:.1%} read as labelled. The model was"
        f" trained in {training['seconds'] / 60:.0f} minutes (`{training['command']}`). Spread: the standard"
        " deviation of a pixel among pictures of one digit.",
        "",
    ]
    rows = [
        (
            f"guidance {r['guidance_scale']}, {r['steps']} steps",
            r["images"],
            f"{r['accuracy']:.1%}",
            f"{r['spread']:.3f}",
        )
        for r in record["rows"]
    ]
    rows.append(("real", "", f"{record['real']['accuracy']:.1%}", f"{record['real']['spread']:.3f}"))
    return lines + markdown_table(("pictures", "count", "read as asked", "spread"), rows)


def inpainting_lines(record: Row) -> list[str]:
    """Digits of which a half was painted anew: how many are read, and how visible the seam is."""
    head = ("painted", "way", "read right", "seam of a whole one's")
    return markdown_table(head, _inpainting_rows(record))


def _inpainting_rows(record: Row) -> Iterator[Sequence[object]]:
    for row in record["rows"]:
        yield (
            f"{row['painted']} half", row["way"], f"{row['accuracy']:.1%} of {row['images']}",
            f"{row['seam']:.2f}x",
        )  # fmt: skip


def lora_lines(record: Row) -> list[str]:
    """A LoRA of mirror writing: how many digits are read as asked with it and without."""
    training = record["training"]
    lines = [
        f"A LoRA of rank {training['rank']} for the digits' U-Net, trained for {training['steps']} steps on"
        f" mirrored digits, {training['file_bytes'] / 2**20:.1f} MiB. Unloaded, the old pictures came back"
        f" {'bit for bit' if record['unloaded_bit_for_bit'] else 'changed'}.",
        "",
    ]
    rows = [
        (r["model"], r["images"], f"{r['as drawn']:.1%}", f"{r['mirrored back']:.1%}") for r in record["rows"]
    ]
    return lines + markdown_table(("model", "pictures", "read as asked", "mirrored back"), rows)


def train_ldm_lines(record: Row) -> list[str]:
    """Gradients of one step of `sdfast train ldm`, computed in each of its ways."""
    rows = [(row["name"], f"{row['relative_error']:.1e}") for row in record["rows"]]
    return [
        f"The gradient of one step, {record['batch_size']} pictures and {record['parameters'] / 1e6:.1f}"
        " million parameters, beside that of one process in fp32 without any of these.",
        "",
        *markdown_table(("computed by", "relative error"), rows),
    ]
